"""Drawing a token from logits with one uniform number, without sorting the vocabulary.

Legend: R rows, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from cz_jax.ports import SamplingMethod


def draw(logits_RV: jax.Array, uniform_R: jax.Array, method: SamplingMethod):
    """(token int32 [R], its log-probability float32 [R]) by inverting the distribution function at `uniform_R`.

    The log-probability is that of the softmax at the sampling temperature over the whole vocabulary, before top-k and
    top-p, which is what the trainer computes again. Greedy (temperature 0) reports it at temperature 1.
    """
    logits = logits_RV / (method.temperature or 1.0)
    top = logits.max(-1, keepdims=True)
    mass = jnp.exp(logits - top)  # once: of all that a step computes beside its products, this takes longest
    normaliser = top[:, 0] + jnp.log(mass.sum(-1))
    if method.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        if 0 < method.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, method.top_k)[0][:, -1:]
            mass = jnp.where(logits >= kth, mass, 0.0)
        if method.top_p < 1:
            mass = nucleus(mass, method.top_p)
        token = invert(mass, uniform_R)
    return token, jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - normaliser


def nucleus(mass_RV: jax.Array, top_p: float) -> jax.Array:
    """`mass` with everything outside of the nucleus set to 0: the fewest largest entries that hold `top_p` of the total
    (entries equal to the smallest of them stay too). The threshold is bisected over the bits of a positive float, which
    order as the floats do: 31 sums and no sort."""
    wanted = top_p * mass_RV.sum(-1, keepdims=True)
    bits = jax.lax.bitcast_convert_type(mass_RV, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # entries at or above `low` hold enough, at or above `high` too little
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle, mass_RV, 0.0).sum(-1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    shape = (mass_RV.shape[0], 1)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(shape, jnp.int32), jnp.full(shape, 0x7F800000, jnp.int32)))
    return jnp.where(bits >= low, mass_RV, 0.0)


def invert(mass_RV: jax.Array, uniform_R: jax.Array) -> jax.Array:
    """The index at which the running sum of `mass` (not negative, any total) passes uniform * total; an entry of mass 0
    is never drawn. In two levels, so that running sums are over about sqrt(V) numbers twice."""
    r, v = mass_RV.shape
    root = math.isqrt(v)
    even = max(n for n in range(1, root + 1) if v % n == 0)  # of which no entries are left over, which would be a copy
    width = even if even > root // 4 else root
    blocks = jnp.pad(mass_RV, ((0, 0), (0, -v % width))).reshape(r, -1, width)
    sums = blocks.sum(-1)
    block, rest = _pass(sums, uniform_R * sums.sum(-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _pass(inside, rest)
    return (block * width + place).astype(jnp.int32)


def _pass(mass_RN: jax.Array, target_R: jax.Array):
    """(first index whose running sum exceeds the target, what of the target is left before it)."""
    running = jnp.cumsum(mass_RN, axis=-1)
    n = mass_RN.shape[-1]
    last = n - 1 - jnp.argmax(mass_RN[:, ::-1] > 0, axis=-1)  # rounding may push the target to the total
    index = jnp.minimum((running <= target_R[:, None]).sum(-1), last)
    before = (
        jnp.take_along_axis(running, index[:, None], -1)[:, 0] - jnp.take_along_axis(mass_RN, index[:, None], -1)[:, 0]
    )
    return index, jnp.maximum(target_R - before, 0.0)
