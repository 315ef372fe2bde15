"""A standalone proposer: invents tasks for a swarm and adapts their level to how its own evaluator sees them solved."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cz_jax.build.node import Pool, build_evaluator, build_proposer, mesh_of, prepare
from cz_jax.build.swarm import connect, usable_task
from cz_jax.config import Config
from cz_jax.difficulty import LevelState, adapt
from cz_jax.errors import CheckpointError, ConfigError, one_line
from cz_jax.files import local_folder, write_atomic
from cz_jax.loop import outcomes_at, stop_on_failures
from cz_jax.nouns import Group, Level, Task, from_json, to_json
from cz_jax.ports import Evaluator, Exchange, Proposer
from cz_jax.rewards import group_rewards
from cz_jax.swarm.client import SwarmExchange
from cz_jax.swarm.envelope import PROPOSAL, Rejected, proposal_payload
from cz_jax.tasks import held_out_keys, load_tasks

STATE = "proposer.json"
OWN_TASKS = 512  # proposals remembered: groups of other tasks say nothing about this proposer's level
GROUPS_A_TURN = 4


class Published:
    """The proposals that groups may be about, newest last."""

    def __init__(self):
        self.tasks: dict[str, Task] = {}

    def add(self, tasks) -> None:
        self.tasks |= {task.id: task for task in tasks}
        for task_id in list(self.tasks)[: max(0, len(self.tasks) - OWN_TASKS)]:
            del self.tasks[task_id]

    def admit(self, task: Task) -> Task:
        """This proposer's own copy, with the level that it proposed it at. Rejected for anybody else's task."""
        if task.id not in self.tasks:
            raise Rejected("other")
        return self.tasks[task.id]


@dataclass
class Desk:
    """A proposer at work: its parts, and where it stands.

    `exchange` offers groups about `published` tasks only; `usable` refuses tasks that may not be proposed; `send` gives
    a task to the swarm.
    """

    config: Config
    proposer: Proposer
    evaluator: Evaluator
    exchange: Exchange
    published: Published
    usable: Callable[[Task], Task]
    send: Callable[[Task], None]
    level: LevelState
    turn: int = 0

    def play_turn(self) -> dict:
        """Publishes tasks at the level, judges some of the groups that came back on earlier ones, adapts the level;
        what happened, in numbers."""
        self.turn += 1
        wanted = max(1, self.config.round.proposed_tasks)
        proposals = self.proposer.propose(Level(self.level.level), wanted, self.turn)
        tasks = [task for task in proposals.tasks if self._is_usable(task)]
        self.published.add(tasks)
        for task in tasks:
            self.send(task)
        groups = self.exchange.fetch(GROUPS_A_TURN, self.turn)
        successes = self._judge(groups)
        self.level = adapt(self.level, successes, self.config.level)
        rate = sum(successes) / len(successes) if successes else None
        return {"level": self.level.level, "proposals": len(tasks), "groups_judged": len(groups), "success": rate}

    def _is_usable(self, task: Task) -> bool:
        try:
            self.usable(task)
        except Rejected:
            return False
        return True

    def _judge(self, groups: Sequence[Group]) -> list[bool]:
        """Which answers to tasks of the present level were right, as the own evaluator sees it."""
        verdicts = self.evaluator.judge(groups, self.turn) if groups else ()
        stop_on_failures(verdicts, self.config.evaluator.max_failed_share)
        judged = [(g, v, group_rewards(g, v, self.config.reward)) for g, v in zip(groups, verdicts, strict=True)]
        return outcomes_at(self.level.level, judged)

    def state(self) -> dict:
        return {
            "turn": self.turn,
            "level": self.level.to_dict(),
            "proposer": self.proposer.state(),
            "exchange": self.exchange.state(),
            "published": [to_json(task) for task in self.published.tasks.values()],
        }

    def restore(self, state: dict) -> None:
        self.turn, self.level = int(state["turn"]), LevelState.from_dict(state["level"])
        self.proposer.restore(state["proposer"])
        self.exchange.restore(state["exchange"])
        self.published.add([from_json(Task, value) for value in state["published"]])


def propose(config: Config, out, turns: int | None = None, say: Callable = lambda event, **fields: None) -> dict:
    """Feeds the relay of `config` with tasks, one turn every swarm.propose_seconds, `turns` times (None: until it is
    interrupted), and returns the last turn's numbers. The folder `out` keeps its identity, level and memory; a proposer
    that is started there again goes on. UserError for bad input."""
    out = local_folder(out)
    if not config.swarm.relay:
        raise ConfigError(
            "swarm.relay is empty", "a proposer without a relay has nobody to propose to",
            'swarm.relay="127.0.0.1:7443"',
        )  # fmt: skip
    if config.proposer.model in (None, "none"):
        raise ConfigError("proposer.model is none", "somebody has to invent the tasks", 'proposer.model="tiny"')
    saved = _read_state(out / STATE)
    prepare(config.run)
    mesh = mesh_of(config)
    pool = Pool(mesh, config.run.attention, say)
    proposer, evaluator = build_proposer(config, pool, mesh), build_evaluator(config, pool, mesh)
    held_out = held_out_keys([t for spec in config.tasks.held_out for t in load_tasks(spec).tasks])
    published = Published()
    out.mkdir(parents=True, exist_ok=True)
    link = connect(config, out, say)
    with contextlib.closing(link):
        desk = Desk(
            config,
            proposer,
            evaluator,
            SwarmExchange(link, config.swarm, config.round.group_size, config.run.seed, published.admit, say),
            published,
            usable_task(held_out, lambda task: True),
            lambda task: link.send(PROPOSAL, proposal_payload(task)),
            LevelState(config.level.start),
        )
        if saved is not None:
            desk.restore(saved)
        return _serve(desk, out, turns, say)


def _read_state(path: pathlib.Path) -> dict | None:
    """What a proposer kept; None where none was here. CheckpointError for what is not whole."""
    try:
        state = json.loads(path.read_bytes())
        LevelState.from_dict(state["level"])
        for value in state["published"]:
            from_json(Task, value)
        if not (isinstance(state["turn"], int) and isinstance(state["proposer"], dict)) or "exchange" not in state:
            raise ValueError("a key of another type")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(
            f"{path} cannot be read: {one_line(repr(e), 120)}", "a damaged file", f"rm {path}"
        ) from None
    return state


def _serve(desk: Desk, out: pathlib.Path, turns: int | None, say: Callable) -> dict:
    """Plays turns at their pace, each kept before the next begins."""
    path = out / STATE
    done, told = 0, {"level": desk.level.level}
    while turns is None or done < turns:
        begun = time.monotonic()
        say("phase", name="proposing")
        told = desk.play_turn()
        write_atomic(path, json.dumps(desk.state()).encode("ascii"))
        say("round", number=desk.turn, of=turns, metrics={k: v for k, v in told.items() if v is not None})
        done += 1
        if turns is None or done < turns:
            say("phase", name="waiting for the next turn", expected=desk.config.swarm.propose_seconds)
            time.sleep(max(0.0, begun + desk.config.swarm.propose_seconds - time.monotonic()))
    return {"turns": desk.turn} | told
