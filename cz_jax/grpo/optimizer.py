"""AdamW for parameters in float32 or bfloat16: moments in a dtype of their own, arithmetic always in float32.

bfloat16 keeps 8 significant bits, so that a plain cast drops every change below 2^-9 of a value: at a learning rate of
1e-6 weights would not move, and a second moment with b2 = 0.999 would never decay. What is stored in bfloat16 is
therefore rounded stochastically: up or down at random, right on average (Gupta et al. 2015, arXiv 1502.02551).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cz_jax.config import OptimizerConfig


@functools.cache
def make_optimizer(config: OptimizerConfig, total_steps: int, seed: int = 0) -> optax.GradientTransformation:
    """Clipping to `max_grad_norm` over all gradients, then AdamW (arXiv 1711.05101) at the scheduled learning rate.

    State: `optax.ScaleByAdamState(count int32 [], mu, nu)`, the moments shaped and sharded as the parameters and in
    `config.moments_dtype`, whatever the parameters' dtype; float32 updates for `apply_updates`. Weight decay leaves
    biases and norms alone (`is_decayed`). `seed` (64 bits) is for the rounding of bfloat16 moments, which is a function
    of it and of the step count alone, so that a resumed run rounds alike. The same arguments give the same object,
    which lets a compiled step serve every learner that has them. A gradient that is not finite is not caught
    here. ValueError for `total_steps` below 1, and from `update` without parameters.
    """
    schedule = _schedule(config, total_steps)
    dtype = jnp.dtype(config.moments_dtype)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    key_words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)

    def init(params):
        # Two trees of zeros: one buffer in both places could not be donated.
        mu, nu = (jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(gradients, state, params=None):
        if params is None:
            raise ValueError("AdamW needs the parameters: update(gradients, state, params)")
        gradients, _ = clip.update(_float32(gradients), optax.EmptyState())
        moments = optax.ScaleByAdamState(state.count, _float32(state.mu), _float32(state.nu))
        direction, moments = adam.update(gradients, moments)
        rate = schedule(state.count)

        def leaf(path, d, p):
            if config.weight_decay and is_decayed(path):
                d += config.weight_decay * p.astype(jnp.float32)
            return -rate * d

        updates = jax.tree_util.tree_map_with_path(leaf, direction, params)
        if dtype == jnp.bfloat16:
            key = jax.random.fold_in(jax.random.wrap_key_data(key_words, impl="threefry2x32"), state.count)
            moments = moments._replace(**_rounded_moments(moments, key))
        return updates, moments

    return optax.GradientTransformation(init, update)


def learning_rate_at(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """The learning rate of update number `step`, counted from 0."""
    return float(_schedule(config, total_steps)(jnp.asarray(step, jnp.int32)))


def apply_updates(params, updates, key: jax.Array | None):
    """`params` + `updates` (float32), each leaf in its own dtype: float32 is added to, bfloat16 is added to in float32
    and rounded stochastically with `key`, which is consumed. ValueError for bfloat16 leaves without a key, TypeError
    for any other dtype."""
    leaves, treedef = jax.tree.flatten(params)
    unknown = {str(p.dtype) for p in leaves} - {"float32", "bfloat16"}
    if unknown:
        raise TypeError(f"parameters are float32 or bfloat16, not {', '.join(sorted(unknown))}")
    rounded = any(p.dtype == jnp.bfloat16 for p in leaves)
    if rounded and key is None:
        raise ValueError("bfloat16 parameters need a key: a plain cast would lose the updates")
    words = _words(key, len(leaves)) if rounded else [None] * len(leaves)

    def leaf(p, u, two_words):
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        return total if p.dtype == jnp.float32 else _stochastic_bfloat16(total, _noise(two_words, p.shape))

    return treedef.unflatten(map(leaf, leaves, treedef.flatten_up_to(updates), words))


def is_decayed(path) -> bool:
    """Whether the weight at `path` (keys as `jax.tree_util.tree_map_with_path` gives them) takes weight decay: not
    where it ends with "bias" or contains "norm". Told by name, as the stacked layers of a bias have two dimensions."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return not (name.endswith("bias") or "norm" in name)


def _schedule(config: OptimizerConfig, total_steps: int):
    """count -> float32 learning rate. Rises in `warmup_steps` equal steps to its peak, then stays, or falls along a
    line or half a cosine to 0 at `total_steps` (the last update still moves). A run no longer than its warm-up only
    rises."""
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}: a schedule needs at least one step")
    warmup, falling = config.warmup_steps, max(total_steps - config.warmup_steps, 1)

    def rate(count):
        peak_share = jnp.minimum((count + 1) / max(warmup, 1), 1.0).astype(jnp.float32)
        done = jnp.clip((count - warmup) / falling, 0.0, 1.0).astype(jnp.float32)
        if config.schedule == "linear":
            peak_share *= 1.0 - done
        elif config.schedule == "cosine":
            peak_share *= 0.5 * (1.0 + jnp.cos(math.pi * done))
        return config.learning_rate * peak_share

    return rate


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _rounded_moments(moments: optax.ScaleByAdamState, key) -> dict:
    """Both moments in bfloat16, from one noise a weight: 16 bits each."""
    mu, treedef = jax.tree.flatten(moments.mu)
    noise = [_noise(words, m.shape) for m, words in zip(mu, _words(key, len(mu)), strict=True)]
    mu_nu = zip(mu, treedef.flatten_up_to(moments.nu), noise, strict=True)
    rounded = [(_stochastic_bfloat16(m, n), _stochastic_bfloat16(v, n >> 16)) for m, v, n in mu_nu]
    return {"mu": treedef.unflatten(m for m, _ in rounded), "nu": treedef.unflatten(v for _, v in rounded)}


def _words(key, leaves: int) -> jax.Array:
    """uint32 [leaves, 2]: what sets the noise of each leaf apart."""
    return jax.random.bits(key, (leaves, 2), jnp.uint32)


def _noise(words: jax.Array, shape) -> jax.Array:
    """uint32 of `shape`: a hash of each element's position, keyed by `words` (uint32 [2]). For rounding only: threefry
    for every weight takes ten times the work and seconds of compilation a leaf."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mixed(_mixed(position + words[0]) ^ words[1])


def _mixed(x: jax.Array) -> jax.Array:
    """The 32-bit mixing function "lowbias32" of C. Wellons' hash-prospector: a bijection without visible bias."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _stochastic_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 `x` as one of its two bfloat16 neighbours, each with the probability that makes the mean x; what bfloat16
    can hold stays. Of `noise` (uint32, x's shape) the low 16 bits count."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A carry out of the 16 bits that are cut off is the step to the neighbour further from zero.
    kept = ((bits + (noise & 0xFFFF)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
