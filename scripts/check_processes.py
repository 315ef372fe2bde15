#!/usr/bin/env python3
"""Whether a run of several processes is the run of one, and checkpoints of each continue on the other.

    python scripts/check_processes.py --processes 4

Starts the processes on this machine's CPU, one device each, with the embedded tiny model: two to three minutes on two
cores. Prints the largest difference of each metric; status 1 where one exceeds 1e-5, or where nothing was learned.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

SETTINGS = [
    "run.rounds=4", "proposer.model=none", "sampling.max_new_tokens=16", "sampling.max_sequences=8",
    "round.group_size=4", "round.dataset_tasks=2", "grpo.drop_zero_advantage=false", "optimizer.learning_rate=1e-3",
    "reward.format=0.5", "checkpoint.every=1", "eval.before_and_after=false",
]  # fmt: skip
COMPARED = ("reward", "loss", "gradient_norm", "entropy", "completion_tokens")
TOLERANCE = 1e-5


def play(out: pathlib.Path, cache: pathlib.Path, processes: int, devices: int, *more: str) -> None:
    """A run to its end, by so many processes with so many devices each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    config = out.with_suffix(".toml")
    config.write_text("[mesh]\ndata = 2\nfsdp = -1\n")
    command = [sys.executable, "-c", "from cz_jax.cli.main import program; program()", "train", str(config), *SETTINGS]
    command += [f"run.compile_cache={cache}", "--out", str(out), *more]
    together = ["--coordinator", address, "--processes", str(processes), "--process"] if processes > 1 else []
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
    }
    running = [
        subprocess.Popen([*command, *together, *([str(i)] if together else [])], env=environment, stdout=sys.stderr)
        for i in range(processes)
    ]
    ended = [p.wait() for p in running]
    if any(ended):
        sys.exit(f"{processes} processes ended with {ended}")


def rows(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="an even number")
    n = parser.parse_args().processes
    worst = {}
    with tempfile.TemporaryDirectory() as folder:
        one, cache = pathlib.Path(folder, "one"), pathlib.Path(folder, "cache")
        play(one, cache, 1, n)
        for name, (first, second) in {"several-then-one": (n, 1), "one-then-several": (1, n)}.items():
            out = pathlib.Path(folder, name)
            play(out, cache, first, n // first, "run.rounds=2")
            play(out, cache, second, n // second, "--resume")
            for a, b in zip(rows(one), rows(out), strict=True):
                for key in COMPARED:
                    worst[key] = max(worst.get(key, 0.0), abs(a[key] - b[key]))
        learned = sum(row["gradient_norm"] > 0 for row in rows(one))
    print(json.dumps({"processes": n, "largest_difference": worst, "tolerance": TOLERANCE, "rounds_learned": learned}))
    return int(max(worst.values()) > TOLERANCE or not learned)


if __name__ == "__main__":
    sys.exit(main())
