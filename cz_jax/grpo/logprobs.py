"""Log-probabilities of completion tokens, and their loss, without a buffer over all tokens and the whole vocabulary.

Legend: P prompts, G rollouts, T completion tokens, D hidden, V vocabulary, S chunks, C tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from cz_jax.grpo.loss import LossInputs, LossOptions, add_sums, grpo_loss, zero_sums
from cz_jax.models import qwen


def chunked_logprobs(hidden_PGTD, head_DV, targets_PGT, *, chunk: int, temperature: float) -> jax.Array:
    """Log-probability of each target, float32 [P, G, T], nats, of softmax(logits / temperature). For use without a
    gradient: about `chunk` tokens at a time have logits, but a backward pass would keep them all."""
    p, g, t = targets_PGT.shape

    def read(_, chunk):
        hidden_CD, targets_C = chunk
        logits = qwen.logits_of(hidden_CD, head_DV) / temperature
        return None, _chosen(logits, targets_C) - jax.nn.logsumexp(logits, axis=-1)

    _, logprobs_SC = jax.lax.scan(read, None, _cut((hidden_PGTD, targets_PGT), chunk))
    return jnp.moveaxis(logprobs_SC.reshape(len(logprobs_SC), p, -1), 0, 1).reshape(p, -1)[:, : g * t].reshape(p, g, t)


def chunked_loss(
    hidden_PGTD, head_DV, targets_PGT, inputs: LossInputs, options: LossOptions, *, chunk: int, temperature: float
):
    """(loss, sums) as `grpo_loss` has them, of the targets under softmax(logits / temperature), and the entropy of that
    in nats among the sums.

    About `chunk` tokens at a time have logits, once: what the gradient needs of them is worked out together with the
    loss, since a token's gradient depends on no other token.
    """
    return _loss(head_DV, *_cut((hidden_PGTD, targets_PGT, inputs), chunk), options, temperature)


def _cut(arrays_PGT, chunk: int):
    """The tree of arrays [P, G, T, ...] in chunks, [S, C, ...], padded with zeros. Chunks are cut along the tokens of a
    prompt, so that the prompts may be split over devices."""

    def one(a):
        p, g, t, *rest = a.shape
        width = max(1, min(chunk // p, g * t))
        a = jnp.pad(a.reshape(p, g * t, *rest), ((0, 0), (0, -(g * t) % width), *((0, 0) for _ in rest)))
        return jnp.moveaxis(a.reshape(p, -1, width, *rest), 1, 0).reshape(-1, p * width, *rest)

    return jax.tree.map(one, arrays_PGT)


def _chosen(logits_CV, targets_C):
    return jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(head_DV, hidden_SCD, targets_SC, inputs_SC: LossInputs, options: LossOptions, temperature: float):
    return _loss_forward(head_DV, hidden_SCD, targets_SC, inputs_SC, options, temperature)[0]


def _loss_forward(head_DV, hidden_SCD, targets_SC, inputs_SC, options, temperature):
    def read(total, chunk):
        hidden_CD, targets_C, inputs_C = chunk
        logits, pull = jax.vjp(qwen.logits_of, hidden_CD, head_DV)
        flat = logits / temperature
        normaliser = jax.nn.logsumexp(flat, axis=-1)
        logprobs = _chosen(flat, targets_C) - normaliser
        (loss, sums), slope = jax.value_and_grad(grpo_loss, has_aux=True)(logprobs, inputs_C, options)
        flat -= normaliser[:, None]
        sums["entropy"] = -jnp.where(inputs_C.mask, jnp.sum(jnp.exp(flat) * flat, axis=-1), 0.0).sum()
        # Without the barrier XLA pulls the loss into the loop over the vocabulary, which then needs a buffer more.
        scale, normaliser = jax.lax.optimization_barrier((slope / temperature, normaliser))
        chosen = jnp.arange(logits.shape[-1]) == targets_C[:, None]
        dhidden, dhead = pull((chosen - jnp.exp(logits / temperature - normaliser[:, None])) * scale[:, None])
        old_loss, old_sums, old_dhead = total
        return (old_loss + loss, add_sums(old_sums, sums), old_dhead + dhead), dhidden

    start = jnp.zeros(()), zero_sums(), jnp.zeros_like(head_DV)
    (loss, sums, dhead), dhidden = jax.lax.scan(read, start, (hidden_SCD, targets_SC, inputs_SC))
    return (loss, sums), (dhead, dhidden)


def _loss_backward(options, temperature, kept, cotangents):
    dhead, dhidden = kept
    return dhead * cotangents[0].astype(dhead.dtype), dhidden * cotangents[0].astype(dhidden.dtype), None, None


_loss.defvjp(_loss_forward, _loss_backward)
