"""Does sharing help? Four nodes of the embedded tiny model at 8/0, 6/2, 4/4 and 2/6 own/external groups a round.

    python scripts/study_sharing.py --out runs/sharing
    python scripts/study_sharing.py --out runs/sharing --settings 8/0 4/4 --seeds 0      # a piece of it
    python scripts/study_sharing.py --out runs/sharing --settings                        # the table of what is there

Each (setting, seed) is a run of its own: four nodes, a relay, OUT/run-I-J-seed-S.json when it is whole. A run whose
file is there is not played again, so the study can be stopped and gone on with between runs. After each, OUT/study.md
and OUT/study.json hold the table of all that are there.

What the settings share: the model, the judge, the tasks, a node's seed (so 8/0 and 4/4 begin with the same policy and
the same order of tasks), and I + J = 8 groups of 8 answers for each update. What they do not: an external group costs
no sampling, so the rounds of 2/6 are shorter than those of 8/0, and up to 3 J groups are judged to choose J from. With
four nodes there are 3 I groups of peers to choose from each round: 18 for J = 2, 12 for J = 4, and no more than J = 6
at 2/6. A group whose answers all earn the same is not chosen, whereas an own one is dropped from the update and not
replaced; "groups trained" tells how many entered it. No proposer, no cap on a peer's share.

The nodes are played in turn in one process, each with its own model, key, cursor and line to the relay, which serves on
loopback in a thread. Processes would run the same rounds, but each would start, load and compile anew and they would
wait for the same two cores; in turn they also stay in step whatever their speed, and a node is offered a peer's group
at most once: of this round from those before it, of the last from those after it. A turn ends when the relay has
acknowledged its groups, and a relay that does not ends the run: no node may train alone unseen.

Cumulative reward: the sum over rounds of the mean reward of a node's own answers. Intervals: 95%, percentile bootstrap
over seeds x nodes, for the ratio over pairs with the same seed and node. The nodes of one swarm learn from each other
and are not independent, so the intervals of J > 0 are rather too narrow; "by seed" shows the swarms themselves. SAPO's
figures (arXiv 2509.08721) are of 8 nodes of Qwen2.5-0.5B over 2,000 rounds: compare the ratios, not the sums.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import fmean

import numpy as np

from cz_jax.config import Config, from_dict
from cz_jax.errors import ConfigError, RunStopped, UserError
from cz_jax.files import local_folder, write_atomic
from cz_jax.local_swarm import DEMO, quiet
from cz_jax.metrics import BOOTSTRAP_SEED, resampled_means
from cz_jax.nouns import digest

NODES, GROUPS = 4, 8
SAPO = {"8/0": 561.8, "6/2": 854.4, "4/4": 1093.3, "2/6": 945.9}  # cumulative reward by own/external groups
ALONE = "8/0"
ROUNDS, SEEDS = 60, (0, 1, 2)
LAST = 10  # rounds that "last" is the mean of
EVAL_K, EVAL_TASKS = 4, 40
ACKNOWLEDGED_SECONDS = 30.0
SAY_EVERY = 5  # rounds


def node_config(setting: str, seed: int, place: int, rounds: int, relay: str = "") -> Config:
    """The configuration of node `place` (1, 2, ...) of a swarm with `setting` own/external groups a round."""
    own, external = map(int, setting.split("/"))
    return from_dict(
        {k: DEMO[k] for k in ("solver", "evaluator", "tasks", "sampling", "optimizer")}
        | {
            "run": {"rounds": rounds, "seed": 1000 * seed + place},
            "proposer": {"model": "none"},
            "round": {"dataset_tasks": own, "proposed_tasks": 0, "external_groups": external, "group_size": 8},
            "eval": {"k": EVAL_K, "max_tasks": EVAL_TASKS},
            "swarm": {"relay": relay, "run": "study", "per_peer": GROUPS},
        }
    )


def configs_digest(setting: str, seed: int, rounds: int) -> str:
    """Of all that a run is determined by, but for the relay's address."""
    return digest([node_config(setting, seed, place, rounds).digest for place in range(1, NODES + 1)])


def play(setting: str, seed: int, rounds: int, tell: Callable[[int, float], None]) -> dict:
    """One run: its result as OUT/run-*.json holds it. `tell(round, mean reward)` after each round of all nodes."""
    from cz_jax.build.node import build
    from cz_jax.swarm.relay import RelayOptions, RelayThread

    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        relay = stack.enter_context(RelayThread(RelayOptions("127.0.0.1:0", folder / "relay")))
        nodes = []
        for place in range(1, NODES + 1):
            config = node_config(setting, seed, place, rounds, relay.address)
            nodes.append(stack.enter_context(contextlib.closing(build(config, _say_for(place)))))
        result = {
            "setting": setting,
            "seed": seed,
            "rounds": rounds,
            "configs": configs_digest(setting, seed, rounds),
            "nodes": _play_nodes(nodes, rounds, tell),
        }
    return result | {"seconds": round(time.perf_counter() - begun, 1)}


