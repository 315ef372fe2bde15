"""Sampling more rows than are decoded side by side: inside of the compiled loop, the slot of a row that has ended takes
the next row of a queue, so that a long answer holds up no slot but its own.

Slots sit in blocks, one for each G of them, whose rows read the prompts that the block holds: two, so that rows of the
next prompt begin while the last of one still run. A block fetches a prompt when it has a place for it, a slot is free
and no row of the prompts that it holds waits. All slots write their keys and values into one column of their caches,
the same for all, which moves on by one each step and round at the end; a slot sees the columns since it took its row. A
row begins with its prompt's last token, whose next token is the row's first. The queue is one for each way that the
batch is split, and rows stay where they are.

Legend: W ways that the batch is split, B blocks of a way, S slots of a block, M prompts that a block holds, N rows of a
way, P prompts, G rows of a prompt, Tp prompt tokens, C new tokens.
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
    P). A prompt has all of its rows or none; in each way, those without come last."""
    group, length = limits_PG.shape[1], prompts_PT.shape[1]
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    layered = qwen.for_decoding(arch, params)
    prompts = _prefill(arch, params, prompts_PT, lengths_P, ways, slots, group, dtype)
    queue = _Queue(prompts_PT, lengths_P, keys_PG2, limits_PG, ways)

    def step(state):
        rows, at = state["row"], state["at"]  # W B S
        lengths, key = (queue.of(a, rows) for a in (queue.lengths, queue.keys))
        age = (state["column"] - jnp.arange(max_new_tokens)) % max_new_tokens
        mine = (rows // group)[..., None] == state["held"][:, :, None]  # W B S M
        visible = jnp.arange(length) < (lengths - 1)[..., None]
        blocks = ways * rows.shape[1]
        hidden, suffix = qwen.decode(
            arch, layered, state["token"].reshape(blocks, -1), (lengths - 1 + at).reshape(blocks, -1), state["column"],
            age <= at.reshape(-1, 1), qwen.PromptCache(*state["prompt"]), visible.reshape(blocks, -1, length),
            state["suffix"], jnp.argmax(mine, axis=-1).reshape(blocks, -1),
        )  # fmt: skip
        logits = qwen.next_logits(arch, params, hidden.reshape(rows.size, -1))
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
        state = jax.lax.while_loop(lambda s: queue.fetchers(s).any(), partial(_fetch, queue, prompts), state)
        return step(_take(queue, state))

    state = _empty(arch, queue, prompts, ways, slots, max_new_tokens)
    state = jax.lax.while_loop(queue.goes_on, body, state)

    def result(name):
        kept = state[name][:, : queue.none]
        return kept.reshape(*limits_PG.shape, *kept.shape[2:])

    return Completions(*(result(name) for name in Completions._fields))


def blocks_of(slots: int, group: int) -> tuple[int, int, int]:
    """(blocks, slots of each, prompts that each holds) of a way with `slots` slots, of which none is left over. Rows
    that are alone with their prompt free its place when they end; others need a second one."""
    width = max(n for n in range(1, min(group, slots) + 1) if slots % n == 0)
    return slots // width, width, min(group, 2)


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
    blocks, width, held = blocks_of(slots // ways, queue.group)
    made, seats, dtype = (ways, queue.none + 1), (ways, blocks, width), prompts[0][0].dtype

    def places(a):  # [W, P / W, K, T or H, H or T]: the places of a block, side by side along the last axis
        return jnp.zeros((ways * blocks, *a.shape[2:-1], held * a.shape[-1]), dtype)

    keys, values = prompts
    return {
        "tokens": jnp.zeros((*made, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((*made, max_new_tokens), jnp.float32),
        "lengths": jnp.zeros(made, jnp.int32),
        "ended": jnp.zeros(made, bool),
        "row": jnp.full(seats, queue.none, jnp.int32),
        "at": jnp.zeros(seats, jnp.int32),
        "token": jnp.zeros(seats, jnp.int32),
        "held": jnp.full((ways, blocks, held), queue.prompts, jnp.int32),
        "begun": jnp.full((ways, blocks, held), queue.group, jnp.int32),
        "next": jnp.zeros(ways, jnp.int32),
        "column": jnp.int32(0),
        "prompt": (tuple(map(places, keys)), tuple(map(places, values))),
        "suffix": qwen.empty_suffix(arch, ways * blocks * width, max_new_tokens, dtype),
    }


class _Queue:
    """The prompts of each way in order, and their rows. `none`: the number of no row, for which all arrays hold a
    place; `prompts`: that of no prompt."""

    def __init__(self, prompts_PT, lengths_P, keys_PG2, limits_PG, ways: int):
        self.group = limits_PG.shape[1]
        self.none = limits_PG.size // ways
        self.prompts = len(limits_PG) // ways

        def rows(a_P, empty):
            a_WN = jnp.repeat(a_P.reshape(ways, -1), self.group, axis=1)
            return jnp.pad(a_WN, ((0, 0), (0, 1)), constant_values=empty)

        last_P = jnp.take_along_axis(prompts_PT, (lengths_P - 1)[:, None], axis=1)[:, 0]
        self.lengths, self.last = rows(lengths_P, 1), rows(last_P, 0)
        self.keys = jnp.pad(keys_PG2.reshape(ways, -1, 2), ((0, 0), (0, 1), (0, 0)))
        self.limits = jnp.pad(limits_PG.reshape(ways, -1), ((0, 0), (0, 1)))
        self.total = (limits_PG > 0).any(-1).reshape(ways, -1).sum(-1)

    def of(self, values, rows):
        """`values` [W, N + 1, ...] of `rows` [W, ...]."""
        return jax.vmap(lambda v, r: v[r])(values, rows)

    def waiting(self, state):
        """bool [W]: whether prompts wait."""
        return state["next"] < self.total

    def goes_on(self, state):
        """bool []: whether there is a row that runs or waits."""
        rows = (state["row"] < self.none).any() | (state["begun"] < self.group).any()
        return rows | self.waiting(state).any()

    def free_places(self, state):
        """bool [W, B, M]: whether all rows of the prompt have begun and none of them runs."""
        row = state["row"][..., None]  # W B S 1
        runs = (row // self.group == state["held"][:, :, None]) & (row != self.none)
        return (state["begun"] == self.group) & ~runs.any(2)

    def fetchers(self, state):
        """bool [W, B]: whether a prompt waits, and the block has a place for it and a slot that nothing else takes."""
        free = (state["row"] == self.none).sum(-1)
        asked = (self.group - state["begun"]).sum(-1)
        return self.waiting(state)[:, None] & (free > asked) & self.free_places(state).any(-1)


def _fetch(queue: _Queue, prompts, state):
    """In each way that has one, the first block that wants a prompt takes a copy of the next one's cache."""
    fetchers = queue.fetchers(state)
    takes, block = fetchers.any(-1), jnp.argmax(fetchers, axis=-1)  # W
    place = jnp.argmax(jax.vmap(lambda free, b: free[b])(queue.free_places(state), block), axis=-1)
    prompt = jnp.minimum(state["next"], queue.prompts - 1)

    def put(kept_WBM, new_W):
        return jax.vmap(lambda kept, b, m, take, new: kept.at[b, m].set(jnp.where(take, new, kept[b, m])))(
            kept_WBM, block, place, takes, new_W
        )

    def copy(cache, prompts):  # [W * B, K, H, M * Tp] and [W, P / W, K, H, Tp], or H and Tp the other way
        split = cache.reshape(len(takes), -1, *cache.shape[1:])

        def one(cache, prompts, b, m, take, p):
            start = (b, 0, 0, m * prompts.shape[-1])
            old = jax.lax.dynamic_slice(cache, start, (1, *prompts.shape[1:]))
            return jax.lax.dynamic_update_slice(cache, jnp.where(take, prompts[p][None], old), start)

        return jax.vmap(one)(split, prompts, block, place, takes, prompt).reshape(cache.shape)

    return state | {
        "held": put(state["held"], prompt),
        "begun": put(state["begun"], jnp.zeros_like(prompt)),
        "next": state["next"] + takes,
        "prompt": jax.tree.map(copy, state["prompt"], prompts),
    }


def _take(queue: _Queue, state):
    """The free slots of each block take the next rows of the prompts that it holds."""
    rows, at, token, begun = state["row"], state["at"], state["token"], []
    for m in range(state["held"].shape[-1]):
        held, first = state["held"][..., m, None], state["begun"][..., m, None]  # W B 1
        free = rows == queue.none
        number = first + jnp.cumsum(free, axis=-1) - 1  # of the row within its prompt
        takes = free & (number < queue.group)
        rows = jnp.where(takes, held * queue.group + number, rows)
        begun.append(first[..., 0] + takes.sum(-1))
        at, token = jnp.where(takes, 0, at), jnp.where(takes, queue.of(queue.last, rows), token)
    return state | {"row": rows, "at": at, "token": token, "begun": jnp.stack(begun, axis=-1)}
