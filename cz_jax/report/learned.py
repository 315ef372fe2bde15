"""What a run learned, in one sentence that claims no more than the numbers do."""

import math
from statistics import fmean, variance

from cz_jax.report.charts import Interval
from cz_jax.report.markup import number, percent
from cz_jax.report.read import Run, at, finite

WINDOW = 10  # rounds at each end that are compared
FEWEST = 4  # rounds below which nothing is said


def estimate(value) -> Interval | None:
    """{"value", "low", "high"} as an Interval, None where it is not that, or not within 0..1."""
    found = [finite(at(value, key)) for key in ("value", "low", "high")]
    if any(v is None or not 0 <= v <= 1 for v in found):
        return None
    return Interval(found[0], min(found[0], found[1]), max(found[0], found[2]))


def interval_text(e: Interval) -> str:
    return f"{percent(e.value)} ({percent(e.low)} to {percent(e.high)})"


def evaluated(run: Run, name: str = "average_at_k") -> tuple[Interval | None, Interval | None]:
    """The held-out estimates before and after."""
    return tuple(estimate(at(run.evaluations, when, name)) for when in ("before", "after"))


def reward_ends(run: Run) -> tuple[list[float], list[float]]:
    """The rewards of the first and of the last rounds, as many of each, no round in both."""
    rewards = [r for r in run.series("reward") if r is not None]
    window = min(WINDOW, len(rewards) // 2)
    return rewards[:window], rewards[len(rewards) - window :]


def headline(run: Run) -> tuple[str, str]:
    """(one line, what it rests on), as plain text."""
    count = len(run.lines)
    if not count:
        return "No round has been played yet", "The charts appear with the first round."
    before, after = evaluated(run)
    if before is not None and after is not None:
        return _of_evaluations(run, before, after), _basis(run, before, after)
    told = "The held-out tasks were not evaluated after training." if before else "No held-out tasks were evaluated."
    return _of_rewards(run), f"{_reward_basis(run)} {told}"


def _of_evaluations(run: Run, before: Interval, after: Interval) -> str:
    ends = f"from {percent(before.value)} to {percent(after.value)}"
    if after.low > before.high:
        return f"Answers judged right on held-out tasks rose {ends}"
    if after.high < before.low:
        return f"Answers judged right on held-out tasks fell {ends}"
    if before.value == after.value:
        return f"Held-out tasks as before: {percent(after.value)} of the answers judged right"
    return (
        f"No clear change on held-out tasks: {percent(before.value)} judged right before, {percent(after.value)} after"
    )


def _basis(run: Run, before: Interval, after: Interval) -> str:
    k, tasks = at(run.evaluations, "after", "average_at_k", "k"), at(run.evaluations, "after", "n_tasks")
    what = f"Average@{k} over {tasks} tasks" if finite(k) and finite(tasks) else "Average over held-out tasks"
    intervals = f"95% intervals {percent(before.low)} to {percent(before.high)} before"
    intervals += f" and {percent(after.low)} to {percent(after.high)} after"
    apart = after.low > before.high or after.high < before.low
    overlap = "" if apart else ", which overlap"
    return f"{what}, {intervals}{overlap}. Right is what the evaluator calls right. {_reward_text(run)}"


def _of_rewards(run: Run) -> str:
    first, last = reward_ends(run)
    count = len(run.lines)
    if len(first) + len(last) < FEWEST:
        return f"{count} round{'s' if count > 1 else ''} played, too few to tell what was learned"
    ends = f"from {number(fmean(first))} to {number(fmean(last))}"
    if not _differ(first, last):
        return f"No clear change in reward yet: {ends.removeprefix('from ').replace(' to ', ' at first, ')} at last"
    return f"Mean reward {'rose' if fmean(last) > fmean(first) else 'fell'} {ends} over {count} rounds"


def _reward_text(run: Run) -> str:
    first, last = reward_ends(run)
    if not first:
        return ""
    rounds = f"first {len(first)} rounds" if len(first) > 1 else "first round"
    told = f"Mean reward of the {rounds} {number(fmean(first))}, of the last {number(fmean(last))}"
    if len(first) + len(last) >= FEWEST and not _differ(first, last):
        told += ", within twice the standard error of their difference"
    return told + "."


def _reward_basis(run: Run) -> str:
    first, last = reward_ends(run)
    if len(first) + len(last) < FEWEST:
        return _reward_text(run)
    apart = "more" if _differ(first, last) else "less"
    return (
        f"Means of the first and of the last {len(first)} rounds, {apart} than twice the standard error of their "
        "difference apart."
    )


def _differ(a: list[float], b: list[float]) -> bool:
    """Whether two means are more than two standard errors apart."""
    if min(len(a), len(b)) < 2:
        return False
    error = math.sqrt(variance(a) / len(a) + variance(b) / len(b))
    return abs(fmean(a) - fmean(b)) > 2 * error
