"""The GRPO loss on log-probabilities: pure, float32 inside, exact under splitting into micro-batches.

P prompts (groups), G rollouts, T completion tokens. Per token, with r = exp(new - old), A the advantage, w the
importance weight of the trainer against the sampler and k3 the KL estimate against the reference policy:

    loss = -w * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) + kl * k3

Clipped surrogate: PPO (arXiv 1707.06347); within groups: DeepSeekMath (arXiv 2402.03300); two clip sides and the token
mean: DAPO (arXiv 2503.14476); a constant length in the denominator: Dr. GRPO (arXiv 2503.20783); w, truncated
importance sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; k3:
Schulman 2020, "Approximating KL Divergence".

A token outside of the mask has no influence, whatever stands there. A log-probability or an advantage that is not
finite inside of the mask makes the loss NaN, so that a step that checks its loss cannot train on it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

LossName = Literal["token_mean", "sequence_mean", "dr_grpo"]
MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-this before exp; beyond it they carry no gradient

# What `grpo_loss` sums over tokens, by name. All are added over micro-batches, but the maximum is taken of a "_max".
SUM_NAMES = (
    "tokens",
    "ratio",
    "clipped_low",
    "clipped_high",
    "policy_kl",
    "reference_tokens",
    "reference_kl",
    "own_tokens",
    "logprob_difference",
    "logprob_difference_max",
    "weighted_tokens",
    "importance_weight",
    "importance_truncated",
)


@dataclass(frozen=True)
class LossOptions:
    """The switches of the loss; hashable, so that it can be a static argument. Names as in `config.GrpoConfig`."""

    loss: LossName = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0  # 0: no KL term, and no reference log-probabilities are needed
    importance_cap: float = 2.0  # 0: no importance weights

    def __post_init__(self):
        if self.loss not in get_args(LossName):
            raise ValueError(f"loss {self.loss!r} is none of {', '.join(get_args(LossName))}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Denominators:
    """What the sums of a whole batch are divided by; leaves, so that new counts compile nothing anew."""

    tokens: float
    sequences: float
    max_tokens: float


def denominators(lengths_PG, max_new_tokens: int) -> Denominators:
    """The denominators of a batch whose completions have `lengths_PG` (int [P, G]) tokens, on the host.

    Give the lengths of every group of the batch, those included that are left out of the step because their advantages
    are all zero: with kl = 0 the loss and gradients are then exactly those of the batch with them. (With kl > 0 the KL
    term of the groups left out is missing.) Padding rows of a micro-batch do not count; an empty completion counts as
    a sequence. ValueError where there is no token at all.
    """
    lengths_PG = np.asarray(lengths_PG)
    tokens = int(lengths_PG.sum())
    if tokens <= 0 or lengths_PG.min() < 0 or max_new_tokens < 1:
        raise ValueError(
            f"{tokens} completion tokens of at most {max_new_tokens} a rollout: there is nothing to train on"
        )
    return Denominators(*(np.float32(n) for n in (tokens, lengths_PG.size, max_new_tokens)))


def grpo_loss(
    new_logprobs_PGT: jax.Array,
    old_logprobs_PGT: jax.Array | None,
    behaviour_logprobs_PGT: jax.Array | None,
    reference_logprobs_PGT: jax.Array | None,
    advantages_PG: jax.Array,
    mask_PGT: jax.Array,
    denominators: Denominators,
    options: LossOptions,
    own_P: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This micro-batch's share of the batch's loss (float32 scalar) and the sums for its metrics (float32 scalars).

    Log-probabilities are in nats and of the token at each position; mask_PGT (bool) is true at completion tokens, a
    sequence must not be split over micro-batches. The gradient is with respect to `new_logprobs_PGT` alone.
    old None: the policy of the batch is the present one (the first update on it), r = 1.
    behaviour: what the sampler reported; it is used only in the groups that are True in `own_P` (bool [P]; None: all),
    the others have w = 1. None: w = 1 everywhere.
    reference: needed where options.kl > 0, otherwise only measured. ValueError where it is missing.
    """
    if options.kl > 0 and reference_logprobs_PGT is None:
        raise ValueError(
            f"kl={options.kl} needs reference_logprobs_PGT, the log-probabilities under the starting weights"
        )
    mask_PGT = mask_PGT.astype(bool)
    new_PGT = _masked(new_logprobs_PGT, mask_PGT)
    old_PGT = jax.lax.stop_gradient(new_PGT if old_logprobs_PGT is None else _masked(old_logprobs_PGT, mask_PGT))
    advantages_PGT = _masked(jnp.broadcast_to(advantages_PG[..., None], mask_PGT.shape), mask_PGT)
    advantages_PGT = jnp.where(jnp.isfinite(advantages_PGT), advantages_PGT, jnp.nan)

    surrogate_PGT, sums = _clipped_surrogate(_clamped(new_PGT - old_PGT), advantages_PGT, mask_PGT, options)
    if behaviour_logprobs_PGT is not None:
        own_PGT = mask_PGT if own_P is None else mask_PGT & own_P.astype(bool)[:, None, None]
        weight_PGT, more = _importance_weight(old_PGT, behaviour_logprobs_PGT, own_PGT, options.importance_cap)
        surrogate_PGT, sums = surrogate_PGT * weight_PGT, sums | more
    loss_PGT = -surrogate_PGT
    if reference_logprobs_PGT is not None:
        reference_PGT = jax.lax.stop_gradient(_masked(reference_logprobs_PGT, mask_PGT))
        k3_PGT = _k3(_clamped(reference_PGT - new_PGT))
        sums |= {"reference_tokens": _total(mask_PGT), "reference_kl": _total(k3_PGT)}
        if options.kl > 0:
            loss_PGT += options.kl * k3_PGT
    sums = zero_sums() | jax.lax.stop_gradient(sums)
    return _aggregate(loss_PGT, mask_PGT, denominators, options.loss), sums


