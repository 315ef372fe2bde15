"""Drawing a token from logits with one uniform number, without sorting the vocabulary.

Legend: R rows, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from cz_jax.ports import SamplingMethod


def draw(logits_VR: jax.Array, uniform_R: jax.Array, method: SamplingMethod):
    """(token int32 [R], its log-probability float32 [R]) by inverting the distribution function at `uniform_R`.

    The log-probability is that of the softmax at the sampling temperature over the whole vocabulary, before top-k and
    top-p, which is what the trainer computes again. Greedy (temperature 0) reports it at temperature 1.
    """
    logits = logits_VR / (method.temperature or 1.0)
    top_R = logits.max(0)
    mass = jnp.exp(logits - top_R)  # once: of all that a step computes beside its products, this takes longest
    normaliser = top_R + jnp.log(mass.sum(0))
    if method.temperature == 0:
        token = jnp.argmax(logits, axis=0).astype(jnp.int32)
    else:
        if 0 < method.top_k < len(logits):
            kth_R = jax.lax.top_k(logits.T, method.top_k)[0][:, -1]
            mass = jnp.where(logits >= kth_R, mass, 0.0)
        if method.top_p < 1:
            mass = nucleus(mass, method.top_p)
        token = invert(mass, uniform_R)
    return token, _at(logits, token) - normaliser


def nucleus(mass_VR: jax.Array, top_p: float) -> jax.Array:
    """`mass` with everything outside of the nucleus set to 0: the fewest largest entries that hold `top_p` of the total
    (entries equal to the smallest of them stay too). The threshold is bisected over the bits of a positive float, which
    order as the floats do: 31 sums and no sort."""
    wanted_R = top_p * mass_VR.sum(0)
    bits = jax.lax.bitcast_convert_type(mass_VR, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # entries at or above `low` hold enough, at or above `high` too little
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle, mass_VR, 0.0).sum(0) >= wanted_R
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    rows = mass_VR.shape[1:]
    low_R, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, 0x7F800000, jnp.int32)))
    return jnp.where(bits >= low_R, mass_VR, 0.0)


def invert(mass_VR: jax.Array, uniform_R: jax.Array) -> jax.Array:
    """The index at which the running sum of `mass` (not negative, any total) passes uniform * total; an entry of mass 0
    is never drawn. In two levels, so that running sums are over about sqrt(V) numbers twice."""
    v, r = mass_VR.shape
    root = math.isqrt(v)
    even = max(n for n in range(1, root + 1) if v % n == 0)  # of which no entries are left over, which would be a copy
    width = even if even > root // 4 else root
    blocks = jnp.pad(mass_VR, ((0, -v % width), (0, 0))).reshape(-1, width, r)
    sums = blocks.sum(1)
    block, rest = _pass(sums, uniform_R * sums.sum(0))
    place, _ = _pass(_at(blocks, block), rest)
    return (block * width + place).astype(jnp.int32)


def _pass(mass_NR: jax.Array, target_R: jax.Array):
    """(first index whose running sum exceeds the target, what of the target is left before it)."""
    running = jnp.cumsum(mass_NR, axis=0)
    last = len(mass_NR) - 1 - jnp.argmax(mass_NR[::-1] > 0, axis=0)  # rounding may push the target to the total
    index = jnp.minimum((running <= target_R).sum(0), last)
    return index, jnp.maximum(target_R - (_at(running, index) - _at(mass_NR, index)), 0.0)


def _at(values: jax.Array, index_R: jax.Array) -> jax.Array:
    """`values` [N, ..., R] of each row at its index of the first axis: [..., R]."""
    index = index_R.reshape(*[1] * (values.ndim - 1), -1)
    return jnp.take_along_axis(values, index, axis=0)[0]