def _play_nodes(nodes: list, rounds: int, tell: Callable[[int, float], None]) -> list[dict]:
    from cz_jax.difficulty import LevelState
    from cz_jax.loop import Position, play_round

    _tell("the nodes answer held-out tasks, before")
    before = [_held_out(built) for built in nodes]
    positions = [Position(0, LevelState(built.node.config.level.start)) for built in nodes]
    metrics = [[] for _ in nodes]
    for number in range(1, rounds + 1):
        for i, built in enumerate(nodes):
            played, positions[i] = play_round(built.node, positions[i], _say_for(i + 1))
            metrics[i].append(played.metrics)
            _wait_until_shared(built.link)
        tell(number, fmean(row[-1]["reward"] for row in metrics))
    _tell("the nodes answer held-out tasks, after")
    after = [_held_out(built) for built in nodes]
    return [
        {
            "rewards": [m["reward"] for m in row],
            "trained": fmean(m.get("groups_trained", 0) for m in row),
            "external": fmean(m["groups_external_used"] for m in row),
            "seconds_a_round": fmean(m["seconds"] for m in row),
            "average_at_k_before": was,
            "average_at_k_after": now,
        }
        for row, was, now in zip(metrics, before, after, strict=True)
    ]


def _held_out(built) -> float:
    from cz_jax.evaluate import evaluate

    c = built.node.config
    told = evaluate(built.solver, built.evaluator, built.held_out, c.eval.k, c.evaluator.max_failed_share, quiet)
    return told["average_at_k"]["value"]


def _wait_until_shared(link) -> None:
    until = time.monotonic() + ACKNOWLEDGED_SECONDS
    while link.kept and not link.down and time.monotonic() < until:
        time.sleep(0.01)
    if link.kept or link.down:
        waited = "is down" if link.down else f"did not answer within {ACKNOWLEDGED_SECONDS:g} s"
        raise RunStopped(f"the relay {waited}: {link.kept} groups are not shared", "", "play the run again")


