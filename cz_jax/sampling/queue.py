"""Sampling more rows than are decoded side by side: inside of the compiled loop, the slot of a row that has ended takes
the next row of a queue, so that a long answer holds up no slot but its own.

Rows begin in order, with a first token that the prefill of their prompt gave. The rows in the slots read the prompts in
the places: about twice as many as fill the slots, so that the last rows of one prompt keep no slot from those of the
next. A prompt is copied into a place when a slot is free, no row of the prompt before it waits, and nobody reads the
place any more. All slots write their keys and values into one column of their caches, the same for all, which moves on
by one each step and round at the end; a slot sees the columns since it took its row. Where no more rows are left than a
later stage has slots, they move there. The queue is one for each way that the batch is split, and rows stay where they
are.

Legend: W ways that the batch is split, S slots of a way, M places of a way, N rows of a way, P prompts, G rows of a
prompt, Tp prompt tokens, C new tokens.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cz_jax import rng
from cz_jax.models import qwen
from cz_jax.models.attention import Seats, rows_of
from cz_jax.models.spec import Arch
from cz_jax.ports import SamplingMethod
from cz_jax.sampling.generate import Completions
from cz_jax.sampling.methods import draw


@partial(jax.jit, static_argnames=("arch", "stages", "ways", "max_new_tokens", "method", "dtype"))
def generate_queued(
    arch: Arch, params, prompts_PT, lengths_P, keys_PG2, limits_PG, stop_ids_S,
    *, stages: tuple[int, ...], ways: int, max_new_tokens: int, method: SamplingMethod, dtype=jnp.float32,
) -> Completions:  # fmt: skip
    """What `generate` gives for the same arguments, from `stages[0]` rows at a time, and from those of each further
    stage, which are fewer, once no more are left (multiples of `ways`, which divides P). A prompt has all of its rows
    or none; in each way, those without come last."""
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    layered = qwen.for_decoding(arch, params, prompts_PT.shape[1] + max_new_tokens)
    queue = _Queue(prompts_PT, lengths_P, keys_PG2, limits_PG, ways)

    def next_token(logits_VR, key, at):
        token, logprob = draw(logits_VR, rng.uniform_at(key.reshape(-1, 2), at.reshape(-1)), method)
        ended = (token[:, None] == stop_ids_S).any(-1)
        return (a.reshape(at.shape) for a in (token, logprob, ended))

    def step(state):
        rows, at = state["row"], state["at"]  # W S
        age = (state["column"] - jnp.arange(max_new_tokens)) % max_new_tokens
        hidden, suffix = qwen.decode(
            arch, layered, state["token"], queue.of(queue.lengths, rows) + at - 1, state["column"],
            age < at.reshape(-1, 1), qwen.PromptCache(*state["prompt"]), queue.visible(state), state["suffix"],
            queue.seats(state),
        )  # fmt: skip
        logits = qwen.next_logits(arch, params, hidden.reshape(rows.size, -1))
        token, logprob, ended = next_token(logits, queue.of(queue.keys, rows), at)
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
        state = jax.lax.while_loop(lambda s: queue.takes(s).any(), partial(_take, queue, prompts), state)
        return step(state)

    slots, given = stages[0] // ways, (prompts_PT, lengths_P, keys_PG2)
    prompts, first = _begin(arch, params, next_token, given, queue, slots, dtype)
    state = _empty(arch, queue, prompts, first, slots, max_new_tokens)
    for slots, fewer in zip(stages, (*stages[1:], 0), strict=True):
        state = _narrow(state, slots // ways)
        state = jax.lax.while_loop(lambda s, n=fewer // ways: (queue.left(s) > n).any(), body, state)

    def result(name):
        kept = state[name][:, : queue.none]
        return kept.reshape(*limits_PG.shape, *kept.shape[2:])

    return Completions(*(result(name) for name in Completions._fields))


def places_of(slots: int, group: int, prompts: int) -> int:
    """How many of a way's `prompts` its `slots` read at a time."""
    return min(prompts, slots if group == 1 else 2 * -(-slots // group))


def prompts_side_by_side(prompts: int, slots: int, group: int) -> int:
    """How many of a way's `prompts` are prefilled at a time: about as many as fill its `slots`."""
    return math.gcd(prompts, max(1, slots // group))


class _First(NamedTuple):
    """The first token of every row."""

    tokens: jax.Array  # int32 [W, N]
    logprobs: jax.Array  # float32 [W, N]
    ended: jax.Array  # bool [W, N]


def _begin(arch: Arch, params, next_token, given, queue, slots: int, dtype):
    """((keys, values) per layer [W, P / W, ...], _First) of prompts, lengths and keys; as many prompts at a time as
    fill the slots."""
    ways, each = queue.ways, queue.prompts
    at_once = prompts_side_by_side(each, slots, queue.group)

    def parts(a):  # [P, ...] -> [parts, W * at_once, ...]
        split = jnp.moveaxis(a.reshape(ways, -1, at_once, *a.shape[1:]), 1, 0)
        return split.reshape(-1, ways * at_once, *a.shape[1:])

    def whole(a):  # [parts, W * at_once, ...] -> [W, P / W, ...]
        split = jnp.moveaxis(a.reshape(-1, ways, at_once, *a.shape[2:]), 0, 1)
        return split.reshape(ways, each, *a.shape[2:])

    def one(part):
        prompts_PT, lengths_P, keys_PG2 = part
        last, cache = qwen.prefill(arch, params, prompts_PT, lengths_P, dtype)
        logits = jnp.repeat(qwen.next_logits(arch, params, last), queue.group, axis=1)
        first = next_token(logits, keys_PG2, jnp.zeros(keys_PG2.shape[:2], jnp.int32))
        return (cache.keys, cache.values), tuple(first)

    caches, first = jax.tree.map(whole, jax.lax.map(one, tuple(map(parts, given))))
    return caches, _First(*(a.reshape(ways, -1) for a in first))


def _empty(arch: Arch, queue, prompts, first: _First, slots: int, max_new_tokens: int) -> dict:
    """Free slots, and results that hold first tokens; the last place of them is for slots without a row."""
    ways, dtype = queue.ways, prompts[0][0].dtype
    places = places_of(slots, queue.group, queue.prompts)
    some = queue.limits > 0

    def of_rows(first_WN):
        return jnp.where(some, jnp.pad(first_WN, ((0, 0), (0, 1))), False).astype(first_WN.dtype)

    def in_order(first_WN):
        return jnp.zeros((*some.shape, max_new_tokens), first_WN.dtype).at[..., 0].set(of_rows(first_WN))

    return {
        "tokens": in_order(first.tokens),
        "logprobs": in_order(first.logprobs),
        "lengths": some.astype(jnp.int32),
        "ended": of_rows(first.ended),
        "row": jnp.full((ways, slots), queue.none, jnp.int32),
        "at": jnp.zeros((ways, slots), jnp.int32),
        "token": jnp.zeros((ways, slots), jnp.int32),
        "place": jnp.zeros((ways, slots), jnp.int32),
        "held": jnp.zeros((ways, places), jnp.int32),
        "newest": jnp.zeros(ways, jnp.int32),
        "begun": jnp.full(ways, queue.group, jnp.int32),
        "next": jnp.zeros(ways, jnp.int32),
        "column": jnp.int32(0),
        "prompt": jax.tree.map(lambda a: jnp.zeros((ways * places, *a.shape[2:]), dtype), prompts),
        "suffix": qwen.empty_suffix(arch, ways * slots, max_new_tokens, dtype),
    }


class _Queue:
    """The prompts of each way in order, and their rows. `none`: the number of no row, for which all arrays hold a
    place."""

    def __init__(self, prompts_PT, lengths_P, keys_PG2, limits_PG, ways: int):
        self.ways, self.group, self.prompts = ways, limits_PG.shape[1], len(limits_PG) // ways
        self.none, self.tokens = self.prompts * self.group, prompts_PT.shape[1]

        self.prompt_lengths = lengths_P.reshape(ways, -1)
        self.lengths = jnp.pad(jnp.repeat(self.prompt_lengths, self.group, axis=1), ((0, 0), (0, 1)))
        self.keys = jnp.pad(keys_PG2.reshape(ways, -1, 2), ((0, 0), (0, 1), (0, 0)))
        self.limits = jnp.pad(limits_PG.reshape(ways, -1), ((0, 0), (0, 1)))
        self.total = (limits_PG > 0).any(-1).reshape(ways, -1).sum(-1)

    def of(self, values, rows):
        """`values` [W, N + 1, ...] of `rows` [W, ...]."""
        return jax.vmap(lambda v, r: v[r])(values, rows)

    def left(self, state):
        """int [W]: the rows that run or wait."""
        waiting = (self.total - state["next"]) * self.group + self.group - state["begun"]
        return (state["row"] < self.none).sum(-1) + waiting

    def free_places(self, state):
        """bool [W, M]: whether nobody reads the prompt there, nor will."""
        places = jnp.arange(state["held"].shape[1])[:, None]
        read = ((state["place"][:, None] == places) & (state["row"] < self.none)[:, None]).any(-1)
        newest = (places[:, 0] == state["newest"][:, None]) & (state["begun"] < self.group)[:, None]
        return ~(read | newest)

    def takes(self, state):
        """bool [W]: whether there is a free slot, and a row for it."""
        free = (state["row"] == self.none).any(-1)
        prompt = (state["next"] < self.total) & self.free_places(state).any(-1)
        return free & ((state["begun"] < self.group) | prompt)

    def seats(self, state) -> Seats:
        """A place has a seat for each row of a prompt."""
        rows, slots = state["row"], jnp.arange(state["row"].shape[1])
        seat = state["place"] * self.group + rows % self.group
        count = state["held"].shape[1] * self.group
        taken = jnp.where(rows < self.none, seat, count)
        return Seats(seat, jax.vmap(lambda s: jnp.zeros(count, jnp.int32).at[s].set(slots, mode="drop"))(taken))

    def visible(self, state):
        """bool [W * M, 1, Tp]: the tokens of the prompts in the places."""
        lengths = self.of(self.prompt_lengths, state["held"])
        return jnp.arange(self.tokens) < lengths.reshape(-1, 1, 1)


def _take(queue: _Queue, prompts, state):
    """In each way that has a free slot, and a row for it: where no row waits of the newest prompt, the next one comes
    into a place; then free slots take the rows of the newest. One whose first token was its last takes none."""
    takes = queue.takes(state)
    comes = takes & (state["begun"] == queue.group)
    place = jnp.where(comes, jnp.argmax(queue.free_places(state), axis=-1), state["newest"])
    prompt = jnp.where(comes, state["next"], queue.of(state["held"], place))
    begun = jnp.where(comes, 0, state["begun"])

    def copy(cache, prompts):  # [W * M, ...] and [W, P / W, ...]
        def one(cache, prompts, place, comes, prompt):
            new = jnp.where(comes, prompts[prompt], cache[place])
            return jax.lax.dynamic_update_index_in_dim(cache, new, place, 0)

        split = cache.reshape(len(takes), -1, *cache.shape[1:])
        return jax.vmap(one)(split, prompts, place, comes, prompt).reshape(cache.shape)

    free = (state["row"] == queue.none) & takes[:, None]
    number = begun[:, None] + jnp.cumsum(free, axis=-1) - 1  # of the row within its prompt
    chosen = free & (number < queue.group)
    row = jnp.where(chosen, prompt[:, None] * queue.group + number, queue.none)
    goes_on = chosen & ~queue.of(state["ended"], row) & (queue.of(queue.limits, row) > 1)
    first = queue.of(state["tokens"][..., 0], row)
    return state | {
        "row": jnp.where(goes_on, row, state["row"]),
        "at": jnp.where(goes_on, 1, state["at"]),
        "token": jnp.where(goes_on, first, state["token"]),
        "place": jnp.where(goes_on, place[:, None], state["place"]),
        "held": jax.vmap(lambda held, m, p: held.at[m].set(p))(state["held"], place, prompt),
        "newest": place,
        "begun": begun + chosen.sum(-1),
        "next": state["next"] + comes,
        "prompt": jax.tree.map(copy, state["prompt"], prompts),
    }


def _narrow(state: dict, slots: int) -> dict:
    """`state` in fewer slots, which hold all rows that run."""
    if slots == state["row"].shape[1]:
        return state
    kept = jnp.argsort(state["row"], axis=-1)[:, :slots]  # no row is the largest number
    rows = {name: jnp.take_along_axis(state[name], kept, axis=-1) for name in ("row", "at", "token", "place")}
    return state | rows | {"suffix": jax.tree.map(lambda a: rows_of(a, kept), state["suffix"])}
