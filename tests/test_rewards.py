"""Rewards: every part by hand, the reference's table, and what a failure does."""

import dataclasses

import pytest

from cz_jax.config import RewardConfig
from cz_jax.nouns import Group, Outcome, Rollout, Task, Verdict
from cz_jax.rewards import group_rewards, highest_reward, reward, success

TASK = Task("mbpp", "Write add.", ("assert add(1, 2) == 3",), "add", 2)
GOOD = "```python\ndef add(a, b):\n    return a + b\n```"
CORRECT, WRONG = Verdict(Outcome.CORRECT, 0.8), Verdict(Outcome.WRONG, 0.25)
UNREADABLE, FAILED = Verdict(Outcome.UNREADABLE, 0.9), Verdict(Outcome.FAILED, detail="time-out")
CZ, REFERENCE = RewardConfig(structure=0.3, format=0.2, correctness=1.0), RewardConfig(preset="reference")


def parts(text, ended, verdict, config=CZ, task=TASK):
    got = reward(task, Rollout(text, ended), verdict, config)
    assert got.total == pytest.approx(sum(got.parts.values()), abs=1e-15)
    return got.parts


@pytest.mark.parametrize(
    "text, ended, verdict, structure, form, correctness",
    [
        (GOOD, True, CORRECT, 0.3, 0.2, 1.0),
        (GOOD, False, CORRECT, 0.3, 0.1, 1.0),  # cut at the token limit: no EOS bonus
        (GOOD, True, WRONG, 0.3, 0.2, 0.0),
        (GOOD, True, UNREADABLE, 0.3, 0.2, 0.0),
        ("```python\ndef add(a, b):\n    return 3\n```", True, CORRECT, 0.225, 0.2, 1.0),
        ("```python\ndef sub(a, b):\n    return a - b\n```", True, WRONG, 0.075, 0.2, 0.0),
        ("```python\ndef add(a, b:\n```", True, WRONG, 0.0, 0.2, 0.0),
        (GOOD + "\n" + GOOD, True, CORRECT, 0.0, 0.1, 0.0),  # two fences: no code, so nothing to be correct
        ("def add(a, b): return a + b", True, CORRECT, 0.0, 0.1, 0.0),
        (":", True, CORRECT, 0.0, 0.1, 0.0),
        ("", True, CORRECT, 0.0, 0.1, 0.0),
        (GOOD[:-4], False, CORRECT, 0.0, 0.0, 0.0),
    ],
)
def test_the_parts_of_the_cz_preset(text, ended, verdict, structure, form, correctness):
    want = {"structure": structure, "format": form, "correctness": correctness}
    assert parts(text, ended, verdict) == pytest.approx(want)


@pytest.mark.parametrize("config", [CZ, REFERENCE, RewardConfig(structure=0.5, format=0.0, correctness=2.0)])
def test_a_right_answer_has_the_highest_reward(config):
    got = reward(TASK, Rollout(GOOD, True), CORRECT, config)
    assert got.total == pytest.approx(highest_reward(config))


def test_correctness_may_be_the_probability():
    config = CZ.model_copy(update={"correctness_from": "probability", "correctness": 2.0})
    assert parts(GOOD, True, CORRECT, config)["correctness"] == pytest.approx(1.6)
    assert parts(GOOD, True, WRONG, config)["correctness"] == pytest.approx(0.5)
    assert parts(GOOD, True, UNREADABLE, config)["correctness"] == 0.0
    assert parts("no fence", True, CORRECT, config)["correctness"] == 0.0


def test_the_weights_scale_the_parts():
    config = RewardConfig(structure=1.0, format=0.0, correctness=3.0)
    assert parts(GOOD, True, CORRECT, config) == {"structure": 1.0, "format": 0.0, "correctness": 3.0}


@pytest.mark.parametrize(
    "text, ended, verdict, total",
    [
        (GOOD, True, CORRECT, 1.2),
        (GOOD, False, CORRECT, 0.8),
        (GOOD, True, WRONG, 0.2),
        (GOOD, False, WRONG, -0.2),
        (GOOD, True, UNREADABLE, 0.2),
        ("prose", True, CORRECT, -0.8),
        ("prose", False, WRONG, -1.2),
        (None, True, CORRECT, -1.2),
    ],
)
def test_the_table_of_the_reference_preset(text, ended, verdict, total):
    got = reward(TASK, Rollout(text, ended), verdict, REFERENCE)
    assert got.total == pytest.approx(total)
    assert got.total == pytest.approx(sum(got.parts.values()))


def test_a_broken_evaluator_gives_no_reward():
    for config in (CZ, REFERENCE):
        assert reward(TASK, Rollout(GOOD, True), FAILED, config) is None
        group = Group(TASK, "p", "0", 0, (Rollout(GOOD, True), Rollout("", True)))
        assert group_rewards(group, (CORRECT, FAILED), config) is None


def test_a_group_has_one_reward_a_rollout_in_order():
    group = Group(TASK, "p", "0", 0, (Rollout(GOOD, True), Rollout("", True), Rollout(GOOD, False)))
    rewards = group_rewards(group, (CORRECT, WRONG, WRONG), CZ)
    assert [r.total for r in rewards] == pytest.approx([1.5, 0.1, 0.4])
    with pytest.raises(ValueError, match="2 verdicts for 3 rollouts"):
        group_rewards(group, (CORRECT, WRONG), CZ)


def test_a_verdict_without_code_never_pays_whatever_it_claims():
    for text in (
        "",
        ":",
        "Solution",
        "Thought process:",
        "~~~python\nx\n~~~",
        "```python\nx",
        "\ud800",
        '{"is_correct": true}',
    ):
        assert parts(text, True, Verdict(Outcome.CORRECT, 1.0))["correctness"] == 0.0


def test_a_program_is_rewarded_too():
    task = dataclasses.replace(TASK, entry_point=None, tests=('{"input":"1\\n","output":"1\\n"}',))
    assert parts("```python\nprint(input())\n```", True, CORRECT, task=task) == pytest.approx(
        {"structure": 0.3, "format": 0.2, "correctness": 1.0}
    )


def test_success_is_the_verdict_correct_alone():
    assert [success(v) for v in (CORRECT, WRONG, UNREADABLE, FAILED)] == [True, False, False, False]