def _say_for(place: int) -> Callable:
    def say(event: str, **fields) -> None:
        if event == "note" and not fields["text"].startswith("peer "):
            _tell(f"node {place}: {fields['text']}")

    return say


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Lines on stderr: where the study stands and how long the rest will take by the rounds played so far."""

    def __init__(self, runs: int, rounds: int):
        self._runs, self._rounds = runs, rounds
        self._begun, self._done = time.perf_counter(), 0

    def of(self, run: int, setting: str, seed: int) -> Callable[[int, float], None]:
        def tell(number: int, reward: float) -> None:
            self._done += 1
            each = (time.perf_counter() - self._begun) / self._done
            left, all_left = self._rounds - number, self._runs * self._rounds - self._done
            if number == 1 or number % SAY_EVERY == 0 or not left:
                _tell(
                    f"run {run} of {self._runs} ({setting}, seed {seed}): round {number} of {self._rounds}, reward "
                    f"{reward:.3f}; this run about {each * left / 60:.0f} min more, all {each * all_left / 60:.0f} min"
                )

        return tell


def result_path(out: pathlib.Path, setting: str, seed: int) -> pathlib.Path:
    return out / f"run-{setting.replace('/', '-')}-seed-{seed}.json"


def read_results(out: pathlib.Path, rounds: int) -> list[dict]:
    """All whole runs in `out`. ConfigError for one that was played otherwise, which no table may mix in."""
    results = [json.loads(path.read_bytes()) for path in sorted(out.glob("run-*-seed-*.json"))]
    for r in results:
        if r["configs"] != configs_digest(r["setting"], r["seed"], rounds):
            raise ConfigError(
                f"{result_path(out, r['setting'], r['seed'])} was played with {r['rounds']} rounds or other settings "
                f"than now, with {rounds}", "the runs of a study are alike", "another folder: --out DIR",
            )  # fmt: skip
    return results


def interval(values, over=None) -> dict[str, float]:
    """{"value", "low", "high"}: the mean of `values`, or its ratio to the mean of `over`, drawn in pairs with it."""
    values_N = np.asarray(values, np.float64)
    over_N = np.ones_like(values_N) if over is None else np.asarray(over, np.float64)
    means_R, over_R = (resampled_means(x, BOOTSTRAP_SEED) for x in (values_N, over_N))  # one seed: the same draws
    low, high = np.quantile(means_R / over_R, [0.025, 0.975])
    return {"value": float(values_N.mean() / over_N.mean()), "low": float(low), "high": float(high)}


def summarise(results: list[dict]) -> list[dict]:
    """A row a setting that has runs, in SAPO's order."""
    sums = {(r["setting"], r["seed"], i): sum(n["rewards"]) for r in results for i, n in enumerate(r["nodes"])}
    rows = []
    for setting, theirs in SAPO.items():
        runs = sorted((r for r in results if r["setting"] == setting), key=lambda r: r["seed"])
        if not runs:
            continue
        nodes = [n for r in runs for n in r["nodes"]]
        same = {key: (ALONE, *key[1:]) for key in sums if key[0] == setting}  # seed and node
        pairs = [(sums[key], sums[alone]) for key, alone in same.items() if alone in sums]
        rows.append(
            {
                "setting": setting,
                "seeds": [r["seed"] for r in runs],
                "cumulative": interval([sum(n["rewards"]) for n in nodes]),
                "ratio": interval(*zip(*pairs, strict=True)) if pairs else None,
                "cumulative_by_seed": [fmean(sum(n["rewards"]) for n in r["nodes"]) for r in runs],
                "last": interval([fmean(n["rewards"][-LAST:]) for n in nodes]),
                "trained": fmean(n["trained"] for n in nodes),
                "external": fmean(n["external"] for n in nodes),
                "seconds_a_round": fmean(n["seconds_a_round"] for n in nodes),
                "average_at_k_before": interval([n["average_at_k_before"] for n in nodes]),
                "average_at_k_after": interval([n["average_at_k_after"] for n in nodes]),
                "sapo": {"cumulative": theirs, "ratio": theirs / SAPO[ALONE]},
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""

    def spread(e: dict | None, digits: int) -> str:
        return "-" if e is None else f"{e['value']:.{digits}f} ({e['low']:.{digits}f} to {e['high']:.{digits}f})"

    heads = [
        "own/external", "seeds", "cumulative reward", "x 8/0", "by seed", f"reward, last {LAST} rounds",
        "groups trained a round", "external", "s a node's round", f"held-out average@{EVAL_K} before", "after",
        "SAPO: cumulative", "SAPO: x 8/0",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for r in rows:
        lines.append(
            [
                r["setting"],
                str(len(r["seeds"])),
                spread(r["cumulative"], 2),
                spread(r["ratio"] if r["setting"] != ALONE else {"value": 1.0, "low": 1.0, "high": 1.0}, 3),
                " / ".join(f"{v:.2f}" for v in r["cumulative_by_seed"]),
                spread(r["last"], 3),
                f"{r['trained']:.2f}",
                f"{r['external']:.2f}",
                f"{r['seconds_a_round']:.2f}",
                spread(r["average_at_k_before"], 3),
                spread(r["average_at_k_after"], 3),
                f"{r['sapo']['cumulative']:.1f}",
                f"{r['sapo']['ratio']:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def write_table(out: pathlib.Path, rounds: int) -> str:
    rows = summarise(read_results(out, rounds))
    text = table(rows)
    study = {"rounds": rounds, "nodes": NODES, "groups_a_round": GROUPS, "settings": rows}
    write_atomic(out / "study.json", (json.dumps(study, indent=2) + "\n").encode("ascii"))
    write_atomic(out / "study.md", text.encode("ascii"))
    return text


def study(out: pathlib.Path, rounds: int, settings: list[str], seeds: list[int]) -> str:
    """Plays what `out` lacks, one seed of all settings before the next, and returns the table of all that is there."""
    out.mkdir(parents=True, exist_ok=True)
    read_results(out, rounds)  # what does not fit together is told before the first run, not after it
    runs = [(s, seed) for seed in seeds for s in settings if not result_path(out, s, seed).exists()]
    progress = Progress(len(runs), rounds)
    for i, (setting, seed) in enumerate(runs, 1):
        result = play(setting, seed, rounds, progress.of(i, setting, seed))
        write_atomic(result_path(out, setting, seed), (json.dumps(result) + "\n").encode("ascii"))
        write_table(out, rounds)
    return write_table(out, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_folder, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alike for all runs of a folder")
    parser.add_argument("--settings", nargs="*", choices=list(SAPO), default=list(SAPO))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    given = parser.parse_args()
    try:
        print(study(given.out, given.rounds, given.settings, given.seeds), end="")
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
