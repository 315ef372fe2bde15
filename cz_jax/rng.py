"""Every random number of a run comes from (run seed, round, purpose, task id, rollout index, position): this file.

A 64-bit seed is hashed on the host from what the number is for, never from where in a batch it is drawn; the position
of a token is folded in on the device. The same request therefore gives the same tokens whatever stands beside it.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def seed_for(run_seed: int, purpose: str, *path) -> int:
    """The 64-bit seed for `purpose` ("roll out", "propose", ...) at `path` (round number, task id, rollout
    index...)."""
    text = "\x1f".join([str(run_seed), purpose, *(str(p) for p in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def key_data(seeds) -> np.ndarray:
    """uint32 [..., 2], the threefry key words of 64-bit seeds of any shape."""
    seeds = np.asarray(seeds, dtype=np.uint64)
    return np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def uniform_at(keys_R2: jax.Array, position: jax.Array) -> jax.Array:
    """float32 [R] in [0, 1): one number for each row's key (uint32 [R, 2]) at the row's `position` (int32 [R])."""

    def one(words, at):
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), at)
        return jax.random.uniform(key, dtype=jnp.float32)

    return jax.vmap(one)(keys_R2, position)
