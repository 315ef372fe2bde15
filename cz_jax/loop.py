"""The CodeZero round on one screen: propose, pick, roll out, share, judge, reward, adapt, update.

`play_round` is a function of a node and a position; `run` plays rounds and hands each on to be kept. Neither catches
anything: what goes wrong ends the run loudly, and the last checkpoint continues it.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import fmean

from cz_jax.config import Config
from cz_jax.difficulty import LevelState, adapt
from cz_jax.errors import RunStopped
from cz_jax.nouns import Group, Level, Outcome, Reward, Round, Task, Verdict
from cz_jax.ports import Evaluator, Exchange, Learner, Proposals, Proposer, Solver, TaskStream
from cz_jax.rewards import group_rewards, success
from cz_jax.rng import seed_for

Judged = tuple[Group, tuple[Verdict, ...], tuple[Reward, ...] | None]


@dataclass(frozen=True)
class Node:
    """Everything a round talks to, as ports. `fits(task)`: whether the solver's context holds the task."""

    config: Config
    proposer: Proposer | None
    tasks: TaskStream
    fits: Callable[[Task], bool]
    solver: Solver
    evaluator: Evaluator
    exchange: Exchange
    learner: Learner


@dataclass(frozen=True)
class Position:
    """Where a run stands: the last round played (0: none) and the level with the outcomes it is decided on."""

    number: int
    level: LevelState


class Clock:
    """Seconds by phase."""

    def __init__(self, say: Callable):
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def __call__(self, phase: str):
        self._say("phase", name=phase)
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def play_round(node: Node, position: Position, say: Callable) -> tuple[Round, Position]:
    """One round: its whole record, and the position after it."""
    number, level, clock = position.number + 1, position.level, Clock(say)
    before = node.learner.policy_digest()
    with clock("propose"):
        proposals, tasks = pick(node, Level(level.level), number)
    with clock("roll_out"):
        own = node.solver.roll_out(tasks, number)
    with clock("share"):
        node.exchange.publish(own)
        offered = node.exchange.fetch(node.config.round.external_groups, number)
    with clock("judge"):
        verdicts = node.evaluator.judge((*own, *offered), number)
        stop_on_failures(verdicts[: len(own)] or verdicts, node.config.evaluator.max_failed_share)
    judged = [(g, v, group_rewards(g, v, node.config.reward)) for g, v in zip((*own, *offered), verdicts, strict=True)]
    judged = judged[: len(own)] + choose(judged[len(own) :], node.config, number)
    groups, verdicts, rewards = zip(*judged, strict=True) if judged else ((), (), ())
    after = adapt(level, outcomes_at(level.level, judged[: len(own)]), node.config.level)
    with clock("update"):
        usable = [(g, [x.total for x in r], i < len(own)) for i, (g, _, r) in enumerate(judged) if r is not None]
        learned = node.learner.update(*map(list, zip(*usable, strict=True))) if usable else {}
    measured = measure(judged, len(own), proposals, clock.seconds) | learned
    shared = {"groups_external_judged": len(offered), "groups_external_used": len(judged) - len(own)}
    return Round(
        number=number,
        level_before=level.level,
        level_after=after.level,
        own=own,
        external=groups[len(own) :],
        verdicts=verdicts,
        rewards=rewards,
        trained=tuple(g.id for g, totals, _ in usable if len(set(totals)) > 1),
        policy_before=before,
        policy_after=node.learner.policy_digest(),
        config_digest=node.config.digest,
        metrics={"level": after.level} | measured | shared,
    ), Position(number, after)


def run(node: Node, position: Position, keep: Callable[[Round, Position], None], say: Callable) -> Position:
    """Plays the rounds that config.run.rounds still lacks; `keep` writes each down before the next begins."""
    last = node.config.run.rounds
    while position.number < last:
        round_, position = play_round(node, position, say)
        keep(round_, position)
        say("round", number=position.number, of=last, metrics=round_.metrics)
    return position


