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

# What is summed over tokens, by name: by `grpo_loss`, but for the entropy, which is known where the logits are. All are
# added over parts of a batch, but the maximum is taken of a "_max".
SUM_NAMES = (
    "tokens",
    "entropy",
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossInputs:
    """What the loss of a token depends on beside its log-probability under the policy; all of one shape, of which the
    loss knows nothing: tokens may be taken in any order and in parts."""

    old: jax.Array | None  # float32, nats; None: the policy of the batch is the present one (the first update on it)
    behaviour: jax.Array | None  # float32, nats: what the sampler reported; None: w = 1 everywhere
    reference: jax.Array | None  # float32, nats: needed where kl > 0, otherwise only measured
    advantages: jax.Array  # float32
    mask: jax.Array  # bool: completion tokens
    own: jax.Array  # bool: tokens whose `behaviour` is used; the others have w = 1
    share: jax.Array  # float32: what the token's loss counts for in that of the batch


def loss_inputs(
    old_PGT: jax.Array | None,
    behaviour_PGT: jax.Array | None,
    reference_PGT: jax.Array | None,
    advantages_PG: jax.Array,
    mask_PGT: jax.Array,
    over: Denominators,
    loss: LossName,
    own_P: jax.Array | None = None,
) -> LossInputs:
    """The inputs of a micro-batch, all [P, G, T], over which no sequence may be split. `own_P` (bool [P]): the groups
    whose answers were sampled here; None: all."""
    mask_PGT = mask_PGT.astype(bool)
    own_PGT = mask_PGT if own_P is None else mask_PGT & own_P.astype(bool)[:, None, None]
    advantages_PGT = jnp.broadcast_to(advantages_PG[..., None], mask_PGT.shape)
    share_PGT = _share(mask_PGT, over, loss)
    return LossInputs(old_PGT, behaviour_PGT, reference_PGT, advantages_PGT, mask_PGT, own_PGT, share_PGT)


def grpo_loss(
    new_logprobs: jax.Array, inputs: LossInputs, options: LossOptions
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What these tokens add to the batch's loss (float32 scalar) and to the sums for its metrics (float32 scalars).

    `new_logprobs`: in nats, of the shape of `inputs`; the gradient is with respect to them alone. ValueError where
    options.kl > 0 and there are no reference log-probabilities.
    """
    if options.kl > 0 and inputs.reference is None:
        raise ValueError(f"kl={options.kl} needs reference log-probabilities, those under the starting weights")
    mask = inputs.mask
    new = _masked(new_logprobs, mask)
    old = jax.lax.stop_gradient(new if inputs.old is None else _masked(inputs.old, mask))
    advantages = _masked(inputs.advantages, mask)
    advantages = jnp.where(jnp.isfinite(advantages), advantages, jnp.nan)

    surrogate, sums = _clipped_surrogate(_clamped(new - old), advantages, mask, options)
    if inputs.behaviour is not None:
        weight, more = _importance_weight(old, inputs.behaviour, inputs.own, options.importance_cap)
        surrogate, sums = surrogate * weight, sums | more
    loss = -surrogate
    if inputs.reference is not None:
        reference = jax.lax.stop_gradient(_masked(inputs.reference, mask))
        k3 = _k3(_clamped(reference - new))
        sums |= {"reference_tokens": _total(mask), "reference_kl": _total(k3)}
        if options.kl > 0:
            loss += options.kl * k3
    return _total(loss * inputs.share), zero_sums() | jax.lax.stop_gradient(sums)


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


def _masked(x, mask) -> jax.Array:
    # Zero before any exp: a masked NaN or infinity would otherwise come back as 0 * NaN in the gradient.
    return jnp.where(mask, x.astype(jnp.float32), 0.0)


def _total(x) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)


def _clamped(log_ratio) -> jax.Array:
    return jnp.where(jnp.isfinite(log_ratio), jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO), jnp.nan)


def _k3(log_ratio) -> jax.Array:
    """KL(q || p) from tokens of q with log_ratio = log p - log q: unbiased, never negative."""
    return jnp.expm1(log_ratio) - log_ratio


def _clipped_surrogate(log_ratio, advantages, mask, options: LossOptions):
    """min(r A, clip(r) A), and the sums about r. At masked tokens r = 1 and A = 0."""
    ratio, low, high = jnp.exp(log_ratio), 1.0 - options.clip_low, 1.0 + options.clip_high
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    sums = {
        "tokens": _total(mask),
        "ratio": _total(jnp.where(mask, ratio, 0.0)),
        "clipped_low": _total((advantages < 0) & (ratio < low)),
        "clipped_high": _total((advantages > 0) & (ratio > high)),
        "policy_kl": _total(_k3(log_ratio)),
    }
    return surrogate, sums


def _importance_weight(old, behaviour, own, cap: float):
    """min(exp(old - behaviour), cap) at own tokens and 1 elsewhere, without a gradient; 1 everywhere for cap 0."""
    difference = jnp.where(own, old - behaviour.astype(jnp.float32), 0.0)
    gap = jnp.abs(difference)
    sums = {
        "own_tokens": _total(own),
        "logprob_difference": _total(gap),
        "logprob_difference_max": jnp.max(gap, initial=0.0),
    }
    if cap <= 0:
        return jnp.float32(1.0), sums
    raw = jnp.exp(_clamped(difference))
    weight = jnp.where(own, jnp.minimum(raw, cap), 1.0)
    sums |= {
        "weighted_tokens": _total(own),
        "importance_weight": _total(jnp.where(own, weight, 0.0)),
        "importance_truncated": _total(own & (raw > cap)),
    }
    return jax.lax.stop_gradient(weight), sums


def _share(mask_PGT, over: Denominators, loss: LossName) -> jax.Array:
    """What each token counts for in the batch's mean of the per-token losses."""
    if loss == "token_mean":
        among = over.tokens
    elif loss == "sequence_mean":
        lengths_PG1 = jnp.sum(mask_PGT, axis=-1, keepdims=True, dtype=jnp.float32)
        among = jnp.maximum(lengths_PG1, 1.0) * over.sequences
    else:
        among = over.sequences * over.max_tokens
    return jnp.broadcast_to(jnp.float32(1.0) / among, mask_PGT.shape)
