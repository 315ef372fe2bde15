"""Log-probabilities of completion tokens, without a buffer over all tokens and the whole vocabulary.

Legend: P prompts, G rollouts, T completion tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

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
    hidden = jnp.moveaxis(hidden.reshape(p, -1, width, d), 1, 0)
    targets = jnp.moveaxis(targets.reshape(p, -1, width), 1, 0)

    def read(hidden_PCD, targets_PC):
        logits = qwen.logits_of(hidden_PCD, head_DV) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # A sum over the vocabulary rather than an index: its derivative is no scatter, and a split vocabulary stays so.
        chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets_PC[..., None], logits, 0.0).sum(-1)
        flat = jax.lax.stop_gradient(logits - normaliser[..., None])
        return chosen - normaliser, -jnp.sum(jnp.exp(flat) * flat, axis=-1)

    if hidden.shape[0] > 1:
        read = jax.checkpoint(read)
    _, both = jax.lax.scan(lambda _, x: (None, read(*x)), None, (hidden, targets))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(p, -1)[:, : g * t].reshape(p, g, t) for a in both)


def completion_logprobs(
    arch: Arch,
    params,
    prompts_PT,
    prompt_lengths_P,
    completions_PGT,
    *,
    dtype,
    remat: bool,
    chunk: int,
    temperature: float,
):
    """(log-probabilities, entropies), float32 [P, G, T], of completions behind right-padded prompts; each prompt is
    computed once for its G completions. What stands in a completion's padding is read too: mask it."""
    prompt, suffix = qwen.shared_forward(arch, params, prompts_PT, prompt_lengths_P, completions_PGT, dtype, remat)
    hidden = qwen.predicting_hidden(prompt, prompt_lengths_P, suffix)
    head = qwen.head_matrix(arch, params)
    return chunked_logprobs(hidden, head, completions_PGT, chunk=chunk, temperature=temperature)
