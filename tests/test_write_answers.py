"""scripts/write_answers.py: a run's answers as files, for people who want to execute them elsewhere."""

import json
import pathlib
import subprocess
import sys

import pytest

from cz_jax.ledger import RunLedger
from cz_jax.nouns import Group, Outcome, Reward, Rollout, Round, Task, Verdict

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "write_answers.py"
HOSTILE = "import os\nos.makedirs('executed')\n\n\ndef f(x):\n    return x"


@pytest.fixture
def run(tmp_path):
    task = Task("builtin", "Write f(x).\nIt returns x.", ("assert f(1) == 1", "assert f(2) == 2"), "f", 1)
    program = Task("code_contests", "Echo.", ('{"input":"1\\n","output":"1\\n"}',), None, 2)
    texts = (f"```python\n{HOSTILE}\n```", "no code")
    groups = tuple(Group(t, "peer", "0" * 64, 1, tuple(Rollout(x, True) for x in texts)) for t in (task, program))
    verdicts = ((Verdict(Outcome.CORRECT, 0.75), Verdict(Outcome.WRONG, 0.0)),) * 2
    rewards = ((Reward(1.5, {"correctness": 1.5}), Reward(0.0, {"correctness": 0.0})), None)
    ledger = RunLedger(tmp_path / "run")
    for number in (1, 2):
        ledger.write(Round(number, 1, 1, groups[:1], groups[1:], verdicts, rewards, (), "a", "b", "c", {}))
    return tmp_path / "run"


def call(*words, cwd):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60, cwd=cwd)


def test_answers_are_written_and_not_executed(run, tmp_path):
    told = call(run, "out", "--untrusted-code", "--rounds", "2:", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (0, "4 answers in out\n"), told.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(x["round"], x["outcome"], x["reward"], x["file"] is None) for x in lines] == [
        (2, "correct", 1.5, False), (2, "wrong", 0.0, True), (2, "correct", None, False), (2, "wrong", None, True),
    ]  # fmt: skip
    text = (tmp_path / lines[0]["file"]).read_text()
    assert text == (
        "# UNTRUSTED\n# The evaluator said: correct, P = 0.750\n# \n# Write f(x).\n# It returns x.\n\n"
        f"{HOSTILE}\n\nassert f(1) == 1\nassert f(2) == 2\n"
    )
    assert (tmp_path / lines[2]["file"]).read_text().endswith('\n\n# {"input":"1\\n","output":"1\\n"}\n')
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--untrusted-code"),
        (["--untrusted-code", "--rounds", "x"], "is not FIRST:LAST"),
    ],
)
def test_it_does_not_start_by_accident(run, tmp_path, words, said):
    told = call(run, "out", *words, cwd=tmp_path)
    assert told.returncode == 2 and said in told.stderr and not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(run, tmp_path):
    told = call(run, run, "--untrusted-code", cwd=tmp_path)
    assert told.returncode == 2 and "exists" in told.stderr and (run / "metrics.jsonl").exists()