def zero_sums() -> dict[str, jax.Array]:
    """The sums of nothing: where adding up micro-batches starts."""
    return {name: jnp.zeros((), jnp.float32) for name in SUM_NAMES}


def add_sums(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sums of two micro-batches together."""
    return {name: (jnp.maximum if name.endswith("_max") else jnp.add)(a[name], b[name]) for name in SUM_NAMES}


def finish_metrics(sums: dict[str, jax.Array]) -> dict[str, float]:
    """Means over tokens from the sums of a whole batch. What was not measured (no sampler or no reference log-probs, no
    weights, no tokens) is absent.

    policy_kl: k3 estimate of KL(old || new), nats a token; reference_kl: of KL(new || reference);
    logprob_difference_mean and _max: |trainer - sampler| over own tokens, nats.
    """
    s = {name: float(value) for name, value in sums.items()}
    metrics = {"tokens": s["tokens"]}
    for name, total, count in (
        ("ratio_mean", "ratio", "tokens"),
        ("clip_low_share", "clipped_low", "tokens"),
        ("clip_high_share", "clipped_high", "tokens"),
        ("policy_kl", "policy_kl", "tokens"),
        ("reference_kl", "reference_kl", "reference_tokens"),
        ("logprob_difference_mean", "logprob_difference", "own_tokens"),
        ("importance_weight_mean", "importance_weight", "weighted_tokens"),
        ("importance_truncated_share", "importance_truncated", "weighted_tokens"),
    ):
        if s[count]:
            metrics[name] = s[total] / s[count]
    if s["own_tokens"]:
        metrics["logprob_difference_max"] = s["logprob_difference_max"]
    return metrics


def _masked(x_PGT, mask_PGT) -> jax.Array:
    # Zero before any exp: a masked NaN or infinity would otherwise come back as 0 * NaN in the gradient.
    return jnp.where(mask_PGT, x_PGT.astype(jnp.float32), 0.0)


def _total(x) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)


def _clamped(log_ratio) -> jax.Array:
    return jnp.where(jnp.isfinite(log_ratio), jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO), jnp.nan)


def _k3(log_ratio) -> jax.Array:
    """KL(q || p) from tokens of q with log_ratio = log p - log q: unbiased, never negative."""
    return jnp.expm1(log_ratio) - log_ratio


def _clipped_surrogate(log_ratio_PGT, advantages_PGT, mask_PGT, options: LossOptions):
    """min(r A, clip(r) A), and the sums about r. At masked tokens r = 1 and A = 0."""
    ratio_PGT, low, high = jnp.exp(log_ratio_PGT), 1.0 - options.clip_low, 1.0 + options.clip_high
    surrogate_PGT = jnp.minimum(ratio_PGT * advantages_PGT, jnp.clip(ratio_PGT, low, high) * advantages_PGT)
    sums = {
        "tokens": _total(mask_PGT),
        "ratio": _total(jnp.where(mask_PGT, ratio_PGT, 0.0)),
        "clipped_low": _total((advantages_PGT < 0) & (ratio_PGT < low)),
        "clipped_high": _total((advantages_PGT > 0) & (ratio_PGT > high)),
        "policy_kl": _total(_k3(log_ratio_PGT)),
    }
    return surrogate_PGT, sums


def _importance_weight(old_PGT, behaviour_PGT, own_PGT, cap: float):
    """min(exp(old - behaviour), cap) at own tokens and 1 elsewhere, without a gradient; 1 everywhere for cap 0."""
    difference_PGT = jnp.where(own_PGT, old_PGT - behaviour_PGT.astype(jnp.float32), 0.0)
    gap_PGT = jnp.abs(difference_PGT)
    sums = {
        "own_tokens": _total(own_PGT),
        "logprob_difference": _total(gap_PGT),
        "logprob_difference_max": jnp.max(gap_PGT, initial=0.0),
    }
    if cap <= 0:
        return jnp.float32(1.0), sums
    raw_PGT = jnp.exp(_clamped(difference_PGT))
    weight_PGT = jnp.where(own_PGT, jnp.minimum(raw_PGT, cap), 1.0)
    sums |= {
        "weighted_tokens": _total(own_PGT),
        "importance_weight": _total(jnp.where(own_PGT, weight_PGT, 0.0)),
        "importance_truncated": _total(own_PGT & (raw_PGT > cap)),
    }
    return jax.lax.stop_gradient(weight_PGT), sums


def _aggregate(loss_PGT, mask_PGT, over: Denominators, loss: LossName) -> jax.Array:
    """The batch's mean of the per-token losses, this micro-batch's share of it; zero at masked tokens already."""
    if loss == "token_mean":
        return _total(loss_PGT) / over.tokens
    if loss == "sequence_mean":
        lengths_PG = jnp.sum(mask_PGT, axis=-1, dtype=jnp.float32)
        return _total(jnp.sum(loss_PGT, axis=-1) / jnp.maximum(lengths_PG, 1.0)) / over.sequences
    return _total(loss_PGT) / (over.sequences * over.max_tokens)
