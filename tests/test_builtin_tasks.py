"""The tasks that come with cz_jax: enough of each level, solvable as their own tests say, and a clean held-out part."""

import ast
import collections
import importlib.resources
import io
import json
import re
import sys

import pytest

from cz_jax.errors import TaskError
from cz_jax.tasks import load_tasks, question_key

ROWS = [
    json.loads(line)
    for line in importlib.resources.files("cz_jax")
    .joinpath("assets/tasks/builtin.jsonl")
    .read_text("utf-8")
    .splitlines()
]


def run_program(source, stdin):
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "stdout", out)
        exec(source, {"__name__": "__main__"})
    return out.getvalue()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["entry_point"] or row["question"][:30])
def test_own_solution_passes_and_an_empty_one_fails(row):
    """The solutions are this repository's own code; nothing else is ever run."""
    if row["entry_point"] is None:
        for test in map(json.loads, row["tests"]):
            assert run_program(row["solution"], test["input"]) == test["output"]
        return
    scope, empty = {}, {row["entry_point"]: lambda *a: object()}
    exec(row["solution"], scope)
    for test in row["tests"]:
        exec(test, scope)
        with pytest.raises((AssertionError, TypeError)):
            exec(test, dict(empty))


def test_every_row_is_whole():
    for row in ROWS:
        assert set(row) == {"split", "level", "question", "entry_point", "tests", "solution"}
        assert len(row["tests"]) == 3 == len(set(row["tests"]))
        if row["entry_point"]:
            assert f"{row['entry_point']}(" in row["question"], "the question names the function with its arguments"
            assert not any(isinstance(n, ast.Constant) and isinstance(n.value, float) for t in row["tests"]
                           for n in ast.walk(ast.parse(t))), "no test compares floats"  # fmt: skip


def test_no_function_passes_by_a_constant():
    """An answer that always returns the same thing passes no task: the expected values of its tests differ."""
    for row in ROWS:
        if row["entry_point"]:
            wanted = {ast.unparse(ast.parse(t).body[0].test.comparators[-1]) for t in row["tests"]}
        else:
            wanted = {json.loads(t)["output"] for t in row["tests"]}
        assert len(wanted) > 1, row["question"]


def test_levels_and_splits():
    train, held_out = load_tasks("builtin@train"), load_tasks("builtin@held_out")
    every = load_tasks("builtin@all")
    assert train.skipped == held_out.skipped == every.skipped == {}
    assert len(every.tasks) == len(ROWS) >= 80
    assert {t.id for t in train.tasks}.isdisjoint(t.id for t in held_out.tasks)
    assert {t.id for t in train.tasks} | {t.id for t in held_out.tasks} == {t.id for t in every.tasks}
    counts = collections.Counter(t.level for t in every.tasks)
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) >= 12
    held = collections.Counter(t.level for t in held_out.tasks)
    assert all(0.2 <= held[level] / counts[level] <= 0.3 for level in counts)
    assert {t.level for t in every.tasks if t.is_program} == {3, 4, 5}
    assert load_tasks("builtin").tasks == train.tasks
    assert all(t.source == "builtin" for t in every.tasks)


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def shape(solution):
    """The solution with every name of its own replaced, so that a renamed copy looks the same."""
    return re.sub(r"'[A-Za-z_]+'", "''", ast.dump(ast.parse(solution)))


def test_held_out_tasks_are_no_near_copies_of_training_tasks():
    train = [r for r in ROWS if r["split"] == "train"]
    held_out = [r for r in ROWS if r["split"] == "held_out"]
    assert {shape(r["solution"]) for r in train}.isdisjoint(shape(r["solution"]) for r in held_out)
    for h in held_out:
        for t in train:
            a, b = words(h["question"]), words(t["question"])
            assert len(a & b) / len(a | b) < 0.6, (h["question"], t["question"])
    assert len({question_key(t) for t in load_tasks("builtin@all").tasks}) == len(ROWS)


def test_loading_never_looks_at_the_solution():
    for task, row in zip(load_tasks("builtin@all").tasks, ROWS, strict=True):
        assert (task.question, list(task.tests), task.level) == (row["question"], row["tests"], row["level"])
        assert row["solution"] not in repr(task)


@pytest.mark.parametrize("spec, words", [("builtin@test", "train, held_out, all"), ("builtin:x", "no path")])
def test_other_specs_are_refused(spec, words):
    with pytest.raises(TaskError, match=words):
        load_tasks(spec)
