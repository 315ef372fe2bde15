"""The task families of scripts/tiny: right answers are right, wrong ones wrong, texts fit the prompts and readers."""

import ast
import pathlib
import random
import re
import sys
from difflib import SequenceMatcher

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))

from tiny import families, learn, mutate, sheets, text
from tiny.families import FAMILIES, SPLITS, draw, draw_item, families_of, is_held_out, split_of
from tiny.interpreter import Program, Rejected
from tiny.speak import TRIES, speak
from tiny.table import HELD_OUT_FAMILIES

from cz_jax.convert.folder import locate
from cz_jax.convert.tokenizer import load_tokenizer
from cz_jax.models.spec import arch_from_folder
from cz_jax.roles.prompts import judge_messages
from cz_jax.tasks import load_tasks
from cz_jax.text.answers import extract_code, normalise, structure
from cz_jax.text.names import fault
from cz_jax.text.proposals import parse_proposal

IMPORTS = ("math",)


@pytest.fixture(scope="session")
def tokenizer():
    folder = locate("tiny")
    return load_tokenizer(folder, arch_from_folder(folder))


def some_items(count=3):
    for family in FAMILIES.values():
        rng = random.Random(family.name)
        found = [item for _ in range(3 * count) if (item := draw_item(family, rng)) is not None][:count]
        assert len(found) == count, family.name
        yield from found


# ---- the interpreter


@pytest.mark.parametrize(
    "code, given, value",
    [
        ("def f(n):\n    return n * 2 if n > 3 else -n", (5,), 10),
        ("def f(g):\n    t = 0\n    for x in g:\n        if x % 2:\n            continue\n        t += x\n    return t",
         ([1, 4],), 4),
        ("def f(n):\n    while True:\n        n -= 1\n        if n < 3:\n            break\n    return n", (9,), 2),
        ("def f(w):\n    return {x: len(x) for x in w if x[0] == 'a'}", (["ab", "b"],), {"ab": 2}),
        ("def f(a, b):\n    a, b = b, a\n    return (a, b)", (1, 2), (2, 1)),
        ("def f(n):\n    return 1 if n == 0 else n * f(n - 1)", (5,), 120),
        ("def f(w):\n    return sorted(w, key=lambda x: -len(x), reverse=False)", (["a", "bb"],), ["bb", "a"]),
        ("def f(g):\n    return [x for row in g for x in row if x > 1 and not x == 3]", ([[1, 2], [3, 4]],), [2, 4]),
        ("def f(s):\n    return ' '.join(x.upper() for x in s.split())", ("a b",), "A B"),
        ("def f(n):\n    pass", (1,), None),
    ],
)  # fmt: skip
def test_the_interpreter_does_as_python(code, given, value):
    assert Program(code).call("f", *given) == value


@pytest.mark.parametrize(
    "body",
    [
        "return __import__('os')", "return open('x')", "import os", "return n.__class__", "return (n).real",
        "while True:\n        pass", "return f(n)", "return 9 ** 9 ** 9", "return 'a' * 10 ** 9",
        "return [0] * 10 ** 9",
        "return list(range(10 ** 9))", "global x", "return eval('1')", "x = [1]\n    for i in x:\n        x.append(i)",
        "return '%d' % n", "return f'{n}'", "return missing", "return n[0]", "return sum(*[[n]])", "del n",
        "return '{0}'.format(n)", "class A:\n        pass", "return 1 / 0", "n.x = 1", "return f(n, n)", "break",
    ],
)  # fmt: skip
def test_the_interpreter_refuses(body):
    with pytest.raises(Rejected):
        Program(f"def f(n):\n    {body}").call("f", 3)


@pytest.mark.parametrize("source", ["x = 1", "import os", "def f(:", "@g\ndef f(n):\n    return n", "f(1)"])
def test_the_interpreter_takes_functions_only(source):
    with pytest.raises(Rejected):
        Program(source)


def test_arguments_are_not_changed():
    given = [3, 1]
    assert Program("def f(xs):\n    xs.sort()\n    return xs").call("f", given) == [1, 3] and given == [3, 1]


# ---- the families


def test_numbers_of_families():
    assert len(FAMILIES) >= 60 and HELD_OUT_FAMILIES <= set(FAMILIES)
    for level in text.LEVELS:
        assert len(families_of("train", level)) >= 6 and families_of("new_families", level)
    assert all(families_of("new_parts", level) for level in text.LEVELS)
    bodies = " ".join(b for f in FAMILIES.values() for b in f.bodies)
    assert all(word in bodies for word in ("{f}(", "while ", ".items()", "for row in", "if ", "sorted("))


def test_every_spelling_of_a_right_answer_is_right():
    for item in some_items():
        assert item.right and all(item.solved_by(code) for code in item.right), item
        assert all(normalise(code) == code for code in item.right)
        assert all(structure(code, item.task).score == 1.0 for code in item.right), item


