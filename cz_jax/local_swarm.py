"""A whole swarm on this machine: a relay, a proposer and solver nodes, each a process of its own.

The processes write what they do as JSON lines into logs/; this one reads them, passes them on to `say`, and puts the
nodes' summaries together. It loads neither JAX nor a model.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from statistics import fmean

from cz_jax.config import Config, from_dict
from cz_jax.errors import ConfigError, RunStopped, UserError, one_line
from cz_jax.files import is_taken, local_folder, write_atomic
from cz_jax.ledger import SUMMARY, RunLedger
from cz_jax.metrics import difference_estimate
from cz_jax.report import REPORT
from cz_jax.rewards import highest_reward

SETUP = "demo.json"  # in the swarm's folder: what was asked for
LOOK_SECONDS = 0.2
RELAY_SECONDS = 60.0  # that the relay has to begin serving
LEAVE_SECONDS = 4.5  # that processes have to save and end after an interrupt
ROUNDS, NODES = 60, 2

DEMO = {
    "solver": {"model": "tiny"},
    "evaluator": {"model": "tiny/judge", "threshold": 0.8},  # a judge in doubt is one that a solver learns to fool
    "tasks": {"sources": ["builtin@tiny_train"], "held_out": ["builtin@tiny_held_out"]},
    "round": {"dataset_tasks": 2, "proposed_tasks": 1, "external_groups": 1, "group_size": 8},
    "sampling": {"max_new_tokens": 80, "max_prompt_tokens": 224},
    "optimizer": {"learning_rate": 1e-4},
    "checkpoint": {"every": 20},
    "eval": {"k": 8, "max_tasks": 60},
    "swarm": {"propose_seconds": 2.0, "run": "demo"},
}


def quiet(event: str, **fields) -> None:
    """A progress callback that says nothing."""


def demo(
    out=None, rounds: int | None = None, nodes: int | None = None, seed: int | None = None, say: Callable = quiet
) -> dict:
    """Plays the demo in the folder `out` (None: a new one under runs/) and returns its summary.

    The folder gets node-1/, node-2/, ... (run folders), proposer/, relay/, logs/, summary.json and the report of the
    better node. On a folder with an interrupted demo it goes on with that one. UserError for bad input and for a
    process that ended; KeyboardInterrupt is passed on after every node has saved.
    """
    out = folder_for(out)
    begun, setup = time.perf_counter(), _set_up(out, rounds, nodes, seed)
    with Household(out, say) as household:
        relay = household.start("relay", _serve_relay, out / "relay")
        serving = household.wait_for(relay, "serving", RELAY_SECONDS)
        address = serving["address"]
        say("note", text=f"the relay's live page: {serving['page']} (from another machine: {serving['ssh']})")
        seats = [household.start("node-1", _train, node_config(setup, 1, address), out / "node-1")]
        # The first node compiles; the others begin when it has evaluated, and find most programs in the cache.
        household.watch(seats, [relay], until=("evaluated", "round"))
        proposer = household.start("proposer", _propose, node_config(setup, 0, address), out / "proposer")
        seats += [
            household.start(f"node-{i}", _train, node_config(setup, i, address), out / f"node-{i}")
            for i in range(2, setup["nodes"] + 1)
        ]
        household.watch(seats, [relay, proposer])
    summary = _summarise(out, setup, seats, time.perf_counter() - begun)
    say("done", summary=summary)
    return summary


def folder_for(out) -> pathlib.Path:
    """`out` as a path, or a new folder under runs/."""
    return local_folder(out) if out is not None else pathlib.Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")


def node_config(setup: dict, place: int, relay: str) -> Config:
    """The configuration of solver node `place` (1, 2, ...), or of the proposer (0)."""
    run = {"rounds": setup["rounds"], "seed": 1000 * setup["seed"] + place}
    # A node without a proposer takes its proposals from the relay; they are as long as answers are.
    proposer = {"model": "tiny", "max_new_tokens": 160} if place == 0 else {"model": "none"}
    swarm = DEMO["swarm"] | {"relay": relay}
    return from_dict(DEMO | {"run": run, "proposer": proposer, "swarm": swarm})


def _set_up(out: pathlib.Path, rounds: int | None, nodes: int | None, seed: int | None) -> dict:
    """What is played in `out`: as asked, or as the interrupted demo there was."""
    path = out / SETUP
    if (out / SUMMARY).exists():
        raise ConfigError(f"{out} holds a finished demo", "", f"another folder: cz-jax demo --out {out}-2")
    asked = {"rounds": rounds, "nodes": nodes, "seed": seed}
    if path.exists():
        setup = json.loads(path.read_bytes())
        changed = [k for k, v in asked.items() if v not in (None, setup[k])]
        if changed:
            was = ", ".join(f"--{k} {setup[k]}" for k in changed)
            raise ConfigError(f"{out} holds a demo with {was}", "it goes on as it began", f"cz-jax demo --out {out}")
        return setup
    if is_taken(out):
        raise ConfigError(f"{out} is not empty", "", f"another folder: cz-jax demo --out {out}-2")
    defaults = {"rounds": ROUNDS, "nodes": NODES, "seed": 0}
    setup = {k: defaults[k] if v is None else v for k, v in asked.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(setup).encode("ascii"))
    return setup


class Seat:
    """One process of the household and how far its log has been read."""

    def __init__(self, name: str, process, log: pathlib.Path, folder: pathlib.Path):
        self.name, self.process, self.log, self.folder = name, process, log, folder
        self._at = log.stat().st_size if log.exists() else 0
        self._rest = b""
        self.last_lines: collections.deque[str] = collections.deque(maxlen=3)

    def news(self) -> list[dict]:
        """The events that the process wrote since the last call."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(self._at)
            read = file.read()
            self._at += len(read)
            *lines, self._rest = (self._rest + read).split(b"\n")
            return [event for line in lines if (event := self._event(line)) is not None]
        return []

    def _event(self, line: bytes) -> dict | None:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                return event
        if line.strip():
            self.last_lines.append(line.decode("utf-8", "replace"))
        return None


