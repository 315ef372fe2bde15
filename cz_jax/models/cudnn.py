"""Attention of prompts and their suffixes by cuDNN's fused attention, which `jax.nn` calls on NVIDIA GPUs: no scores in
memory. Legend: P prompts, T positions of a prompt and its suffixes, N query heads, K key/value heads, H head size.

Its backward pass adds up in no fixed order, so that two runs differ in the last bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cz_jax.models.attention import KEPT, on_each_device


def attend_packed(
    q_PTNH, k_PTKH, v_PTKH, lengths_P, suffixes: int, suffix_tokens: int, *, implementation: str = "cudnn"
) -> jax.Array:
    """What `attention.attend_packed` gives at every position that is not padding; [P, T, N, H] in the dtype of v. Under
    a mesh every device has its own prompts, and its own heads where they divide. `implementation`: of
    jax.nn.dot_product_attention; "xla" does the same anywhere. cuDNN takes bfloat16, to which Config sees."""
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)

    def here(q, k, v, lengths):
        return _attend(attend, q, k, v, lengths, suffixes, suffix_tokens)

    return checkpoint_name(on_each_device(here, q_PTNH, k_PTKH, v_PTKH, lengths_P), KEPT)


def _attend(attend, q_PTNH, k_PTKH, v_PTKH, lengths_P, suffixes: int, suffix_tokens: int):
    p, positions, heads, h = q_PTNH.shape
    prompt = positions - suffixes * suffix_tokens

    def suffixes_as_heads(x):  # [P, suffix's tokens, suffixes and heads, H]
        by_suffix = x[:, prompt:].reshape(p, suffixes, suffix_tokens, -1, h)
        return jnp.swapaxes(by_suffix, 1, 2).reshape(p, suffix_tokens, -1, h)

    def behind_prompt(x):
        return jnp.concatenate([jnp.tile(x[:, :prompt], (1, 1, suffixes, 1)), suffixes_as_heads(x)], axis=1)

    out = attend(q_PTNH[:, :prompt], k_PTKH[:, :prompt], v_PTKH[:, :prompt], is_causal=True)
    if not suffixes:
        return out
    key = jnp.arange(prompt + suffix_tokens)
    seen = jnp.where(key < prompt, key < lengths_P[:, None, None], key - prompt <= jnp.arange(suffix_tokens)[:, None])
    behind = attend(suffixes_as_heads(q_PTNH), behind_prompt(k_PTKH), behind_prompt(v_PTKH), mask=seen[:, None])
    behind = jnp.swapaxes(behind.reshape(p, suffix_tokens, suffixes, heads, h), 1, 2)
    return jnp.concatenate([out, behind.reshape(p, -1, heads, h)], axis=1)