def test_tests_hold_for_right_answers():
    for item in some_items(2):
        program = Program(item.right[-1])
        assert 1 <= len(item.task.tests) <= 3
        for test in item.task.tests:
            compare = ast.parse(test).body[0].test
            given = [ast.literal_eval(a) for a in compare.left.args]
            assert program.call(item.task.entry_point, *given) == ast.literal_eval(compare.comparators[0])


def test_wrong_answers_are_wrong_and_differ():
    rng = random.Random(0)
    for item in some_items(1):
        wrong = mutate.wrong_bodies(item, rng, 3, (draw(rng, "train", item.task.level),))
        assert len(wrong) >= 2 and len(set(wrong)) == len(wrong), item
        assert not set(wrong) & set(item.right) and not any(item.solved_by(code) for code in wrong)
        assert all(normalise(code) == code for code in wrong)


def test_true_is_not_one():
    item = draw_item(FAMILIES["has_letter"], random.Random(0))
    code = item.right[0].replace("return", "return 1 if") + " else 0"
    assert item.solved_by(item.right[0]) and not item.solved_by(code)


def test_draws_follow_from_the_seed_and_keep_to_their_split():
    for split in SPLITS:
        for level in text.LEVELS:
            items = [draw(random.Random(f"{split}{n}"), split, level) for n in range(6)]
            assert items == [draw(random.Random(f"{split}{n}"), split, level) for n in range(6)]
            assert {split_of(i) for i in items} == {split} and {i.task.level for i in items} == {level}
            assert len({i.task.question for i in items}) >= 4
    combinations = [(f.name, p.name) for f in FAMILIES.values() if f.slots == ("c",) for p in families.SLOTS["c"]]
    held = sum(is_held_out(name, (part,)) for name, part in combinations)
    assert 0.05 < held / len(combinations) < 0.4


def test_a_topic_is_heeded():
    items = [draw(random.Random(n), "train", 3, topic=8) for n in range(10)]
    assert {FAMILIES[i.family].takes for i in items} == {"d"}


def test_written_tasks_can_be_read(tmp_path, monkeypatch):
    out = tmp_path / "tasks.jsonl"
    monkeypatch.setattr(sys, "argv", ["families.py", str(out), "--split", "new_parts", "--count", "10"])
    families.main()
    tasks = load_tasks(f"file:{out}").tasks
    assert len(tasks) == 10 and sorted(t.level for t in tasks) == sorted([1, 2, 3, 4, 5] * 2)


# ---- the texts


def test_proposals_are_valid():
    for item in some_items(2):
        task = parse_proposal(text.proposal(item), item.task.level, IMPORTS)
        assert (task.question, task.tests, task.entry_point) == (
            item.task.question, item.task.tests, item.task.entry_point,
        )  # fmt: skip


def test_noise_is_where_it_is_asked_for():
    rng = random.Random(0)
    items = [draw(rng, "train", 1 + n % 5) for n in range(200)]
    for noise, low, high in ((0.0, 1.0, 1.0), (1.0, 0.35, 0.65)):
        said = [(item, *text.solver_text(item, rng, noise)) for item in items]
        codes = [(item, extract_code(answer).code) for item, answer, _ in said]
        right = sum(code is not None and item.solved_by(code) for item, code in codes) / len(items)
        assert low <= right <= high
        assert any(goes_on for *_, goes_on in said) == (noise > 0)


def test_a_judge_sheet_is_the_judges_prompt(tokenizer):
    for kind in ("judge", "contrast", "contrast_names", "prefix", "points", "points_names"):
        sheet = text.judge_sheet(tokenizer, random.Random(5), 3, kind)
        assert sheet.kind == kind
        written = [tokenizer.decode(sheet.prompt + row.tokens) for row in sheet.rows]
        assert all(len(r.tokens) == len(r.weights) == len(r.marks) == len(r.mark_weights) for r in sheet.rows)
        if kind.startswith(("prefix", "points")):
            assert all("def " in w and "</code" not in w for w in written)
            continue
        for w in written:
            verdict = w.rsplit(":", 1)[1].strip()
            assert verdict in ("true", "false")
            nonce = w.split("<task-")[1][:8]
            code = w.split(f"<code-{nonce}>\n")[1].split(f"\n</code-{nonce}>")[0]
            assert normalise(code) == code
        right, wrong = (sum(r.weights[-1] for r, w in zip(sheet.rows, written, strict=True) if w.endswith(word))
                        for word in ("true", "false"))  # fmt: skip
        assert right == pytest.approx(wrong)


def test_contrasts_miss_a_right_answer_by_a_token():
    for number in range(20):
        rng = random.Random(number)
        item = draw(rng, "train", 1 + number % 5)
        for code in mutate.wrong_bodies(item, rng, 3, slips=mutate.NEAR_SLIPS):
            assert not item.solved_by(code)
            tokens = [re.findall(r"\w+|[^\w\s]+", text) for text in (code, *item.right)]
            edits = [SequenceMatcher(None, tokens[0], other, autojunk=False).get_opcodes() for other in tokens[1:]]
            # A slip in a name that stands in several places, or of "not in", is still one slip.
            assert min(sum(tag != "equal" for tag, *_ in edit) for edit in edits) <= 2