class Household:
    """The processes of a swarm; as a context manager, none of them outlives it."""

    def __init__(self, out: pathlib.Path, say: Callable):
        self._out, self._say, self.seats = out, say, []
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self):
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind, *_):
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._say("note", text="interrupted: the nodes save ...")
        self._end([s for s in self.seats if s.name != "relay"], signal.SIGINT)
        self._end([s for s in self.seats if s.name == "relay"], signal.SIGTERM)

    def start(self, name: str, work: Callable, *args) -> Seat:
        log = self._out / "logs" / f"{name}.log"
        process = self._context.Process(target=_sit, args=(work, log, *args), name=name)
        seat = Seat(name, process, log, args[-1])
        process.start()
        self.seats.append(seat)
        return seat

    def wait_for(self, seat: Seat, event: str, seconds: float) -> dict:
        """The first `event` that the process tells of. RunStopped where it ends or takes too long."""
        self._say("phase", name=f"starting the {seat.name}", expected=3)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for news in seat.news():
                if news["event"] == event:
                    return news
            self._check(seat)
            time.sleep(LOOK_SECONDS)
        raise RunStopped(f"the {seat.name} did not begin within {seconds:g} s", "", f"see {seat.log}")

    def watch(self, seats: list[Seat], needed: list[Seat], until: tuple[str, ...] = ()) -> None:
        """Passes on what the processes say until all of `seats` are done, or one of them has told of an event of
        `until`; `needed` must not end before."""
        while True:
            working, told = [s for s in seats if s.process.is_alive()], False
            for seat in (*needed, *seats):
                for news in seat.news():
                    self._pass_on(seat, dict(news))
                    told |= seat in seats and news["event"] in until
                if seat in needed or seat not in working:
                    self._check(seat, done_is_fine=seat in seats)
            if told or not working:
                return
            time.sleep(LOOK_SECONDS)

    def _pass_on(self, seat: Seat, news: dict) -> None:
        news.pop("time", None)
        event = news.pop("event")
        if event in ("phase", "note", "round", "evaluated"):
            self._say(event, source=seat.name, **news)

    def _check(self, seat: Seat, done_is_fine: bool = False) -> None:
        status = seat.process.exitcode
        if status is None or (status == 0 and done_is_fine):
            return
        seat.news()
        said = one_line(" ".join(seat.last_lines), 300) or f"exit status {status}"
        raise RunStopped(f"{seat.name} ended: {said}", "", f"see {seat.log}")

    @staticmethod
    def _end(seats: list[Seat], number: int) -> None:
        alive = [s.process for s in seats if s.process.is_alive()]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        until = time.monotonic() + LEAVE_SECONDS
        for process in alive:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _sit(work: Callable, log: pathlib.Path, *args) -> None:
    """The life of a child process: its output goes to `log`, and it leaves when its parent does."""
    os.setsid()  # Ctrl-C is the parent's, which then tells each process once
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        work(*args)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except UserError as e:
        print(e, file=sys.stderr)
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a compiled program may still be computing in a thread, which an ordinary exit would wait for


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def _lines() -> Callable:
    from cz_jax.swarm.relay import JsonLines

    return JsonLines()


