"""Log-probabilities of completion tokens, without a buffer over all tokens and the whole vocabulary.

Legend: P prompts, G rollouts, T completion tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from cz_jax.config import Remat
from cz_jax.models import qwen
from cz_jax.models.spec import Arch


def chunked_logprobs(hidden_PGTD, head_DV, targets_PGT, *, chunk: int, temperature: float):
    """(log-probability of each target, entropy of its distribution), float32 [P, G, T], nats, of softmax(logits /
    temperature). The entropy carries no gradient.

    About `chunk` tokens at a time have logits, forward and backward: the backward pass computes a chunk's logits again.
    Chunks are cut along the tokens of a prompt, so that the prompts may be split over devices.
    """
    p, g, t, d = hidden_PGTD.shape
    width = max(1, min(chunk // p, g * t))
    missing = -(g * t) % width
    hidden = jnp.pad(hidden_PGTD.reshape(p, g * t, d), ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets_PGT.reshape(p, g * t), ((0, 0), (0, missing)))
    hidden = jnp.moveaxis(hidden.reshape(p, -1, width, d), 1, 0).reshape(-1, p * width, d)
    targets = jnp.moveaxis(targets.reshape(p, -1, width), 1, 0).reshape(-1, p * width)

    def read(_, chunk):
        return None, _read(*chunk, head_DV, temperature)

    _, both = jax.lax.scan(read, None, (hidden, targets))
    return tuple(jnp.moveaxis(a.reshape(-1, p, width), 0, 1).reshape(p, -1)[:, : g * t].reshape(p, g, t) for a in both)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _read(hidden_CD, targets_C, head_DV, temperature: float):
    """(log-probability, entropy), float32 [C], of a chunk. Its derivative is written out: logits are computed again,
    their normaliser is not, and the gradient takes their place in memory."""
    return _read_forward(hidden_CD, targets_C, head_DV, temperature)[0]


def _read_forward(hidden_CD, targets_C, head_DV, temperature):
    logits = qwen.logits_of(hidden_CD, head_DV) / temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets_C[:, None], axis=-1)[:, 0]
    flat = logits - normaliser[:, None]
    entropy = -jnp.sum(jnp.exp(flat) * flat, axis=-1)
    return (chosen - normaliser, entropy), (hidden_CD, targets_C, head_DV, normaliser)


def _read_backward(temperature, kept, gradients):
    hidden_CD, targets_C, head_DV, normaliser = kept
    logits, pull = jax.vjp(qwen.logits_of, hidden_CD, head_DV)
    # Without the barrier XLA pulls the loss into the loop over the vocabulary, which then needs a buffer of its own.
    scale, normaliser = jax.lax.optimization_barrier((gradients[0] / temperature, normaliser))
    chosen = jnp.arange(logits.shape[-1]) == targets_C[:, None]
    dhidden, dhead = pull((chosen - jnp.exp(logits / temperature - normaliser[:, None])) * scale[:, None])
    return dhidden, None, dhead


_read.defvjp(_read_forward, _read_backward)


def completion_logprobs(
    arch: Arch,
    params,
    prompts_PT,
    prompt_lengths_P,
    completions_PGT,
    *,
    dtype,
    remat: Remat,
    chunk: int,
    temperature: float,
):
    """(log-probabilities, entropies), float32 [P, G, T], of completions behind right-padded prompts; each prompt is
    computed once for its G completions. What stands in a completion's padding is read too: mask it."""
    prompt, suffix = qwen.shared_forward(arch, params, prompts_PT, prompt_lengths_P, completions_PGT, dtype, remat)
    hidden = qwen.predicting_hidden(prompt, prompt_lengths_P, suffix)
    head = qwen.head_matrix(arch, params)
    return chunked_logprobs(hidden, head, completions_PGT, chunk=chunk, temperature=temperature)
