"""Attention of prompts and their suffixes by Splash Attention, the blockwise TPU kernel that comes with JAX: no scores
in memory, and no work for blocks that nobody sees.

Which key a query may see is known when a program is compiled, but for the padding of the prompts, which goes in as
segments. Legend: P prompts, T positions of a prompt and its suffixes, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from cz_jax.models.attention import KEPT, on_each_device

BLOCKS = ((2048, 512), (1024, 256), (0, 128))  # (from so many positions, block): larger blocks, but little padding


def attend_packed(
    q_PTNH, k_PTKH, v_PTKH, lengths_P, suffixes: int, suffix_tokens: int, *, interpret: bool = False
) -> jax.Array:
    """What `attention.attend_packed` gives at every position that is not padding; [P, T, N, H] in the dtype of v. Under
    a mesh every device has its own prompts, and its own heads where they divide. `interpret`: without a TPU, slowly."""

    def here(q, k, v, lengths):
        return _attend(q, k, v, lengths, suffixes, suffix_tokens, interpret)

    return on_each_device(here, q_PTNH, k_PTKH, v_PTKH, lengths_P)


def visible(positions: int, suffixes: int, suffix_tokens: int, padded: int) -> np.ndarray:
    """bool [padded, padded]: which key a query may see. Positions are the prompt's, and then the suffixes', one behind
    the other; what is beyond them sees the prompt, since every query has to see something."""
    at = np.arange(padded)
    prompt = positions - suffixes * suffix_tokens
    row = np.where(at < prompt, -1, (at - prompt) // max(1, suffix_tokens))
    row = np.where(at < positions, row, suffixes)
    return (at[:, None] >= at) & ((row == -1) | (row[:, None] == row))


def _attend(q_PTNH, k_PTKH, v_PTKH, lengths_P, suffixes: int, suffix_tokens: int, interpret: bool):
    positions, heads, size = q_PTNH.shape[1:]
    block = next(block for least, block in BLOCKS if positions >= least)
    padded = -(-positions // block) * block

    def heads_first(x):
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - positions), (0, 0), (0, 0))), 1, 2)

    seen = splash.NumpyMask(visible(positions, suffixes, suffix_tokens, padded))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads), head_shards=1, q_seq_shards=1, residual_checkpoint_name=KEPT,
        interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
    )  # fmt: skip
    at = jnp.arange(padded)
    padding = (at >= lengths_P[:, None]) & (at < positions - suffixes * suffix_tokens)
    segments = splash.SegmentIds(jnp.zeros(padding.shape, jnp.int32), padding.astype(jnp.int32))
    out = jax.vmap(kernel)(
        heads_first(q_PTNH * jnp.asarray(size**-0.5, q_PTNH.dtype)), heads_first(k_PTKH), heads_first(v_PTKH), segments
    )
    return jnp.swapaxes(out, 1, 2)[:, :positions]
