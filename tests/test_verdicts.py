"""Verdicts: one JSON object with one boolean, and nothing that looks like it."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cz_jax.text.verdicts import MAX_VERDICT, parse_verdict


@pytest.mark.parametrize(
    "text",
    [
        '{"is_correct": VALUE}',
        ' \n{ "is_correct" :\tVALUE }\r\n',
        '```json\n{"is_correct": VALUE}\n```',
        '\n```json\r\n{"is_correct": VALUE}\r\n```\n\n',
        '```JSON\n{\n  "is_correct": VALUE\n}\n```',
        '{"is\\u005fcorrect": VALUE}',
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_a_verdict_is_read(text, value):
    assert parse_verdict(text.replace("VALUE", json.dumps(value))) is value


BAD_INPUTS = {
    "empty": "",
    "whitespace": " \n",
    "false as a string": '{"is_correct": "false"}',
    "true as a string": '{"is_correct": "true"}',
    "1": '{"is_correct": 1}',
    "0": '{"is_correct": 0}',
    "null": '{"is_correct": null}',
    "dict": '{"is_correct": {}}',
    "list": '{"is_correct": [true]}',
    "score 1e308": '{"is_correct": 1e308}',
    "score 1e999": '{"is_correct": 1e999}',
    "NaN": '{"is_correct": NaN}',
    "Infinity": '{"is_correct": Infinity}',
    "true | false": '{"is_correct": true | false}',
    "true|false fenced": '```json\n{"is_correct": true|false}\n```',
    "Python's True": '{"is_correct": True}',
    "single quotes": "{'is_correct': true}",
    "extra key": '{"is_correct": true, "why": "it is"}',
    "other key": '{"correct": true}',
    "other case": '{"Is_Correct": true}',
    "no key": "{}",
    "bare": "true",
    "array": '[{"is_correct": true}]',
    "duplicate key": '{"is_correct": false, "is_correct": true}',
    "duplicate key, same": '{"is_correct": true, "is_correct": true}',
    "two verdicts": '{"is_correct": true}\n{"is_correct": false}',
    "two fences": '```json\n{"is_correct": true}\n```\n```json\n{"is_correct": true}\n```',
    "prose": "The solution is_correct: true.",
    "prose before": 'So: {"is_correct": true}',
    "prose after": '{"is_correct": true} because it adds',
    "negated prose": 'It is not the case that {"is_correct": true}',
    "prose before the fence": 'Verdict:\n```json\n{"is_correct": true}\n```',
    "prose after the fence": '```json\n{"is_correct": true}\n```\nNo wait.',
    "fence of no language": '```\n{"is_correct": true}\n```',
    "fence of python": '```python\n{"is_correct": true}\n```',
    "tildes": '~~~json\n{"is_correct": true}\n~~~',
    "unclosed fence": '```json\n{"is_correct": true}',
    "cut": '{"is_correct": tr',
    "comment": '{"is_correct": true} // yes',
    "trailing comma": '{"is_correct": true,}',
    "byte order mark": '\ufeff{"is_correct": true}',
    "NUL": '{"is_correct": true}\0',
    "lone surrogate": '{"is_correct": true}\ud800',
    "deep": '{"is_correct": ' + "[" * 100000 + "]" * 100000 + "}",
    "deep but short": '{"is_correct": ' + "[" * 5000,
    "huge integer": '{"is_correct": ' + "9" * 5000 + "}",
    "too long": '{"is_correct": true}' + " " * MAX_VERDICT,
    "not text": None,
    "bytes": b'{"is_correct": true}',
}


@pytest.mark.parametrize("text", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_what_is_no_verdict_is_none(text):
    assert parse_verdict(text) is None


PIECES = [
    *(
        '{"is_correct": true}',
        '{"is_correct": false}',
        '{"is_correct":',
        '"is_correct"',
        "is_correct",
        "{",
        "}",
        "[",
        "]",
    ),
    *(
        "true",
        "false",
        "null",
        "NaN",
        "1",
        "1e308",
        '"',
        ":",
        ",",
        " ",
        "\n",
        "\r\n",
        "```json\n",
        "\n```",
        "```",
        "~~~",
    ),
    *("|", "not ", "\\", "\\ud800", "\ud800", "\0", "-", "9" * 50),
]


@settings(max_examples=700)
@given(st.integers(0, 1 << 32))
def test_of_7000_made_texts_none_raises_and_only_whole_objects_count(seed):
    draw = random.Random(seed)
    for _ in range(10):
        text = "".join(draw.choices([*PIECES, chr(draw.randrange(0x110000))], k=draw.randrange(1, 7)))
        verdict = parse_verdict(text)
        assert verdict is None or verdict is True or verdict is False
        if verdict is not None:
            inner = text.strip().removeprefix("```json").removesuffix("```")
            assert json.loads(inner) == {"is_correct": verdict}
            assert inner.count("is_correct") == 1


@settings(max_examples=300)
@given(st.text() | st.binary())
def test_no_value_raises(text):
    assert parse_verdict(text) is None


def test_the_worst_texts_are_quick():
    texts = ['"\\' * (MAX_VERDICT // 2), "[" * MAX_VERDICT, "```\n" * (MAX_VERDICT // 4), "9" * MAX_VERDICT]
    texts.append("{" + ",".join(f'"{i}":1' for i in range(1500)) + "}")
    start = time.process_time()
    assert [parse_verdict(text) for text in texts] == [None] * len(texts)
    assert time.process_time() - start < 2.0
