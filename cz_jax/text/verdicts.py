"""Text of a generative evaluator -> a verdict, or nothing."""

from cz_jax.text.reading import BadJson, load_json, read_fences

MAX_VERDICT = 1 << 14  # characters
_KEY = "is_correct"


def parse_verdict(text: str) -> bool | None:
    """True or False where `text` is the JSON object {"is_correct": true|false} and nothing else, else None.

    Allowed around it: whitespace, and one closed ```json fence. Everything else is no verdict: other or repeated keys,
    "false" as a string, 0 and 1, null, two objects, `true | false`, prose before or after, a text too long. Never
    raises.
    """
    if not isinstance(text, str) or len(text) > MAX_VERDICT:
        return None
    fences, outside = read_fences(text)
    if fences:
        first = fences[0]
        if len(fences) != 1 or (first.mark, first.info) != ("`", "json") or not first.closed or outside.strip():
            return None
        text = fences[0].body
    try:
        value = load_json(text.strip())
    except BadJson:
        return None
    if not isinstance(value, dict) or set(value) != {_KEY} or not isinstance(value[_KEY], bool):
        return None
    return value[_KEY]
