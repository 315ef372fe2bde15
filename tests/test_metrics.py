"""Metrics against outside truths: counting subsets, counting pairs, and coverage of the intervals."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from cz_jax.metrics import (
    auroc,
    average_at_k,
    by_group,
    difference_estimate,
    expected_calibration_error,
    gain_estimate,
    judge_quality,
    pass_at_k,
    pass_at_k_estimate,
)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_stable_for_large_counts():
    for n, c, k in ((10_000, 1, 100), (10_000, 5_000, 3), (100_000, 3, 50_000)):
        exact = 1 - math.comb(n - c, k) / math.comb(n, k) if n < 100_000 else 1 - 0.5**3
        assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-4 if n == 100_000 else 1e-12)


@pytest.mark.parametrize("n, c, k", [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_the_estimates_are_means_over_tasks():
    rows = [[True, False, False, False], [True, True, True, True], [False] * 4]
    got = average_at_k(rows, 4)
    assert got["k"] == 4 and got["value"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert pass_at_k_estimate(rows, 4)["value"] == pytest.approx(2 / 3)
    assert pass_at_k_estimate(rows, 2)["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert pass_at_k_estimate(rows, 1)["value"] == pytest.approx(average_at_k(rows, 1)["value"])
    assert 0 <= got["low"] < got["value"] < got["high"] <= 1
    assert average_at_k(rows, 4) == got and json.loads(json.dumps(got)) == got


def test_rows_of_different_length_weigh_alike():
    assert average_at_k([[True] * 2, [False] * 8], 2)["value"] == 0.5


@pytest.mark.parametrize("rows", [[[True]], [[False]], [[True, False]], [[True]] * 5, [[False]] * 5])
def test_one_task_or_no_spread_gives_a_wide_interval_around_the_value(rows):
    for got in (average_at_k(rows, 1), pass_at_k_estimate(rows, 1)):
        assert 0.0 <= got["low"] <= got["value"] <= got["high"] <= 1.0
        assert got["high"] - got["low"] > 0.4


def test_the_interval_narrows_as_the_root_of_the_tasks_and_covers_the_truth():
    draw, covered, widths = random.Random(0), 0, {}
    for n in (40, 160):
        for _ in range(40):
            rows = [[draw.random() < rate for _ in range(4)] for rate in (draw.random() for _ in range(n))]
            got = average_at_k(rows, 4)
            covered += got["low"] <= 0.5 <= got["high"]
            widths.setdefault(n, []).append(got["high"] - got["low"])
    assert covered >= 0.85 * 80
    assert sum(widths[40]) / sum(widths[160]) == pytest.approx(2.0, rel=0.1)


def test_estimates_refuse_no_tasks_and_short_rows():
    for estimate in (average_at_k, pass_at_k_estimate):
        with pytest.raises(ValueError, match="no tasks"):
            estimate([], 1)
        with pytest.raises(ValueError, match="at least k=2"):
            estimate([[True, True], [True]], 2)
        with pytest.raises(ValueError):
            estimate([[True]], 0)


def test_a_difference_of_samples_and_its_interval():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        before, after = draw.normal(0.0, 1.0, 30), draw.normal(0.4, 1.0, 50)
        got = difference_estimate(before, after)
        assert got["value"] == pytest.approx(after.mean() - before.mean()) and got["low"] < got["value"] < got["high"]
        assert got["high"] - got["low"] == pytest.approx(2 * 1.96 * (1 / 30 + 1 / 50) ** 0.5, rel=0.5)
        covered += got["low"] <= 0.4 <= got["high"]
    assert covered >= 0.85 * 60
    with pytest.raises(ValueError, match="at least one"):
        difference_estimate([], [1.0])


def test_groups_are_split_by_key():
    rows = [[True, True], [False, False], [True, False]]
    got = by_group([2, 1, 2], rows, 2)
    assert list(got) == ["1", "2"] and got["2"]["n_tasks"] == 2
    assert got["2"]["average_at_k"] == average_at_k([rows[0], rows[2]], 2)
    assert got["1"]["pass_at_k"] == pass_at_k_estimate([rows[1]], 2)
    with pytest.raises(ValueError):
        by_group([1], rows, 2)


@pytest.mark.parametrize("seed", range(8))
def test_auroc_counts_pairs_with_ties_as_half(seed):
    draw = random.Random(seed)
    scores = [draw.randrange(6) / 5 for _ in range(60)]
    labels = [draw.random() < 0.4 for _ in scores]
    pairs = [
        (a, b) for a, x in zip(scores, labels, strict=True) if x for b, y in zip(scores, labels, strict=True) if not y
    ]
    assert auroc(scores, labels) == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))


def test_auroc_by_hand():
    assert auroc([0.1, 0.9], [False, True]) == 1.0
    assert auroc([0.9, 0.1], [False, True]) == 0.0
    assert auroc([0.5, 0.5, 0.5], [False, True, True]) == 0.5
    assert auroc([0.5, 0.6], [True, True]) is None and auroc([], []) is None


def test_calibration_error_by_hand():
    """Bins [0.2, 0.3): |0.25 - 0.5| of 2; [0.9, 1]: |0.975 - 1| of 2."""
    assert expected_calibration_error([0.2, 0.3 - 1e-9, 0.95, 1.0], [0, 1, 1, 1]) == pytest.approx(0.1375)
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0.0
    assert expected_calibration_error([0.0, 1.0], [True, False]) == 1.0
    assert expected_calibration_error([], []) is None


def test_judge_quality_counts_abstentions_as_it_says():
    got = judge_quality([0.9, 0.6, 0.4, None, 0.5, None], [True, False, False, False, True, True], 0.5)
    assert got["accuracy"] == pytest.approx(3 / 6)  # 0.9, 0.4, 0.5; an abstention is no right decision
    assert got["false_positive_rate"] == pytest.approx(1 / 3)  # 0.6, of three wrong answers
    assert got["abstained"] == pytest.approx(2 / 6)
    assert got["auroc"] == pytest.approx(3 / 4)
    assert set(got) == {"accuracy", "auroc", "ece", "false_positive_rate", "abstained"}
    assert json.loads(json.dumps(got)) == got


def test_judge_quality_moves_with_the_threshold():
    strict = judge_quality([0.9, 0.6], [True, False], 0.7)
    assert strict["accuracy"] == 1.0 and strict["false_positive_rate"] == 0.0


def test_judge_quality_says_none_where_there_is_nothing_to_measure():
    silent = judge_quality([None, None], [True, False], 0.5)
    assert silent == {"accuracy": 0.0, "auroc": None, "ece": None, "false_positive_rate": 0.0, "abstained": 1.0}
    assert judge_quality([0.9], [True], 0.5)["false_positive_rate"] is None


@pytest.mark.parametrize("probabilities, labels", [([], []), ([0.5], []), ([float("nan")], [True]), ([1.5], [True])])
def test_judge_quality_refuses_what_is_no_probability(probabilities, labels):
    with pytest.raises(ValueError):
        judge_quality(probabilities, labels, 0.5)


def test_a_gain_is_paired():
    before, after = [0.0, 0.5, 1.0, 0.25], [0.25, 0.75, 1.0, 0.5]
    gain = gain_estimate(before, after)
    assert gain["value"] == pytest.approx(0.1875) and 0.0 <= gain["low"] <= 0.1875 <= gain["high"] <= 0.25
    rng = np.random.default_rng(0)
    tasks = rng.random(200)
    wide = gain_estimate(tasks.tolist(), rng.permutation(tasks + 0.1).tolist())
    narrow = gain_estimate(tasks.tolist(), (tasks + 0.1).tolist())
    assert narrow["high"] - narrow["low"] < 1e-9 < wide["high"] - wide["low"]
    for wrong in (([], []), ([0.5], [0.5, 0.5])):
        with pytest.raises(ValueError, match="the same ones"):
            gain_estimate(*wrong)
