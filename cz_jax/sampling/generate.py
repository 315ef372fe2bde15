"""The two compiled programs of inference: sampling completions, and reading the probabilities of given next tokens.

Legend: M steps, P prompts of one, G rows of a prompt, Tp prompt tokens, C new tokens, Ts suffix tokens, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cz_jax import rng, shapes
from cz_jax.models import qwen
from cz_jax.models.spec import Arch
from cz_jax.ports import SamplingMethod
from cz_jax.sampling.methods import draw

CHOICE_ROWS = 16  # rows whose logits over the vocabulary exist at one time


class Completions(NamedTuple):
    tokens: jax.Array  # int32 [P, G, C]
    logprobs: jax.Array  # float32 [P, G, C]
    lengths: jax.Array  # int32 [P, G]: tokens truly sampled, the stop token included
    ended: jax.Array  # bool [P, G]: the last of them is a stop id


@partial(jax.jit, static_argnames=("arch", "max_new_tokens", "method", "dtype"))
def generate(
    arch: Arch, params, prompts_PT, lengths_P, keys_PG2, limits_PG, stop_ids_S,
    *, max_new_tokens: int, method: SamplingMethod, dtype=jnp.float32,
) -> Completions:  # fmt: skip
    """G completions of each right-padded prompt (int32 [P, Tp]) from one prefill; a row ends with one of `stop_ids_S`,
    or with as many tokens as `limits_PG` (int32, at most C; 0: no row) says. `keys_PG2` (uint32): the key of each row;
    position c of a row draws from it and c alone."""
    p, g = limits_PG.shape
    params = jax.tree.map(lambda w: w.astype(dtype), params)  # once, and not again at every step
    layered = qwen.for_decoding(arch, params, prompts_PT.shape[1] + max_new_tokens)
    keys = keys_PG2.reshape(p * g, 2)

    def next_token(logits_VR, at):
        token, logprob = draw(logits_VR, rng.uniform_at(keys, jnp.full(p * g, at)), method)
        return token.reshape(p, g), logprob.reshape(p, g)

    def record(state, token, logprob, at):
        live = ~state["done"]
        ended = live & (token[..., None] == stop_ids_S).any(-1)
        lengths = state["lengths"] + live
        return state | {
            "tokens": jax.lax.dynamic_update_index_in_dim(state["tokens"], jnp.where(live, token, 0), at, 2),
            "logprobs": jax.lax.dynamic_update_index_in_dim(state["logprobs"], jnp.where(live, logprob, 0.0), at, 2),
            "lengths": lengths,
            "ended": state["ended"] | ended,
            "done": state["done"] | ended | (lengths == limits_PG),
            "last": token,
            "at": at,
        }

    last, prompt = qwen.prefill(arch, params, prompts_PT, lengths_P, dtype)
    state = {
        "tokens": jnp.zeros((p, g, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((p, g, max_new_tokens), jnp.float32),
        "lengths": jnp.zeros((p, g), jnp.int32),
        "ended": jnp.zeros((p, g), bool),
        "done": limits_PG == 0,
    }
    logits = jnp.repeat(qwen.next_logits(arch, params, last), g, axis=1)
    state = record(state, *next_token(logits, 0), jnp.int32(0))
    state["suffix"] = qwen.empty_suffix(arch, p * g, 0, prompt.keys[0].dtype)

    visible = (jnp.arange(prompts_PT.shape[1]) < lengths_P[:, None])[:, None]

    def body(state):
        at = state["at"]
        positions = jnp.broadcast_to(lengths_P[:, None] + at, (p, g))
        seen = jnp.arange(state["suffix"][0][0].shape[-1]) <= at
        hidden, suffix = qwen.decode(
            arch, layered, state["last"], positions, at, seen, prompt, visible, state["suffix"]
        )
        at += 1
        logits = qwen.next_logits(arch, params, hidden.reshape(p * g, -1))
        return record(state | {"suffix": suffix}, *next_token(logits, at), at)

    for length in shapes.cache_lengths(max_new_tokens):
        state["suffix"] = qwen.longer_suffix(state["suffix"], length)
        end = min(length, max_new_tokens - 1)  # nothing reads the keys and values of the last token
        state = jax.lax.while_loop(lambda s, end=end: (s["at"] < end) & ~s["done"].all(), body, state)
    return Completions(state["tokens"], state["logprobs"], state["lengths"], state["ended"])


@partial(jax.jit, static_argnames=("arch", "dtype"))
def choice_probabilities(
    arch: Arch, params, prompts_MPT, lengths_MP, suffixes_MPGT, suffix_lengths_MPG, choices_S, *, dtype
):
    """float32 [M, P, G, S]: P(next token = choices[s]) behind suffix (m, p, g), which itself stands behind prompt
    (m, p). P prompts at a time; a suffix of no tokens is none, and steps behind the last that has one are not made. NaN
    where a logit is not finite."""
    m, p, g = suffix_lengths_MPG.shape

    def read(row_D):
        logits = qwen.next_logits(arch, params, row_D[None])[:, 0]
        chosen = jnp.exp(logits[choices_S] - jax.nn.logsumexp(logits))
        return jnp.where(jnp.isfinite(logits).all(), chosen, jnp.nan)

    def step(i, found):
        suffixes_PGT, lengths_PG = suffixes_MPGT[i], jnp.maximum(suffix_lengths_MPG[i], 1)
        last = qwen.last_hidden(arch, params, prompts_MPT[i], lengths_MP[i], suffixes_PGT, lengths_PG, dtype)
        chosen = jax.lax.map(read, last.reshape(p * g, -1), batch_size=min(CHOICE_ROWS, p * g))
        return found.at[i].set(chosen.reshape(p, g, -1))

    steps = shapes.filled(suffix_lengths_MPG)
    return jax.lax.fori_loop(0, steps, step, jnp.zeros((m, p, g, len(choices_S))))
