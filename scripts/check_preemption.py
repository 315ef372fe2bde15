#!/usr/bin/env python3
"""Whether a run that is preempted again and again is the run that nobody disturbed.

    python scripts/check_preemption.py --signals 10 --seed 0

Plays a run of the embedded tiny model twice on this machine's CPU. The second one is sent SIGTERM at random moments of
its life, among them while it starts, compiles, writes a checkpoint and ends, and goes on each time. Every signal has to
leave its last finished round saved; in the end its metrics, records, evaluations and weights have to be those of the
first, but for times. Some minutes on two cores. Prints one JSON object; status 1 where something is lost or differs.
"""

import argparse
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

ROUNDS, EVERY = 18, 3
SETTINGS = [
    f"run.rounds={ROUNDS}", f"checkpoint.every={EVERY}", "proposer.max_new_tokens=16", "proposer.max_tries=1",
    "evaluator.model=tiny/judge", 'tasks.sources=["builtin@tiny_train"]', 'tasks.held_out=["builtin@tiny_held_out"]',
    "sampling.max_new_tokens=40", "sampling.max_sequences=8", "round.group_size=4", "optimizer.learning_rate=1e-3",
    "reward.format=0.5", "grpo.drop_zero_advantage=false", "grpo.updates=2", "eval.k=2", "eval.max_tasks=4",
]  # fmt: skip
TIMES = ("seconds", "seconds_by_phase", "tokens_per_second")
MOMENTS = ("playing", "starting", "compiling", "saving")  # in turn, shuffled; the last signal comes at the end
EVALUATING = "evaluating"  # what a run says once it has started
PREEMPTED, STOPPED = 143, -signal.SIGTERM  # saved; and stopped where there was nothing to save
DEADLINE_SECONDS = 600


class Run:
    """A process that begins or goes on with the run in `out`."""

    def __init__(self, out: pathlib.Path, cache: str):
        self.out, self.begun = out, time.monotonic()
        words = [str(out.with_suffix(".toml")), *SETTINGS, f"run.compile_cache={cache}", "--out", str(out)]
        words += ["--resume"] if (out / "config.toml").exists() else []
        command = [sys.executable, "-c", "from cz_jax.cli.main import program; program()", "train", *words]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._log = out.with_suffix(".log")
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def until(self, true: Callable[[], bool]) -> None:
        """Waits until it is so, or the process has ended."""
        end = time.monotonic() + DEADLINE_SECONDS
        while self.process.poll() is None and not true():
            if time.monotonic() > end:
                sys.exit(f"nothing happened in {DEADLINE_SECONDS} s; the run said:\n{self.said}")
            time.sleep(0.01)

    def ended(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)


def lines(out: pathlib.Path) -> list[bytes]:
    path = out / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def saved(out: pathlib.Path) -> int:
    """The round of the newest whole checkpoint; 0 where there is none."""
    return max([int(p.parent.name) for p in out.glob("checkpoints/*/manifest.json")], default=0)


def is_saving(out: pathlib.Path) -> bool:
    steps = [p for p in out.glob("checkpoints/*") if p.name.isdigit()]
    return any(not (p / "manifest.json").exists() for p in steps)


class Times(NamedTuple):
    """Seconds that the undisturbed run took, compiling everything anew."""

    start: float  # until it began to evaluate
    compiling: float  # from there to the end of its first round
    round: float  # each round after that


def wait_for(moment: str, run: Run, chance: random.Random, times: Times) -> None:
    """Returns at a random moment of that kind, or when the run has ended."""
    played = len(lines(run.out))
    after = chance.random()
    if moment in ("starting", "compiling"):
        begin, lasts = (0.0, times.start) if moment == "starting" else (times.start, times.compiling)
        until = run.begun + begin + after * lasts
        return run.until(lambda: time.monotonic() >= until)
    if moment == "saving":
        run.until(lambda: len(lines(run.out)) > played and is_saving(run.out))
        after *= 0.3
    elif moment == "playing":
        target = played + chance.choice((1, 2))
        run.until(lambda: len(lines(run.out)) >= target)
        after *= 2 * times.round
    else:
        run.until(lambda: len(lines(run.out)) == ROUNDS)
        after *= 0.5  # the evaluation, summary, export and report that are left take a second or more
    until = time.monotonic() + after
    run.until(lambda: time.monotonic() >= until)


def preempt(moment: str, run: Run, chance: random.Random, times: Times) -> dict:
    """One SIGTERM, and what became of the run."""
    wait_for(moment, run, chance, times)
    before, sent = len(lines(run.out)), time.monotonic()
    if run.process.poll() is not None:
        sys.exit(f"the run ended with {run.ended()} before its signal; it said:\n{run.said}")
    run.process.send_signal(signal.SIGTERM)
    status = run.ended()
    played, whole = len(lines(run.out)), saved(run.out)
    lost = not before <= played == whole or status not in (PREEMPTED, STOPPED) or "Traceback" in run.said
    if lost:
        print(run.said, file=sys.stderr)
    return {
        "moment": moment, "after_seconds": round(sent - run.begun, 2), "round": before, "saved": whole,
        "status": status, "seconds_to_end": round(time.monotonic() - sent, 2), "lost": lost,
    }  # fmt: skip


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def result(out: pathlib.Path) -> dict[str, object]:
    """What a run leaves, by the name of its part, but for times."""
    parts = {f"metrics of round {n}": json.loads(line) for n, line in enumerate(lines(out), 1)}
    for path in sorted(out.glob("rounds/*.json.gz")):
        parts[f"record {path.name}"] = {k: v for k, v in json.loads(gzip.decompress(path.read_bytes())).items()
                                        if k != "config_digest"}  # fmt: skip
    parts["evaluations"] = json.loads((out / "evaluations.json").read_bytes())
    parts["weights"] = json.loads((out / "summary.json").read_bytes())["policy_digest"]
    return without_times(parts)


def differences(a: dict, b: dict) -> list[str]:
    return [name for name in sorted(a.keys() | b.keys()) if name not in a or name not in b or a[name] != b[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(asked.signals - 1)]
    chance.shuffle(moments)
    with tempfile.TemporaryDirectory() as folder:
        whole, out = (pathlib.Path(folder, name) for name in ("whole", "preempted"))
        for path in (whole, out):
            path.with_suffix(".toml").write_text("[mesh]\nfsdp = -1\n")
        first = Run(whole, "off")
        first.until(lambda: f"\n{EVALUATING}" in first.said)
        evaluates = time.monotonic()
        first.until(lambda: len(lines(whole)) > 0)
        learned = time.monotonic()
        first.until(lambda: len(lines(whole)) == ROUNDS)
        each = (time.monotonic() - learned) / (ROUNDS - 1)
        times = Times(evaluates - first.begun, learned - evaluates, each)
        if first.ended():
            sys.exit(f"the undisturbed run failed:\n{first.said}")
        signals = []
        for moment in [*moments, "ending"]:
            cache = "off" if moment == "compiling" else f"{folder}/cache"
            signals.append(preempt(moment, Run(out, cache), chance, times))
            print(json.dumps(signals[-1]), file=sys.stderr, flush=True)
        last = Run(out, f"{folder}/cache")
        if last.ended():
            sys.exit(f"the preempted run did not go on:\n{last.said}")
        differ = differences(result(whole), result(out))
    lost = sum(s["lost"] for s in signals)
    print(json.dumps({"signals": signals, "rounds": ROUNDS, "lost": lost, "differ": differ}))
    return int(bool(lost or differ))


if __name__ == "__main__":
    sys.exit(main())
