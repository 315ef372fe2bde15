"""Sampling more rows than are decoded side by side: inside of the compiled loop, the slot of a row that has ended takes
the next row of a queue, so that a long answer holds up no slot but its own.

All slots write their keys and values into one column of their caches, the same for all, which moves on by one each step
and round at the end; a slot sees the columns since it took its row. A row begins with its prompt's last token, whose
next token is the row's first. The queue is one for each way that the batch is split, and rows stay where they are.

Legend: W ways that the batch is split, S slots of a way, N rows of a way, P prompts, G rows of a prompt, Tp prompt
tokens, C new tokens.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from cz_jax import rng
from cz_jax.models import qwen
from cz_jax.models.spec import Arch
from cz_jax.ports import SamplingMethod
from cz_jax.sampling.generate import Completions
from cz_jax.sampling.methods import draw


@partial(jax.jit, static_argnames=("arch", "slots", "ways", "max_new_tokens", "method", "dtype"))
def generate_queued(
    arch: Arch, params, prompts_PT, lengths_P, keys_PG2, limits_PG, stop_ids_S,
    *, slots: int, ways: int, max_new_tokens: int, method: SamplingMethod, dtype=jnp.float32,
) -> Completions:  # fmt: skip
    """What `generate` gives for the same arguments, from `slots` rows at a time (a multiple of `ways`, which divides
    P). In each way, prompts without rows come last."""
    group = limits_PG.shape[1]
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    head, layered = qwen.head_matrix(arch, params), qwen.unstacked(arch, params)
    prompts = _prefill(arch, params, prompts_PT, lengths_P, ways, slots, group, dtype)
    queue = _Queue(prompts_PT, lengths_P, keys_PG2, limits_PG, ways)

    def step(state):
        rows, at = state["row"], state["at"]
        length, key = (queue.of(a, rows) for a in (queue.lengths, queue.keys))
        age = (state["column"] - jnp.arange(max_new_tokens)) % max_new_tokens
        hidden, suffix = qwen.decode(
            arch, layered, state["token"].reshape(-1, 1), (length - 1 + at).reshape(-1, 1), state["column"],
            age <= at.reshape(-1, 1),
            qwen.PromptCache(*state["prompt"], (length - 1).reshape(-1)), state["suffix"],
        )  # fmt: skip
        logits = qwen.logits_of(hidden[:, 0], head)
        token, logprob = draw(logits, rng.uniform_at(key.reshape(-1, 2), at.reshape(-1)), method)
        ended = (token[:, None] == stop_ids_S).any(-1).reshape(rows.shape)
        token, logprob = token.reshape(rows.shape), logprob.reshape(rows.shape)
        put = jax.vmap(lambda kept, rows, at, new: kept.at[rows, at].set(new))
        put_row = jax.vmap(lambda kept, rows, new: kept.at[rows].set(new))
        return state | {
            "tokens": put(state["tokens"], rows, at, token),
            "logprobs": put(state["logprobs"], rows, at, logprob),
            "lengths": put_row(state["lengths"], rows, at + 1),
            "ended": put_row(state["ended"], rows, ended),
            "row": jnp.where(ended | (at + 1 == queue.of(queue.limits, rows)), queue.none, rows),
            "at": at + 1,
            "token": token,
            "suffix": suffix,
            "column": (state["column"] + 1) % max_new_tokens,
        }

    def body(state):
        return step(jax.lax.while_loop(lambda s: queue.takers(s).any(), partial(_take, queue, prompts, group), state))

    state = _empty(arch, queue, prompts, ways, slots, max_new_tokens)
    state = jax.lax.while_loop(lambda s: (s["row"] < queue.none).any() | queue.left(s).any(), body, state)

    def result(name):
        kept = state[name][:, : queue.none]
        return kept.reshape(*limits_PG.shape, *kept.shape[2:])

    return Completions(*(result(name) for name in Completions._fields))


def prompts_side_by_side(prompts: int, slots: int, group: int) -> int:
    """How many of a way's `prompts` are prefilled at a time: about as many as fill its `slots`."""
    return math.gcd(prompts, max(1, slots // group))


def _prefill(arch: Arch, params, prompts_PT, lengths_P, ways: int, slots: int, group: int, dtype):
    """(keys, values), each per layer [W, P / W, Tp, K, H]; as many prompts at a time as fill the slots."""
    each = prompts_PT.shape[0] // ways
    at_once = prompts_side_by_side(each, slots // ways, group)

    def parts(a):  # [P, ...] -> [parts, W * at_once, ...]
        split = jnp.moveaxis(a.reshape(ways, -1, at_once, *a.shape[1:]), 1, 0)
        return split.reshape(-1, ways * at_once, *a.shape[1:])

    def whole(a):  # [parts, W * at_once, ...] -> [W, P / W, ...]
        split = jnp.moveaxis(a.reshape(-1, ways, at_once, *a.shape[2:]), 0, 1)
        return split.reshape(ways, each, *a.shape[2:])

    def one(part):
        _, cache = qwen.prefill(arch, params, *part, dtype)
        return cache.keys, cache.values

    return jax.tree.map(whole, jax.lax.map(one, (parts(prompts_PT), parts(lengths_P))))


def _empty(arch: Arch, queue, prompts, ways: int, slots: int, max_new_tokens: int) -> dict:
    """Free slots, and results in which nothing is written; the last place of them is for slots without a row."""
    made, seats, dtype = (ways, queue.none + 1), (ways, slots // ways), prompts[0][0].dtype
    return {
        "tokens": jnp.zeros((*made, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((*made, max_new_tokens), jnp.float32),
        "lengths": jnp.zeros(made, jnp.int32),
        "ended": jnp.zeros(made, bool),
        "row": jnp.full(seats, queue.none, jnp.int32),
        "at": jnp.zeros(seats, jnp.int32),
        "token": jnp.zeros(seats, jnp.int32),
        "next": jnp.zeros(ways, jnp.int32),
        "column": jnp.int32(0),
        "prompt": tuple(tuple(jnp.zeros((slots, *a.shape[2:]), dtype) for a in of) for of in prompts),
        "suffix": qwen.empty_suffix(arch, slots, max_new_tokens, dtype),
    }


class _Queue:
    """The rows of each way in order. `none`: the number of no row, for which all arrays hold a place."""

    def __init__(self, prompts_PT, lengths_P, keys_PG2, limits_PG, ways: int):
        group = limits_PG.shape[1]
        self.none = limits_PG.size // ways

        def rows(a_P, empty):
            a_WN = jnp.repeat(a_P.reshape(ways, -1), group, axis=1)
            return jnp.pad(a_WN, ((0, 0), (0, 1)), constant_values=empty)

        last_P = jnp.take_along_axis(prompts_PT, (lengths_P - 1)[:, None], axis=1)[:, 0]
        self.lengths, self.last = rows(lengths_P, 1), rows(last_P, 0)
        self.keys = jnp.pad(keys_PG2.reshape(ways, -1, 2), ((0, 0), (0, 1), (0, 0)))
        self.limits = jnp.pad(limits_PG.reshape(ways, -1), ((0, 0), (0, 1)))
        self.total = (limits_PG > 0).reshape(ways, -1).sum(-1)

    def of(self, values, rows):
        """`values` [W, N + 1, ...] of `rows` ([W] or [W, S])."""
        return jax.vmap(lambda v, r: v[r])(values, rows)

    def left(self, state):
        """bool [W]: whether rows wait."""
        return state["next"] < self.total

    def takers(self, state):
        """bool [W]: whether a row waits and a slot is free."""
        return self.left(state) & (state["row"] == self.none).any(-1)


def _take(queue: _Queue, prompts, group: int, state):
    """In each way that has one to take, the first free slot takes the next row, with a copy of its prompt's cache."""
    takes, slot = queue.takers(state), jnp.argmax(state["row"] == queue.none, axis=-1)
    row = jnp.where(takes, state["next"], queue.none)

    def set_slot(kept_WS, new_W):
        return jax.vmap(lambda kept, slot, take, new: kept.at[slot].set(jnp.where(take, new, kept[slot])))(
            kept_WS, slot, takes, new_W
        )

    def copy(cache, prompts):  # [W * S, Tp, K, H], [W, P / W, Tp, K, H]
        split = cache.reshape(len(takes), -1, *cache.shape[1:])
        copied = jax.vmap(lambda cache, prompts, slot, take, row: jax.lax.dynamic_update_index_in_dim(
            cache, jnp.where(take, prompts[row // group], cache[slot]), slot, 0
        ))(split, prompts, slot, takes, row)  # fmt: skip
        return copied.reshape(cache.shape)

    return state | {
        "row": set_slot(state["row"], row),
        "at": set_slot(state["at"], jnp.zeros_like(row)),
        "token": set_slot(state["token"], queue.of(queue.last, row)),
        "next": state["next"] + takes,
        "prompt": jax.tree.map(copy, state["prompt"], prompts),
    }