def test_spoken_sheets_hold_what_was_said_with_the_familys_labels(tokenizer):
    item = draw(random.Random(5), "train", 3)
    said = [*item.right[:1], *mutate.wrong_bodies(item, random.Random(0), 2)]
    sheet = text.judge_sheet(tokenizer, random.Random(5), 3, "spoken", said)
    labels = {}
    for row in sheet.rows:
        code, verdict = re.search(
            r"<code-\w+>\n(.*)\n</code-\w+>.*:\s*(\w+)$", tokenizer.decode(sheet.prompt + row.tokens), re.S
        ).groups()
        labels[code] = verdict
        assert (text.DECISIVE in row.mark_weights) or verdict == "true"
    assert set(said) <= set(labels) and set(labels) - set(said) <= set(item.right)
    assert all(verdict == str(code in item.right).lower() for code, verdict in labels.items())


def test_what_the_embedded_model_says_is_spelled_as_the_judge_reads_it():
    items = [draw(random.Random(n), "train", 1) for n in range(3)]
    said = speak(locate("tiny"), items)
    assert said == speak(locate("tiny"), items) and sum(map(len, said)) >= 3
    for item, codes in zip(items, said, strict=True):
        assert len(set(codes)) == len(codes) <= TRIES
        assert all(normalise(code) == code and fault(code, item.task) is None for code in codes)


def test_direct_sheets_are_encoded_as_the_evaluator_encodes(tokenizer):
    rng = random.Random(7)
    sheet = text.judge_sheet(tokenizer, random.Random(7), 2)
    item = draw(rng, "train", 2)
    written = tokenizer.decode(sheet.prompt + sheet.rows[0].tokens)
    nonce = written.split("<task-")[1][:8]
    chats = [
        tokenizer.encode_chat(judge_messages(item.task, code, nonce), forced='{"is_correct": true}')
        for code in item.right
    ]
    closing = len(tokenizer.encode("}"))
    assert sheet.prompt + sheet.rows[0].tokens in [chat[:-closing] for chat in chats]


def test_marks_tell_where_an_answer_leaves_every_right_one():
    ways = [[1, 2, 3, 4], [1, 5, 6]]
    assert text._marks([1, 2, 3, 4], ways) == [1, 1, 1, 1]
    assert text._marks([1, 5, 3, 4], ways) == [1, 1, 0, 0]
    assert text._marks([1, 2, 3, 4, 7], ways) == [1, 1, 1, 1, 0]
    assert text._marks([2], ways) == [0]


def test_points_weigh_the_tokens_where_right_and_wrong_part():
    def row(*tokens):
        return text.Continuation(
            list(tokens), [], text._marks(list(tokens), [[1, 2, 3, 4], [1, 5, 6]]), [1.0] * len(tokens)
        )

    rows = [row(1, 2, 3, 4), row(1, 5, 6), row(1, 2, 7, 4), row(1, 2, 3, 4, 8)]
    text._stress(rows)
    heavy = [[w == text.DECISIVE for w in r.mark_weights] for r in rows]
    assert heavy == [[False, False, True, False], [False] * 3, [False, False, True, False], [False] * 4 + [True]]


def test_layers_on_top_change_nothing_at_first(tokenizer):
    params = learn.first_params(0)
    deeper = learn.deepened(params, 2, 1)
    assert learn.arch_of(deeper).layers == learn.arch_of(params).layers + 2
    batch = sheets.batch_of([text.solve_sheet(tokenizer, random.Random(0), 2, 0.0)], (112, 40), tokenizer.pad_id)
    choices = np.array([5, 6])
    of_both = [learn.losses(p, batch, choices, False)[:2] for p in (params, deeper)]
    np.testing.assert_allclose(*of_both, rtol=1e-5)


def test_batches_hold_the_sheets(tokenizer):
    made = [text.solve_sheet(tokenizer, random.Random(n), 1 + n % 3, 1.0) for n in range(4)]
    shape = (max(len(s.prompt) for s in made) + 3, max(len(s.rows[0].tokens) for s in made) + 2)
    batch = sheets.batch_of(made, shape, tokenizer.pad_id)
    for i, sheet in enumerate(made):
        assert batch["prompts"][i, : batch["lengths"][i]].tolist() == sheet.prompt
        end = batch["ends"][i, 0]
        assert batch["rows"][i, 0, :end].tolist() == sheet.rows[0].tokens
        assert not batch["weights"][i, 0, end:].any() and (batch["marks"][i, 0, end:] == text.NONE).all()
    assert np.all(batch["prompts"][:, -3:] == tokenizer.pad_id)


def test_sheets_follow_from_their_number(tokenizer):
    for kind in sheets.SHAPES:
        one, two, other = (
            sheets.make_sheet(tokenizer, kind, n, 1.0, "seed", ("def f():\n    return 0",)) for n in (3, 3, 8)
        )
        assert one == two and one.kind == kind and one != other
