"""The composite reward of an answer: structure, format, predicted correctness. Nothing is executed.

An evaluator that broke (FAILED) gives no reward at all, and its group is left out: a failure is never a number.
"""

import math
from collections.abc import Sequence

from cz_jax.config import RewardConfig
from cz_jax.nouns import Group, Outcome, Reward, Rollout, Task, Verdict
from cz_jax.text.answers import extract_code, structure

REFERENCE_ENDING = 0.2  # the "reference" preset: what ending with EOS adds, and being cut takes away


def success(verdict: Verdict) -> bool:
    """Whether the evaluator called the answer correct: what levels and evaluation count."""
    return verdict.outcome is Outcome.CORRECT


def reward(task: Task, rollout: Rollout, verdict: Verdict, config: RewardConfig) -> Reward | None:
    """The reward of one answer, None where the verdict is FAILED. The total is the sum of the parts.

    Preset "cz": structure = weight * Structure.score of the extracted code; format = weight * (half for exactly one
    closed python fence, half for having ended with EOS); correctness = weight * (1 if CORRECT, or the evaluator's
    probability of it, by `correctness_from`). Without extracted code structure and correctness are 0; an UNREADABLE
    verdict has correctness 0.

    Preset "reference" (rl-swarm's code_gen_exp): format -1 without exactly one python fence, else correctness 1 where
    CORRECT; ending +0.2 with EOS, -0.2 without. The weights do not count. What is no text gets -1.2.
    """
    if verdict.outcome is Outcome.FAILED:
        return None
    parts = _reference(rollout, verdict) if config.preset == "reference" else _cz(task, rollout, verdict, config)
    return Reward(total=math.fsum(parts.values()), parts=parts)


def highest_reward(config: RewardConfig) -> float:
    """The total of an answer that is right in every part."""
    if config.preset == "reference":
        return 1.0 + REFERENCE_ENDING
    return config.structure + config.format + config.correctness


def group_rewards(group: Group, verdicts: Sequence[Verdict], config: RewardConfig) -> tuple[Reward, ...] | None:
    """One reward a rollout, in order; None where any verdict is FAILED. ValueError where their numbers differ."""
    if len(verdicts) != len(group.rollouts):
        raise ValueError(f"{len(verdicts)} verdicts for {len(group.rollouts)} rollouts")
    if any(v.outcome is Outcome.FAILED for v in verdicts):
        return None
    return tuple(reward(group.task, r, v, config) for r, v in zip(group.rollouts, verdicts, strict=True))


def _cz(task: Task, rollout: Rollout, verdict: Verdict, config: RewardConfig) -> dict[str, float]:
    code = extract_code(rollout.text).code
    correct = 0.0
    if code is not None and config.correctness_from == "probability" and verdict.outcome is not Outcome.UNREADABLE:
        correct = float(verdict.probability)
    elif code is not None:
        correct = float(success(verdict))
    return {
        "structure": config.structure * structure(code, task).score,
        "format": config.format * (0.5 * (code is not None) + 0.5 * bool(rollout.ended)),
        "correctness": config.correctness * correct,
    }


def _reference(rollout: Rollout, verdict: Verdict) -> dict[str, float]:
    fenced = extract_code(rollout.text).code is not None
    ended = isinstance(rollout.text, str) and rollout.ended
    return {
        "format": 0.0 if fenced else -1.0,
        "ending": REFERENCE_ENDING if ended else -REFERENCE_ENDING,
        "correctness": float(fenced and success(verdict)),
    }
