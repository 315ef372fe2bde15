"""What the task families are put together from: names, values, conditions on numbers and words, and changes to them."""

import random
from dataclasses import dataclass

VERBS = "get find make compute give take work solve build count check pick read show form".split()
NOUNS = "value result total items part score list data answer number text change state step code".split()
ARGUMENTS = {
    "number": ["n", "x", "a", "k", "m", "value", "number", "limit"],
    "list": ["xs", "numbers", "values", "items", "nums", "scores", "prices", "data"],
    "text": ["s", "text", "word", "line", "name", "title"],
    "words": ["words", "names", "lines", "texts", "tags"],
    "table": ["d", "table", "stock", "ages", "points"],
    "grid": ["grid", "rows", "matrix", "board"],
}
WORDS = (
    "apple bean cat corn dog egg fig fish goat hat ice jam kite lamp lime milk nut oak pear pig plum rice sea sun tea "
    "tree van wolf yak zoo"
).split()
LETTERS = "aeilmnoprst"
SEPARATORS = "-+/:_"

# The kind of value that each letter of a family's `takes` stands for, and the argument names it goes under.
KINDS = {
    "i": "number",  # -9..20
    "p": "number",  # 1..40
    "n": "number",  # 0..6, for recursion
    "l": "list",
    "t": "text",
    "w": "words",
    "d": "table",
    "g": "grid",
}


@dataclass(frozen=True)
class Part:
    """A condition or a change: `phrase` for the question ({s} the subject, {k} its constant), `code` over {v}."""

    name: str
    phrases: tuple[str, ...]
    codes: tuple[str, ...]
    low: int = 2
    high: int = 9


CONDITIONS = (
    Part("greater", ("greater than {k}", "above {k}"), ("{v} > {k}",)),
    Part("less", ("less than {k}", "below {k}"), ("{v} < {k}",)),
    Part("at_least", ("at least {k}",), ("{v} >= {k}",)),
    Part("at_most", ("at most {k}",), ("{v} <= {k}",)),
    Part("even", ("even",), ("{v} % 2 == 0",)),
    Part("odd", ("odd",), ("{v} % 2 == 1",)),
    Part("multiple", ("divisible by {k}", "a multiple of {k}"), ("{v} % {k} == 0",), 3, 5),
    Part("unequal", ("not {k}", "different from {k}"), ("{v} != {k}",)),
    Part("positive", ("positive",), ("{v} > 0",)),
    Part("negative", ("negative",), ("{v} < 0",)),
)
CHANGES = (
    Part("times", ("{s} times {k}", "{s} multiplied by {k}"), ("{v} * {k}",)),
    Part("plus", ("{s} plus {k}",), ("{v} + {k}",)),
    Part("minus", ("{s} minus {k}",), ("{v} - {k}",)),
    Part("square", ("the square of {s}",), ("{v} * {v}", "{v} ** 2")),
    Part("double", ("twice {s}", "the double of {s}"), ("{v} * 2",)),
    Part("remainder", ("{s} modulo {k}",), ("{v} % {k}",), 2, 5),
    Part("half", ("half of {s} rounded down",), ("{v} // 2",)),
    Part("opposite", ("the opposite of {s}",), ("-{v}",)),
    Part("size", ("the absolute value of {s}",), ("abs({v})",)),
)
WORD_CONDITIONS = (
    Part("longer", ("longer than {k} letters", "with more than {k} letters"), ("len({v}) > {k}",), 2, 4),
    Part("shorter", ("shorter than {k} letters", "with fewer than {k} letters"), ("len({v}) < {k}",), 3, 5),
    Part("long", ("with exactly {k} letters",), ("len({v}) == {k}",), 2, 4),
    Part("starts", ("that starts with '{q}'",), ("{v}[0] == '{q}'", "{v}.startswith('{q}')")),
    Part("ends", ("that ends with '{q}'",), ("{v}[-1] == '{q}'", "{v}.endswith('{q}')")),
    Part("holds", ("that contains '{q}'",), ("'{q}' in {v}",)),
    Part("lacks", ("without '{q}'",), ("'{q}' not in {v}",)),
)
WORD_CHANGES = (
    Part("upper", ("{s} in upper case",), ("{v}.upper()",)),
    Part("title", ("{s} with a capital first letter",), ("{v}.capitalize()",)),
    Part("reversed", ("{s} reversed",), ("{v}[::-1]",)),
    Part("first", ("the first letter of {s}",), ("{v}[0]",)),
    Part("last", ("the last letter of {s}",), ("{v}[-1]",)),
    Part("repeated", ("{s} repeated {k} times",), ("{v} * {k}",), 2, 3),
    Part("marked", ("{s} followed by '{q}'",), ("{v} + '{q}'",)),
    Part("head", ("the first {k} letters of {s}",), ("{v}[:{k}]",), 2, 3),
)
# Slots of a template: the name before "_" is the phrase's, in capitals the code's.
SLOTS = {
    "c": CONDITIONS, "e": CONDITIONS, "p": CHANGES, "r": CHANGES, "w": WORD_CONDITIONS, "y": WORD_CHANGES,
}  # fmt: skip


class Phrase:
    """What a part says, for a subject: `format(phrase, "each number in {a}")`."""

    def __init__(self, text: str):
        self._text = text

    def __format__(self, subject: str) -> str:
        return self._text.replace("{s}", subject)


class Code:
    """What a part does, over the variable that the template names after a colon."""

    def __init__(self, text: str):
        self._text = text

    def __format__(self, variable: str) -> str:
        return self._text.replace("{v}", variable)


def fill_part(part: Part, rng: random.Random, taken: set[int]) -> tuple[Phrase, tuple[Code, ...]]:
    """The part with a constant and a letter of its own; `taken` keeps constants of one task apart."""
    free = [k for k in range(part.low, part.high + 1) if k not in taken] or [part.low]
    k, q = rng.choice(free), rng.choice(LETTERS)
    if any("{k}" in c for c in part.codes):
        taken.add(k)

    def put(text: str) -> str:
        return text.replace("{k}", str(k)).replace("{q}", q)

    return Phrase(put(rng.choice(part.phrases))), tuple(Code(put(c)) for c in part.codes)


def draw_value(kind: str, rng: random.Random):
    if kind == "i":
        return rng.randint(-9, 20)
    if kind == "p":
        return rng.randint(1, 40)
    if kind == "n":
        return rng.randint(0, 6)
    if kind == "l":
        return [rng.randint(-5, 12) for _ in range(rng.randint(2, 4))]
    if kind == "t":
        return rng.choice(WORDS)
    if kind == "w":
        return rng.sample(WORDS, rng.randint(2, 3))
    if kind == "d":
        return {w: rng.randint(-3, 12) for w in rng.sample(WORDS, rng.randint(1, 2))}
    if kind == "g":
        return [[rng.randint(-3, 9) for _ in range(2)] for _ in range(2)]
    raise ValueError(f"no kind of value {kind!r}")
