"""The level: simulated solvers move it as they should, and noise does not."""

import json
import random

import pytest

from cz_jax.config import LevelConfig
from cz_jax.difficulty import LevelState, adapt

BAND, TREND = LevelConfig(), LevelConfig(rule="trend")


def levels(chance, config, rounds, seed=0, size=6, start=2):
    """The level after each of `rounds` rounds of `size` rollouts that are right with `chance(level)`."""
    draw, state, seen = random.Random(seed), LevelState(start), []
    for _ in range(rounds):
        state = adapt(state, [draw.random() < chance(state.level) for _ in range(size)], config)
        seen.append(state.level)
    return seen


def changes(seen, start=2):
    return sum(a != b for a, b in zip([start, *seen], seen, strict=False))


def test_always_right_reaches_5_and_always_wrong_1_within_60_rounds_of_6():
    up, down = levels(lambda level: 1.0, BAND, 60), levels(lambda level: 0.0, BAND, 60)
    assert up[-1] == 5 and up == sorted(up)
    assert down[-1] == 1 and down == sorted(down, reverse=True)
    assert up.index(5) == 11 and down.index(1) == 3  # 24 outcomes, four rounds, a level


@pytest.mark.parametrize("start", [2, 3, 4])
def test_half_right_changes_the_level_in_under_5_percent_of_updates(start):
    for seed in range(12):
        assert changes(levels(lambda level: 0.5, BAND, 400, seed, start=start), start) < 0.05 * 400


@pytest.mark.parametrize("size, correlated", [(1, 1), (8, 1), (6, 3)])
def test_other_rounds_are_stable_too(size, correlated):
    """With `correlated` answers alike: two tasks a round whose three answers are all right or all wrong."""
    for seed in range(8):
        draw, state, moved = random.Random(seed), LevelState(3), 0
        for _ in range(400):
            outcomes = [x for _ in range(size // correlated) for x in [draw.random() < 0.5] * correlated]
            new = adapt(state, outcomes, BAND)
            moved, state = moved + (new.level != state.level), new
        assert moved < 0.05 * 400


def test_a_solver_with_a_skill_settles_where_it_is_half_right():
    skill = {1: 0.95, 2: 0.85, 3: 0.5, 4: 0.1, 5: 0.0}
    for seed in range(6):
        seen = levels(skill.get, BAND, 200, seed, start=1)
        assert sum(level == 3 for level in seen[40:]) > 0.9 * 160


def test_the_trend_rule_has_the_defects_of_the_reference():
    assert set(levels(lambda level: 1.0, TREND, 60)) == {2}
    assert set(levels(lambda level: 0.0, TREND, 60)) == {2}
    for seed in range(5):
        assert changes(levels(lambda level: 0.5, TREND, 400, seed)) > 0.5 * 400


def test_the_trend_rule_compares_two_means_of_ten():
    state = LevelState(2, (0.5,) * 19)
    assert adapt(state, [0.5], TREND).level == 2
    assert adapt(state, [0.9], TREND).level == 2  # up by 0.04
    assert adapt(LevelState(2, (0.5,) * 18), [1.0, 1.0], TREND).level == 3
    assert adapt(LevelState(2, (0.5,) * 18), [0.0, 0.0], TREND).level == 1
    assert adapt(LevelState(2), [0.0] * 9 + [1.0] * 10, TREND).level == 2  # 19 outcomes are too few
    assert adapt(LevelState(2), [1.0] * 30, TREND).outcomes == (1.0,) * 20


def test_the_band_waits_for_enough_outcomes_and_forgets_them_on_a_move():
    config = LevelConfig(min_count=8, window=10)
    state = adapt(LevelState(2), [1] * 7, config)
    assert state == LevelState(2, (1.0,) * 7)
    assert adapt(state, [True], config) == LevelState(3, ())
    assert adapt(LevelState(2), [0] * 8, config) == LevelState(1, ())


def test_the_band_is_left_by_the_hysteresis_only():
    config = LevelConfig(min_count=20, window=20)
    for right, level in ((14, 2), (15, 3), (6, 2), (5, 1)):
        assert adapt(LevelState(2), [1] * right + [0] * (20 - right), config).level == level


def test_the_window_slides():
    config = LevelConfig(min_count=4, window=4)
    state = adapt(LevelState(3), [1, 0, 1, 0], config)
    assert state.level == 3
    assert adapt(state, [0, 1, 1], config).level == 3  # 0 0 1 1
    assert adapt(state, [1, 1, 1], config).level == 4  # 0 1 1 1


def test_the_ends_hold():
    assert adapt(LevelState(5), [1] * 48, BAND).level == 5
    assert adapt(LevelState(1), [0] * 48, BAND).level == 1
    assert len(adapt(LevelState(5, (1.0,) * 48), [1] * 6, BAND).outcomes) == 48


def test_nothing_new_changes_nothing():
    full = LevelState(2, (1.0,) * 30)
    assert adapt(full, [], BAND) is full


def test_a_state_survives_json_and_goes_on_alike():
    state = adapt(LevelState(4), [True, False, 0.25], BAND)
    again = LevelState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state and adapt(again, [1], BAND) == adapt(state, [1], BAND)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"level": 2},
        {"level": 6, "outcomes": []},
        {"level": 2, "outcomes": [2.0]},
        {"level": 2, "outcomes": 3},
        {"level": "x", "outcomes": []},
        {"level": None, "outcomes": []},
        {"level": 2, "outcomes": [], "more": 1},
    ],
)
def test_a_state_that_is_none_is_refused(value):
    with pytest.raises(ValueError):
        LevelState.from_dict(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_success_that_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match="0..1"):
        adapt(LevelState(2), [1.0, value], BAND)