def _serve_relay(folder: pathlib.Path) -> None:
    from cz_jax.swarm.relay import RelayOptions, serve

    serve(RelayOptions("127.0.0.1:0", folder, page="127.0.0.1:0"), _lines())


def _propose(config: Config, folder: pathlib.Path) -> None:
    from cz_jax.build import propose

    propose(config, folder, say=_lines())


def _train(config: Config, folder: pathlib.Path) -> None:
    from cz_jax.build import train

    train(config, folder, resume=(folder / "config.toml").exists(), say=_lines())


def _summarise(out: pathlib.Path, setup: dict, seats: list[Seat], seconds: float) -> dict:
    """Everything that the demo's summary.json holds, from those of its nodes."""
    ledgers = {s.name: RunLedger(s.folder) for s in seats}
    by_node = {name: ledger.read_summary() for name, ledger in ledgers.items()}
    rewards = [[line.get("reward") or 0.0 for line in ledger.rounds()] for ledger in ledgers.values()]
    first = [r for row in rewards for r in row[:10]]
    last = [r for row in rewards for r in row[-10:]]
    gain = difference_estimate(first, last)
    left = highest_reward(node_config(setup, 1, "").reward) - fmean(first)
    # The better one by its training reward: chosen by the held-out score, that score would be too good.
    best = max(by_node, key=lambda name: by_node[name]["reward_mean_last10"] or 0.0)
    better, folder, judge = by_node[best], out / best, DEMO["evaluator"]["model"]
    shutil.copyfile(folder / REPORT, out / REPORT)
    alone = "'swarm.relay=\"\"'"  # its relay has ended
    summary = {
        "rounds": setup["rounds"],
        "nodes": setup["nodes"],
        "seconds": round(seconds, 3),
        "reward_mean_first10": fmean(first),
        "reward_mean_last10": fmean(last),
        "reward_gain": gain | {"share_of_what_was_left": gain["value"] / left if left > 0 else None},
        "better_node": best,
        **{k: v for k, v in better.items() if k.startswith(("avg_at_k", "pass_at_k", "solve_rate"))},
        "level_history": better["level_history"],
        "groups_shared": sum(n["groups_shared"] for n in by_node.values()),
        "groups_used_from_peers": sum(n["groups_used_from_peers"] for n in by_node.values()),
        "tokens_per_second": sum(n["tokens_per_second"] or 0.0 for n in by_node.values()),
        "by_node": {
            name: {k: n[k] for k in ("reward_mean_first10", "reward_mean_last10", "avg_at_k_before", "avg_at_k_after")}
            for name, n in by_node.items()
        },
        "export_dir": better["export_dir"],
        "report": str(out / REPORT),
        "seed": setup["seed"],
        "versions": better["versions"],
        "next": [
            f"cz-jax eval --model {folder} --evaluator {judge} --tasks builtin@tiny_held_out -k 8",
            f"cz-jax train {folder / 'config.toml'} {alone} run.rounds={2 * setup['rounds']} --out {folder} --resume",
            f"cz-jax export {folder} my-model",
        ],
    }
    RunLedger(out).write_summary(summary)
    return summary
