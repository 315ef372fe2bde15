"""Writes a run's answers, with their tests behind them, as files for somebody who wants to know what is really right.

    python scripts/write_answers.py RUN OUT --untrusted-code [--rounds FIRST:LAST]

Nothing is executed here or anywhere in cz_jax. Each answer becomes OUT/round-000001/TASK/answer-0.py: what the
evaluator said, as a comment, then the code, then the task's tests. OUT/answers.jsonl has a line for each answer: task,
verdict, probability, reward. The code was written by language models, those of peers among them: execute it, if at all,
on a machine that holds nothing of value and has no network. The flag says that you know.
"""

import argparse
import json
import pathlib
import sys

from cz_jax.errors import UserError
from cz_jax.ledger import RunLedger
from cz_jax.nouns import Group, Reward, Task, Verdict
from cz_jax.text.answers import extract_code

ID_CHARACTERS = 12  # of a task's id in a folder's name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument(
        "--untrusted-code", action="store_true", help="you know that what is written must not be trusted"
    )
    parser.add_argument("--rounds", default=":", metavar="FIRST:LAST", help="default: all")
    a = parser.parse_args()
    if not a.untrusted_code:
        print(
            "these files hold code that models and peers wrote; where you know what that means: --untrusted-code",
            file=sys.stderr,
        )
        return 2
    try:
        first, _, last = a.rounds.partition(":")
        wanted = range(int(first or 1), int(last or 1 << 60) + 1)
    except ValueError:
        parser.error(f"--rounds {a.rounds} is not FIRST:LAST")
    try:
        print(f"{write_answers(a.run, a.out, wanted)} answers in {a.out}")
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


def write_answers(run: pathlib.Path, out: pathlib.Path, rounds: range) -> int:
    """How many answers of the run folder's `rounds` were written. UserError: no run to read, or OUT exists."""
    if out.exists():
        raise UserError(f"{out} exists", "", "a new folder")
    ledger, count = RunLedger(run), 0
    numbers = [line["round"] for line in ledger.rounds() if line["round"] in rounds]
    out.mkdir(parents=True)
    with (out / "answers.jsonl").open("w", encoding="utf-8") as index:
        for number in numbers:
            record = ledger.read_round(number)
            for at, (group, verdicts, rewards) in enumerate(
                zip(record.groups, record.verdicts, record.rewards, strict=True)
            ):
                folder = out / f"round-{number:06d}" / f"{at}-{group.task.id[:ID_CHARACTERS]}"
                for line in write_group(folder, group, verdicts, rewards):
                    index.write(json.dumps({"round": number} | line) + "\n")
                    count += 1
    return count


def write_group(folder: pathlib.Path, group: Group, verdicts: tuple[Verdict, ...], rewards: tuple[Reward, ...] | None):
    """Writes a group's answers and yields a line about each. Answers without exactly one python fence have no file."""
    folder.mkdir(parents=True)
    for i, (rollout, verdict) in enumerate(zip(group.rollouts, verdicts, strict=True)):
        code, file = extract_code(rollout.text).code, None
        if code is not None:
            file = folder / f"answer-{i}.py"
            file.write_text(source(group.task, code, verdict), "utf-8", errors="backslashreplace")
        yield {
            "task": group.task.id, "peer": group.peer, "file": file and str(file), "outcome": str(verdict.outcome),
            "probability": verdict.probability, "reward": rewards[i].total if rewards is not None else None,
        }  # fmt: skip


def source(task: Task, code: str, verdict: Verdict) -> str:
    """The text of one file. A program that reads stdin gets its inputs and outputs as comments, not as asserts."""
    said = f"{verdict.outcome}" + (f", P = {verdict.probability:.3f}" if verdict.probability is not None else "")
    head = [f"The evaluator said: {said}", "", *task.question.splitlines()]
    tests = [f"# {line}" for test in task.tests for line in test.splitlines()] if task.is_program else task.tests
    return "\n".join(["# UNTRUSTED", *(f"# {line}" for line in head), "", code.rstrip(), "", *tests]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
