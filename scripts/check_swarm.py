"""A swarm as people run it, each process killed with SIGKILL in turn and started again: what the others notice.

    python scripts/check_swarm.py --rounds 50

A relay, two `cz-jax train` and one `cz-jax propose` on this machine, the embedded tiny models, no other link between
them than the relay. Killed one after the other: the proposer, a node, the relay, the other node; a node comes back with
`--resume`. Prints one JSON object; exit status 1 where a process that was not killed ended or played no round while
another was away, a node did not train on its peer's groups again, a ledger has a gap, or no level moved.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from cz_jax.config import to_toml
from cz_jax.local_swarm import node_config

PROGRAM = [sys.executable, "-c", "from cz_jax.cli.main import program; program()"]
NODES = ("node-1", "node-2")
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
SETTINGS = ("checkpoint.every=2", "eval.before_and_after=false", "swarm.fetch_seconds=1.0")
AWAY_ROUNDS = 2  # that the others play while one is away
PATIENCE_SECONDS = 240.0


class Swarm:
    """The processes of the swarm in `folder`, each with its log there."""

    def __init__(self, folder: pathlib.Path, rounds: int):
        self.folder, self.processes = folder, {}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            relay = f"127.0.0.1:{s.getsockname()[1]}"
        self.words = {"relay": ["relay", "--listen", relay, "--data", str(folder / "relay")]}
        for place, name in enumerate(("proposer", *NODES)):
            path, verb = folder / f"{name}.toml", "train" if place else "propose"
            path.write_text(to_toml(node_config({"rounds": rounds, "seed": 0}, place, relay)))
            self.words[name] = [verb, str(path), *SETTINGS, "--out", str(folder / name)]

    def start(self, name: str, *more: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.processes[name] = subprocess.Popen([*PROGRAM, *self.words[name], *more], env=ENVIRONMENT, **quiet)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def rounds(self, node: str) -> list[dict]:
        path = self.folder / node / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def shares_again(self, node: str, after: int) -> bool:
        """Whether the node has played three rounds more than `after` and trained on a group of its peer in one."""
        more = self.rounds(node)[after:]
        return len(more) >= 3 and any(r["groups_external"] for r in more)

    def wait(self, what: str, done, away: str = "") -> None:
        """Until `done()`; every process but `away` has to stay, or have ended well."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not done():
            ended = {n: p.poll() for n, p in self.processes.items() if n != away and p.poll() not in (None, 0)}
            if ended or time.monotonic() > until:
                sys.exit(
                    f"{what}: {f'ended: {ended}' if ended else f'not within {PATIENCE_SECONDS:g} s'}; {self.folder}"
                )
            time.sleep(0.2)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def check(folder: pathlib.Path, rounds: int) -> dict:
    swarm, result = Swarm(folder, rounds), {"rounds": rounds, "killed": {}}
    try:
        swarm.start("relay")
        for name in ("proposer", *NODES):
            swarm.start(name)
        swarm.wait("the first rounds", lambda: all(len(swarm.rounds(n)) >= 3 for n in NODES))
        for victim in ("proposer", "node-2", "relay", "node-1"):
            tell(f"killing {victim}")
            swarm.kill(victim)
            others = [n for n in NODES if n != victim]
            seen = {n: len(swarm.rounds(n)) for n in others}
            swarm.wait(
                f"{victim} is away",
                lambda: all(len(swarm.rounds(n)) >= min(seen[n] + AWAY_ROUNDS, rounds) for n in others),  # noqa: B023
                victim,
            )
            begun, before = time.monotonic(), {n: len(swarm.rounds(n)) for n in NODES}
            swarm.start(victim, *(["--resume"] if victim in NODES else []))
            swarm.wait(f"after {victim}'s return", lambda: all(swarm.shares_again(n, before[n]) for n in NODES))  # noqa: B023
            result["killed"][victim] = {
                "at_round": before,
                "seconds_until_all_share_again": round(time.monotonic() - begun, 1),
                "rounds_until_then": {n: len(swarm.rounds(n)) - before[n] for n in NODES},
            }
        tell("playing the rest")
        swarm.wait("the end", lambda: all(swarm.processes[n].poll() == 0 for n in NODES))
    finally:
        swarm.end()
    lines = {n: swarm.rounds(n) for n in NODES}
    result["levels"] = {n: [r["level"] for r in rows] for n, rows in lines.items()}
    result["external_groups"] = {n: sum(r["groups_external"] for r in rows) for n, rows in lines.items()}
    result["proposals_used"] = {n: sum(r["proposals"]["valid"] for r in rows) for n, rows in lines.items()}
    result["whole"] = all([r["round"] for r in rows] == list(range(1, rounds + 1)) for rows in lines.values())
    proposer = json.loads((folder / "proposer/proposer.json").read_bytes())
    result["proposer"] = {"turns": proposer["turn"], "level": proposer["level"]["level"]}
    moved = any(len(set(levels)) > 1 for levels in result["levels"].values())
    used = [*result["external_groups"].values(), *result["proposals_used"].values()]
    result["ok"] = result["whole"] and moved and all(used)
    return result


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=pathlib.Path, help="keeps logs and run folders; a temporary folder otherwise")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.out or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = check(folder, a.rounds)
    print(json.dumps(result))
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
