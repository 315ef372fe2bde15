"""Three tasks of the run with their best and their worst answer side by side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cz_jax.nouns import Group, Outcome, Reward, Round, Verdict
from cz_jax.report.markup import block, inline, number, percent, short
from cz_jax.report.read import Run

COLOURS = {Outcome.CORRECT: "v1", Outcome.WRONG: "v2", Outcome.UNREADABLE: "v3", Outcome.FAILED: "v4"}
SHOWN_TESTS, MOST_CHIPS = 6, 64


@dataclass(frozen=True)
class Sample:
    """A judged group; `best` and `worst` are places in it."""

    round: int
    group: Group
    verdicts: tuple[Verdict, ...]
    rewards: tuple[Reward, ...]
    best: int
    worst: int

    @property
    def contrast(self) -> tuple:
        """What makes a sample telling: a right answer beside one that is not, then the distance in reward."""
        right = [v.outcome is Outcome.CORRECT for v in self.verdicts]
        return right[self.best] and not right[self.worst], self.rewards[self.best].total - self.rewards[
            self.worst
        ].total


def samples_of(round_: Round) -> list[Sample]:
    """The node's own groups of a round that have a reward for every answer."""
    found = []
    for group, verdicts, rewards in zip(round_.own, round_.verdicts, round_.rewards, strict=False):
        if rewards and len(group.rollouts) == len(verdicts) == len(rewards) and len(rewards) > 1:
            order = sorted(range(len(rewards)), key=lambda i: (rewards[i].total, verdicts[i].probability or 0.0))
            found.append(Sample(round_.number, group, verdicts, rewards, order[-1], order[0]))
    return found


def pick(run: Run, count: int = 3) -> list[Sample]:
    """The most telling sample of each third of the run, no task twice; others where a third has none."""
    every = sorted((s for r in run.records for s in samples_of(r)), key=lambda s: s.contrast, reverse=True)
    first, last = (run.numbers[0], run.numbers[-1]) if run.numbers else (0, 0)

    def part(s: Sample) -> int:
        return min(count - 1, count * (s.round - first) // max(1, last - first + 1))

    chosen: list[Sample] = []
    for of_third in (True, False):
        for s in every:
            taken = {part(c) for c in chosen} if of_third else ()
            if (
                len(chosen) < count
                and part(s) not in taken
                and s.group.task.id not in {c.group.task.id for c in chosen}
            ):
                chosen.append(s)
    return sorted(chosen, key=lambda s: s.round)


def show(sample: Sample) -> str:
    task = sample.group.task
    tests = "\n".join(task.tests[:SHOWN_TESTS])
    more = f"<p>{len(task.tests) - SHOWN_TESTS} more tests</p>" if len(task.tests) > SHOWN_TESTS else ""
    kind = "a whole program" if task.is_program else f"function <code>{inline(task.entry_point)}</code>"
    chips = "".join(_chip(v) for v in sample.verdicts[:MOST_CHIPS])
    return (
        f'<article class="card task"><p class="eyebrow">Round {sample.round} \N{MIDDLE DOT} level {task.level} '
        f"\N{MIDDLE DOT} {inline(task.source)} \N{MIDDLE DOT} {kind}</p>"
        f'<pre class="question">{block(task.question)}</pre>'
        f"<details><summary>{len(task.tests)} tests</summary><pre>{block(tests)}</pre>{more}</details>"
        f'<p class="chips">{chips}<span>{_counts(sample.verdicts)}</span></p>'
        f'<div class="pair">{_answer(sample, sample.best, "Best answer")}'
        f"{_answer(sample, sample.worst, 'Worst answer')}</div>"
        f'<p class="fine">task {short(task.id)} \N{MIDDLE DOT} policy {short(sample.group.policy)}</p></article>'
    )


def _counts(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(str(v.outcome) for v in verdicts)
    return f"{len(verdicts)} answers: " + ", ".join(f"{n} {name}" for name, n in counts.most_common())


def _chip(verdict: Verdict) -> str:
    told = verdict.outcome + ("" if verdict.probability is None else f", probability {percent(verdict.probability)}")
    return f'<i class="chip {COLOURS[verdict.outcome]}" title="{inline(told)}"></i>'


def _answer(sample: Sample, i: int, title: str) -> str:
    verdict, reward, rollout = sample.verdicts[i], sample.rewards[i], sample.group.rollouts[i]
    sure = "" if verdict.probability is None else f" \N{MIDDLE DOT} {percent(verdict.probability)} sure it is right"
    parts = ", ".join(f"{inline(name, 24)} {number(value)}" for name, value in list(reward.parts.items())[:8])
    detail = f'<p class="fine">{inline(verdict.detail, 160)}</p>' if verdict.detail else ""
    ended = "" if rollout.ended else '<span class="tag">cut at the token limit</span>'
    text = block(rollout.text) if rollout.text else '<span class="cut">an empty answer</span>'
    return (
        f'<section class="answer"><header><h4>{title}</h4><span class="verdict {COLOURS[verdict.outcome]}">'
        f"{verdict.outcome}{sure}</span>{ended}</header>"
        f'<p class="fine">reward <b>{number(reward.total)}</b> = {parts}</p>{detail}<pre>{text}</pre></section>'
    )
