"""How good solvers and evaluators are: average@k, pass@k with confidence intervals; AUROC, ECE and error rates.

`successes` is one row a task, one bool a rollout. Intervals are 95%, over tasks (the percentile bootstrap, seeded);
where all tasks have one value a resample shows no spread, and the Wilson interval for that many tasks stands in.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000
BOOTSTRAP_SEED = 0
Z_95 = 1.959963984540054
ECE_BINS = 10


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k of n samples, c of them right, is right: 1 - C(n-c, k) / C(n, k), unbiased
    for n >= k (Chen et al. 2021, equation 1, as their product). ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k wants 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def average_at_k(successes: Sequence[Sequence[bool]], k: int) -> dict[str, float]:
    """{"k", "value", "low", "high"}: the mean success rate of a rollout, tasks weighted alike. Rows may hold more than
    k rollouts; all of them count, which has the same mean and less noise. ValueError for no task or a row under k."""
    return _estimate([c / n for n, c in _counts(successes, k)], k)


def pass_at_k_estimate(successes: Sequence[Sequence[bool]], k: int) -> dict[str, float]:
    """{"k", "value", "low", "high"}: the mean over tasks of `pass_at_k`. ValueError as in `average_at_k`."""
    return _estimate([pass_at_k(n, c, k) for n, c in _counts(successes, k)], k)


def gain_estimate(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """{"value", "low", "high"}: the mean over tasks of after - before, the same tasks in the same order: what the two
    share by having the same tasks is no part of the interval. ValueError for no task or different lengths."""
    if not before or len(before) != len(after):
        raise ValueError(f"{len(before)} tasks before and {len(after)} after: the same ones, and at least one")
    gains_N = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    low, high = _bootstrap(gains_N)
    return {"value": float(gains_N.mean()), "low": low, "high": high}


def difference_estimate(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """{"value", "low", "high"}: the difference of the means of two independent samples, after - before, each resampled
    on its own. ValueError where one is empty."""
    if not len(before) or not len(after):
        raise ValueError(f"{len(before)} values before and {len(after)} after: at least one each")
    means = [resampled_means(np.asarray(values, np.float64), seed) for seed, values in enumerate((before, after))]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return {"value": float(np.mean(after) - np.mean(before)), "low": float(low), "high": float(high)}


def by_group(keys: Sequence[Hashable], successes: Sequence[Sequence[bool]], k: int) -> dict[str, dict]:
    """{key: {"n_tasks", "average_at_k", "pass_at_k"}} for the tasks of each key (a level, a source), keys sorted as
    texts. ValueError where `keys` and `successes` differ in length."""
    rows: dict[str, list] = {}
    for key, row in zip(keys, successes, strict=True):
        rows.setdefault(str(key), []).append(row)
    return {
        key: {"n_tasks": len(of), "average_at_k": average_at_k(of, k), "pass_at_k": pass_at_k_estimate(of, k)}
        for key, of in sorted(rows.items())
    }


def _counts(successes: Sequence[Sequence[bool]], k: int) -> list[tuple[int, int]]:
    """(rollouts, right ones) of each task."""
    if not successes:
        raise ValueError("there are no tasks to average over")
    if k < 1 or any(len(row) < k for row in successes):
        raise ValueError(f"each task needs at least k={k} >= 1 rollouts, the fewest are {min(map(len, successes))}")
    return [(len(row), sum(map(bool, row))) for row in successes]


def _estimate(values: Sequence[float], k: int) -> dict[str, float]:
    values_N = np.asarray(values, np.float64)
    value = float(values_N.mean())
    if np.ptp(values_N) == 0.0:
        low, high = _wilson(value, len(values_N))
    else:
        low, high = _bootstrap(values_N)
    return {"k": k, "value": value, "low": min(low, value), "high": max(high, value)}


def _bootstrap(values_N: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of the mean."""
    low, high = np.quantile(resampled_means(values_N, BOOTSTRAP_SEED), [0.025, 0.975])
    return float(low), float(high)


def resampled_means(values_N: np.ndarray, seed: int) -> np.ndarray:
    """float64 [RESAMPLES]: means of as many values, drawn from `values_N` with replacement; the same places of equally
    many values for the same seed."""
    generator = np.random.default_rng(seed)
    draws = (values_N[generator.integers(len(values_N), size=len(values_N))].mean() for _ in range(RESAMPLES))
    return np.fromiter(draws, np.float64, RESAMPLES)


def _wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion p of n."""
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc(probabilities: Sequence[float], labels: Sequence[bool]) -> float | None:
    """The chance that a right answer has a higher probability than a wrong one, ties counting half (Mann-Whitney U).
    None unless both kinds are there."""
    scores_N, labels_N = _checked(probabilities, labels)
    right = int(labels_N.sum())
    wrong = len(labels_N) - right
    if not right or not wrong:
        return None
    _, place_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[place_N]
    return float((ranks_N[labels_N].sum() - right * (right + 1) / 2) / (right * wrong))


def expected_calibration_error(probabilities: Sequence[float], labels: Sequence[bool]) -> float | None:
    """Mean over answers of |mean probability - share right| of the answer's bin, of 10 equal bins over [0, 1] (Guo et
    al. 2017, for the probability of being right). None for no answers."""
    scores_N, labels_N = _checked(probabilities, labels)
    if not len(scores_N):
        return None
    bins_N = np.minimum((scores_N * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins_N, scores_N - labels_N, ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores_N))


def judge_quality(
    probabilities: Sequence[float | None], labels: Sequence[bool], threshold: float
) -> dict[str, float | None]:
    """How an evaluator does on labelled answers: accuracy, auroc, ece, false_positive_rate, abstained, all in 0..1.

    `probabilities[i]`: of answer i being right, None where the evaluator abstained; at `threshold` or above it says
    "right". An abstention counts as no right decision in `accuracy` (of all answers) and as no false positive in
    `false_positive_rate` (of all wrong answers), since it earns no reward; `auroc` and `ece` are of the decided
    answers; `abstained` is the share of all. None where there is nothing to measure on. ValueError for different
    lengths, no answers, or a probability that is NaN or outside of 0..1.
    """
    if not labels or len(probabilities) != len(labels):
        raise ValueError(f"{len(probabilities)} probabilities for {len(labels)} labels: one each, and at least one")
    decided = [(p, bool(l)) for p, l in zip(probabilities, labels, strict=True) if p is not None]
    scores, truths = [p for p, _ in decided], [l for _, l in decided]
    scores_N, truths_N = _checked(scores, truths)
    says_right_N = scores_N >= threshold
    wrong = len(labels) - sum(map(bool, labels))
    return {
        "accuracy": float((says_right_N == truths_N).sum() / len(labels)),
        "auroc": auroc(scores, truths),
        "ece": expected_calibration_error(scores, truths),
        "false_positive_rate": float((says_right_N & ~truths_N).sum() / wrong) if wrong else None,
        "abstained": 1.0 - len(decided) / len(labels),
    }


def _checked(probabilities: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] and bool [N]."""
    scores_N, labels_N = np.asarray(probabilities, np.float64), np.asarray(labels, bool)
    if scores_N.shape != labels_N.shape or not np.all((scores_N >= 0.0) & (scores_N <= 1.0)):
        raise ValueError("probabilities are within 0..1 and one a label")
    return scores_N, labels_N