def pick(node: Node, level: Level, number: int) -> tuple[Proposals, tuple[Task, ...]]:
    """The round's tasks: the proposer's, then the data sets', which also stand in for proposals that did not come."""
    wanted = node.config.round.proposed_tasks if node.proposer is not None else 0
    proposals = node.proposer.propose(level, wanted, number) if wanted else Proposals((), 0, {})
    proposed = tuple(task for task in proposals.tasks if node.fits(task))
    return proposals, proposed + node.tasks.take(node.config.round.dataset_tasks + wanted - len(proposed))


def choose(offered: Sequence[Judged], config: Config, number: int) -> list[Judged]:
    """The external groups of the round, as SAPO takes them: without those whose answers all earn the same (or could not
    be judged), round.external_groups of the others, each as likely as any other."""
    telling = [(g, v, r) for g, v, r in offered if r is not None and len({x.total for x in r}) > 1]
    most = min(len(telling), config.round.external_groups)
    return Random(seed_for(config.run.seed, "choose external", number)).sample(telling, most)


def stop_on_failures(verdicts: Sequence[Sequence[Verdict]], most: float) -> None:
    """RunStopped where more than the share `most` of the verdicts are FAILED: an evaluator that is down judges
    nobody."""
    failed = [v for row in verdicts for v in row if v.outcome is Outcome.FAILED]
    share = len(failed) / max(1, sum(map(len, verdicts)))
    if share > most:
        raise RunStopped(
            f"{share:.0%} of the round's verdicts failed, evaluator.max_failed_share is {most:.0%}: {failed[0].detail}",
            "the evaluator is broken; nothing was trained on this round",
            "check evaluator.model with: cz-jax judge",
        )


def outcomes_at(level: int, judged: Sequence[Judged]) -> list[bool]:
    """Whether each readable answer to a task of this level was right. An abstention says nothing about the level."""
    return [
        success(v)
        for group, verdicts, rewards in judged
        if group.task.level == level and rewards is not None
        for v in verdicts
        if v.outcome is not Outcome.UNREADABLE
    ]


def measure(judged: Sequence[Judged], own: int, proposals: Proposals, seconds: dict[str, float]) -> dict[str, object]:
    """The metrics of a round that are not the learner's; everything but external counts is of the node's own groups."""
    mine = judged[:own]
    rewards = [x for _, _, row in mine if row is not None for x in row]
    verdicts = [v for _, row, _ in mine for v in row]
    rollouts = [r for group, _, _ in mine for r in group.rollouts]
    tokens = sum(len(r.tokens or ()) for r in rollouts)
    by_level, by_source = defaultdict(list), defaultdict(list)
    for group, row, _ in mine:
        by_level[str(group.task.level)] += map(success, row)
        by_source[group.task.source] += map(success, row)
    metrics: dict[str, object] = {
        "groups_own": own,
        "groups_external": len(judged) - own,
        "groups_failed": sum(row is None for _, _, row in judged),
        "proposals": {"valid": len(proposals.tasks), "tries": proposals.tries, "refused": proposals.refused},
        "verdicts": dict(sorted(Counter(str(v.outcome) for v in verdicts).items())),
        "completion_tokens": tokens,
        "tokens_per_second": tokens / max(1e-9, seconds["roll_out"]),
        "seconds": sum(seconds.values()),
        "seconds_by_phase": {phase: round(s, 4) for phase, s in seconds.items()},
    }
    if rollouts:
        metrics["truncated"] = fmean(not r.ended for r in rollouts)
        metrics["success"] = fmean(map(success, verdicts))
        metrics["success_by_level"] = {k: fmean(v) for k, v in sorted(by_level.items())}
        metrics["success_by_source"] = {k: fmean(v) for k, v in sorted(by_source.items())}
    if rewards:
        metrics["reward"] = fmean(x.total for x in rewards)
        metrics |= {f"reward_{part}": fmean(x.parts[part] for x in rewards) for part in rewards[0].parts}
    return metrics
