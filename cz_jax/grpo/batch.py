"""Packing groups into the arrays of one update: a `Batch` of equal micro-batches.

Legend: M micro-batches, P prompts (groups) of one, G rollouts, Tp prompt tokens, T completion tokens.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from cz_jax import shapes

TILE = 16  # lengths beside those of the ladder are multiples of this
NEAR = 1.25  # what completions may be padded to, up to the longest there can be: a new shape costs a compilation
SMALL_TOKENS = 2048  # a micro-batch that is no larger stays as it is for fewer rows: a new shape costs a compilation


@dataclass(frozen=True, slots=True)
class Row:
    """One group in tokens. `logprobs`: what the sampler reported, per completion, where the group is our own."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    advantages: Sequence[float]
    logprobs: Sequence[Sequence[float]] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Arrays of one update; the last micro-batches may be empty. `old` and `reference` (float32 [M, P, G, T]) are None
    until a pass has computed them."""

    prompts: jax.Array  # int32 [M, P, Tp], right-padded
    prompt_lengths: jax.Array  # int32 [M, P]
    completions: jax.Array  # int32 [M, P, G, T], right-padded
    lengths: jax.Array  # int32 [M, P, G]; 0 in rows that only fill up
    advantages: jax.Array  # float32 [M, P, G]
    own: jax.Array  # bool [M, P]
    behaviour: jax.Array  # float32 [M, P, G, T]; 0 where the group is not our own
    old: jax.Array | None = None
    reference: jax.Array | None = None

    @property
    def mask(self) -> jax.Array:
        """bool [M, P, G, T]: the tokens that were truly sampled."""
        return np.arange(self.completions.shape[-1]) < self.lengths[..., None]

    def replace(self, **arrays) -> "Batch":
        return dataclasses.replace(self, **arrays)


def pack(
    rows: Sequence[Row], micro_batch_tokens: int, ways: int = 1, pad_id: int = 0, most_rows: int = 0,
    max_new_tokens: int = 0,
) -> Batch:  # fmt: skip
    """Host arrays of `rows`, as few micro-batches of about `micro_batch_tokens` tokens as hold them; behind these,
    empty ones up to what `most_rows` would need, so that batches of fewer rows are of the same shape.

    Sizes come from the ladder of `shapes`, but near `max_new_tokens` (0: not known) that is the size; the prompts of a
    micro-batch are a multiple of `ways`, the number of devices that a batch is split over. A token counts once:
    Tp + G * T a group. ValueError without rows.
    """
    if not rows:
        raise ValueError("no groups to train on")
    tp = shapes.rung(max(len(r.prompt) for r in rows))
    g = max(len(r.completions) for r in rows)
    longest = max(len(c) for r in rows for c in r.completions)
    t = shapes.rung(longest)
    top = -(-max_new_tokens // TILE) * TILE
    if longest <= max_new_tokens and top <= NEAR * t:
        t = top
    count, each = max(len(rows), most_rows), tp + g * t
    most = max(1, micro_batch_tokens // each)
    p = shapes.rows(min(count, most), ways)
    if p > most and p > ways:
        p = max(ways, p // 2)
    m = -(-count // p)
    while p * each > SMALL_TOKENS and p % (2 * ways) == 0 and len(rows) <= p // 2:
        p, m = p // 2, 1
    batch = Batch(
        prompts=np.full((m, p, tp), pad_id, np.int32),
        prompt_lengths=np.ones((m, p), np.int32),
        completions=np.full((m, p, g, t), pad_id, np.int32),
        lengths=np.zeros((m, p, g), np.int32),
        advantages=np.zeros((m, p, g), np.float32),
        own=np.zeros((m, p), bool),
        behaviour=np.zeros((m, p, g, t), np.float32),
    )
    for i, row in enumerate(rows):
        at = divmod(i, p)
        batch.prompts[at][: len(row.prompt)], batch.prompt_lengths[at] = row.prompt, len(row.prompt)
        batch.own[at] = row.logprobs is not None
        batch.advantages[at][: len(row.advantages)] = row.advantages
        for j, completion in enumerate(row.completions):
            batch.completions[at][j, : len(completion)], batch.lengths[at][j] = completion, len(completion)
            if row.logprobs is not None:
                batch.behaviour[at][j, : len(completion)] = row.logprobs[j]
    return batch
