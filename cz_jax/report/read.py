"""A run folder as clean values: numbers are finite floats or None, whatever the files hold or lack."""

import json
import math
import pathlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cz_jax.errors import CheckpointError, one_line
from cz_jax.ledger import METRICS, SUMMARY, RunLedger
from cz_jax.nouns import Round

CONFIG, EVALUATIONS = "config.toml", "evaluations.json"
TIMELINE = "trace/timeline.json"
MAX_FILE_BYTES = 64 << 20  # of a file other than metrics.jsonl
MOST_RECORDS = 24  # whole Round records looked into
MOST_RECORD_BYTES = 8 << 20  # of them together, packed


@dataclass(frozen=True)
class Run:
    """What a run folder says. `lines`: the rounds' metrics, oldest first; `records`: some whole rounds, evenly spread,
    the first and the last among them; `notes`: what could not be read."""

    name: str
    lines: tuple[dict, ...] = ()
    records: tuple[Round, ...] = ()
    summary: dict = field(default_factory=dict)
    evaluations: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    timeline: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(line["round"] for line in self.lines)

    def series(self, *path: str) -> list[float | None]:
        """The metric at `path` of every round."""
        return [finite(at(line, *path)) for line in self.lines]

    def parts(self, *path: str) -> list[str]:
        """The keys under `path` that hold a number in any round, those that sum up to most first."""
        sums: dict[str, float] = {}
        for line in self.lines:
            held = at(line, *path) if path else line
            for key, value in held.items() if isinstance(held, dict) else ():
                if finite(value) is not None:
                    sums[key] = sums.get(key, 0.0) + abs(finite(value))
        return sorted(sums, key=lambda key: (-sums[key], key))

    def setting(self, section: str, key: str):
        return at(self.config, section, key)


def at(value, *path: str):
    """What stands at `path` in nested dicts, None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def listed(value, *path: str) -> list:
    """The list at `path` in nested dicts, an empty one where there is none."""
    found = at(value, *path)
    return found if isinstance(found, list) else []


def finite(value) -> float | None:
    """`value` as a float where it is a number that charts can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e100 < value < 1e100:
        return None
    return float(value) if math.isfinite(value) else None


def mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return math.fsum(there) / len(there) if there else None


def read_run(folder: pathlib.Path) -> Run:
    """The run in `folder`; files that are missing are left out, damaged ones are noted. CheckpointError where there is
    no run at all."""
    folder = pathlib.Path(folder)
    if not any((folder / name).exists() for name in (METRICS, CONFIG, SUMMARY)):
        raise CheckpointError(
            f"{folder} holds no run", f"it has neither {CONFIG} nor {METRICS}", "name the --out folder of a run"
        )
    notes: list[str] = []
    lines = _lines(folder / METRICS, notes)
    return Run(
        name=folder.resolve().name or "run",
        lines=lines,
        records=_records(folder, [line["round"] for line in lines], notes),
        summary=_json(folder / SUMMARY, notes),
        evaluations=_json(folder / EVALUATIONS, notes),
        config=_parsed(folder / CONFIG, lambda data: tomllib.loads(data.decode("utf-8")), notes),
        timeline=_json(folder / TIMELINE, notes),
        notes=tuple(notes),
    )


def _lines(path: pathlib.Path, notes: list[str]) -> tuple[dict, ...]:
    """The lines of metrics.jsonl whose rounds rise. Unlike a resumed run, a report goes on after a damaged one."""
    lines, bad = [], 0
    try:
        with open(path, "rb") as f:
            for data in f:
                try:
                    line = json.loads(data)
                except (ValueError, RecursionError):
                    bad += 1
                    continue
                number = at(line, "round")
                if type(number) is int and 0 <= number < 1 << 53 and (not lines or number > lines[-1]["round"]):
                    lines.append(line)
                else:
                    bad += 1
    except FileNotFoundError:
        pass
    except OSError as e:
        notes.append(f"{METRICS} cannot be read: {e.strerror or e}")
    if bad:
        notes.append(f"{METRICS}: {bad} lines are damaged and left out")
    return tuple(lines)


def _records(folder: pathlib.Path, numbers: Sequence[int], notes: list[str]) -> tuple[Round, ...]:
    ledger, found, bad, budget = RunLedger(folder), {}, [], MOST_RECORD_BYTES
    for number in spread(numbers, MOST_RECORDS):
        path = ledger.rounds_path / f"{number:06d}.json.gz"
        size = path.stat().st_size if path.is_file() else 0
        if size > budget and found:
            continue
        try:
            round_ = ledger.read_round(number)
        except CheckpointError as e:
            bad.append(str(e))
            continue
        if sound(round_):
            found[number] = round_
            budget -= size
        else:
            bad.append(f"{path.name} holds values of other types")
    if bad:
        notes.append(one_line(f"{len(bad)} round records cannot be read, the first: {bad[0]}", 300))
    return tuple(found[number] for number in sorted(found))


def sound(round_: Round) -> bool:
    """Whether what a report shows of a record has the types it should have; `from_json` looks at names alone."""
    if not all(isinstance(reward.parts, dict) for row in round_.rewards for reward in row or ()):
        return False
    texts = [round_.policy_before, round_.policy_after, round_.config_digest]
    numbers: list = []
    for group in round_.groups:
        task = group.task
        texts += [task.question, task.source, *task.tests, task.entry_point or "", group.peer, group.policy]
        texts += [rollout.text for rollout in group.rollouts]
    for row in (row for row in round_.rewards if row is not None):
        numbers += [value for reward in row for value in (reward.total, *reward.parts.values())]
    for verdict in (verdict for row in round_.verdicts for verdict in row):
        texts.append(verdict.detail)
        numbers.append(verdict.probability or 0.0)
    return all(isinstance(t, str) for t in texts) and all(finite(n) is not None for n in numbers)


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of `numbers`, evenly spaced; the last and the first come first, so that a budget reaches them."""
    if len(numbers) > most:
        numbers = [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]
    return [*numbers[-1:], *numbers[:1], *numbers[1:-1]] if len(numbers) > 1 else list(numbers)


def _json(path: pathlib.Path, notes: list[str]) -> dict:
    return _parsed(path, json.loads, notes)


def _parsed(path: pathlib.Path, parse, notes: list[str]) -> dict:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        value = parse(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        notes.append(one_line(f"{path.name} cannot be read: {e}", 200))
        return {}
