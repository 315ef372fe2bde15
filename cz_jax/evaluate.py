"""average@k and pass@k of a solver on held-out tasks, by predicted correctness: no answer is executed."""

from collections import Counter
from collections.abc import Callable, Sequence

from cz_jax.loop import stop_on_failures
from cz_jax.metrics import average_at_k, by_group, pass_at_k_estimate
from cz_jax.nouns import Outcome, Task
from cz_jax.ports import Evaluator
from cz_jax.rewards import success
from cz_jax.roles.solver import ModelSolver

TASKS_AT_ONCE = 8


def evaluate(
    solver: ModelSolver, evaluator: Evaluator, tasks: Sequence[Task], k: int, max_failed_share: float, say: Callable
) -> dict:
    """{"average_at_k", "pass_at_k": {"k", "value", "low", "high"}, "n_tasks", "by_level", "by_source",
    "success_by_task" (id -> share of its rollouts), "verdicts", "left_out"}.

    Every task gets k rollouts, the same ones whatever round it is: their keys come from the purpose "evaluate" and the
    task. Tasks with a prompt that does not fit, or with a FAILED verdict, are left out and counted.
    """
    groups, verdicts = [], []
    calls = -(-len(tasks) // TASKS_AT_ONCE)
    for call in range(calls):  # of even sizes, so that the last has no shape of its own
        start, end = call * len(tasks) // calls, (call + 1) * len(tasks) // calls
        say("phase", name=f"evaluating task {start + 1} of {len(tasks)}")
        some = solver.roll_out(tasks[start:end], 0, "evaluate", k)
        groups += some
        verdicts += evaluator.judge(some, 0)
    stop_on_failures(verdicts, max_failed_share)
    whole = [
        (g.task, [success(v) for v in row])
        for g, row in zip(groups, verdicts, strict=True)
        if not any(v.outcome is Outcome.FAILED for v in row)
    ]
    result = {
        "n_tasks": len(whole),
        "verdicts": dict(sorted(Counter(str(v.outcome) for row in verdicts for v in row).items())),
        "left_out": len(tasks) - len(whole),
    }
    if not whole:
        return result | {
            "average_at_k": None,
            "pass_at_k": None,
            "by_level": {},
            "by_source": {},
            "success_by_task": {},
        }
    successes = [row for _, row in whole]
    return result | {
        "average_at_k": average_at_k(successes, k),
        "pass_at_k": pass_at_k_estimate(successes, k),
        "success_by_task": {t.id: sum(row) / len(row) for t, row in whole},
        "by_level": {str(key): v for key, v in by_group([t.level for t, _ in whole], successes, k).items()},
        "by_source": by_group([t.source for t, _ in whole], successes, k),
    }
