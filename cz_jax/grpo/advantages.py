"""Group-relative advantages, on the host. P prompts (groups), G rollouts."""

import numpy as np

SAME_REWARD = 1e-6  # rewards of a group that lie within this of one another count as equal
LARGEST_REWARD = 1e6  # beyond it float32 advantages without the division by std lose the differences


def has_signal(rewards_PG) -> np.ndarray:
    """bool [P]: False where all rewards of a group are equal (spread at most `SAME_REWARD`), so that its advantages and
    its policy gradient are exactly zero. Raises ValueError as `advantages` does."""
    rewards_PG = _checked(rewards_PG)
    return np.ptp(rewards_PG, axis=1) > SAME_REWARD


def advantages(rewards_PG, divide_by_std: bool, eps: float = 1e-8) -> np.ndarray:
    """float32 [P, G]: (r - mean) / (std + eps) within each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2), or
    r - mean (Dr. GRPO, arXiv 2503.20783). A group without signal gets exact zeros.

    The paper does not say which standard deviation. This is the unbiased one (divisor G - 1), as in TRL, verl and RL
    Swarm, so that learning rates found there carry over; with G = 2 every advantage is then +-0.7071. The divisor G
    would scale all advantages by sqrt(G / (G - 1)).

    Raises ValueError for rewards that are not a [P, G >= 2] array of finite numbers within +-`LARGEST_REWARD`.
    """
    rewards_PG = _checked(rewards_PG)
    signal_P = has_signal(rewards_PG)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if divide_by_std:
        centred_PG /= rewards_PG.std(axis=1, ddof=1, keepdims=True) + eps
    return np.where(signal_P[:, None], centred_PG, 0.0).astype(np.float32)


def _checked(rewards_PG) -> np.ndarray:
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {rewards_PG.shape}: one row a group and at least two rollouts a row are wanted"
        )
    bad_PG = ~(np.abs(rewards_PG) <= LARGEST_REWARD)  # true for NaN too
    if bad_PG.any():
        p, g = np.argwhere(bad_PG)[0]
        raise ValueError(
            f"the reward of rollout {g} of group {p} is {rewards_PG[p, g]}, not a number within +-{LARGEST_REWARD:g}: "
            "leave a group that could not be judged out of the update"
        )
    return rewards_PG
