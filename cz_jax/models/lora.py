"""Low-rank adaptation (arXiv 2106.09685) as leaves of the parameter tree: a pair beside the kernel that it adds to.

A kernel [L, in, out] gets `lora_a` [L, in, r], `lora_b` [L, r, out] and the constant `lora_scale` [L] = alpha / r; the
layer computes x @ kernel + (x @ a) @ b * scale. With rank 0 every weight is trained and no such leaf exists.
"""

import jax
import jax.numpy as jnp

from cz_jax.models.spec import Arch, Weight, leaf_of, tree_of, weights

TRAINED = ("lora_a", "lora_b")


def lora_weights(arch: Arch, rank: int, targets: tuple[str, ...]) -> tuple[Weight, ...]:
    """The declarations of the pairs and their scales; none for rank 0."""
    table = []
    for w in weights(arch) if rank else ():
        if w.path[0] == "layers" and w.path[-1] == "kernel" and w.path[1] in targets:
            layers, n_in, n_out = w.shape
            _, in_axis, out_axis = w.axes
            path = w.path[:-1]
            table += [
                Weight((*path, "lora_a"), (layers, n_in, rank), ("layer", in_axis, None), ""),
                Weight((*path, "lora_b"), (layers, rank, n_out), ("layer", None, out_axis), "", init="zeros"),
                Weight((*path, "lora_scale"), (layers,), ("layer",), ""),
            ]
    return tuple(table)


def init_lora(arch: Arch, rank: int, alpha: float, targets, seed: int, dtype, sharding_of=None) -> dict:
    """A tree of the leaves of `lora_weights`: a uniform within +-1/sqrt(in) as PEFT has it, b zero, so that the adapted
    model starts as the base model."""
    table = lora_weights(arch, rank, targets)

    def leaf(w):
        if w.path[-1] == "lora_scale":
            return jnp.full(w.shape, alpha / rank, jnp.float32)
        if w.init == "zeros":
            return jnp.zeros(w.shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), table.index(w))
        return (jax.random.uniform(key, w.shape, jnp.float32, -1, 1) * w.shape[1] ** -0.5).astype(dtype)

    shardings = None if sharding_of is None else tree_of(table, sharding_of)
    return jax.jit(lambda: tree_of(table, leaf), out_shardings=shardings)()


def join(trainable: dict, frozen: dict) -> dict:
    """One tree of the leaves of both."""
    if not (isinstance(trainable, dict) and isinstance(frozen, dict)):
        raise ValueError("the same leaf stands in both trees")
    both = {k: join(trainable[k], frozen[k]) for k in trainable.keys() & frozen.keys()}
    return {**frozen, **trainable, **both}


def split(params: dict) -> tuple[dict, dict]:
    """(trainable, frozen) trees: the low-rank pairs where there are any, otherwise everything and nothing."""
    paths = [tuple(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    if not any(p[-1] in TRAINED for p in paths):
        return params, {}

    def pick(wanted):
        tree: dict = {}
        for path in paths:
            if (path[-1] in TRAINED) == wanted:
                node, source = tree, params
                for name in path[:-1]:
                    node, source = node.setdefault(name, {}), source[name]
                node[path[-1]] = source[path[-1]]
        return tree

    return pick(True), pick(False)


def merged(arch: Arch, params: dict) -> dict:
    """The plain weights that compute the same: kernel + a @ b * scale, in float32 and then in the kernel's dtype."""

    def leaf(w):
        node = params
        for name in w.path[:-1]:
            node = node[name]
        kernel = leaf_of(params, w)
        if not (isinstance(node, dict) and w.path[-1] == "kernel" and "lora_a" in node):
            return kernel
        low = jnp.einsum("lir,lro->lio", node["lora_a"].astype(jnp.float32), node["lora_b"].astype(jnp.float32))
        return (kernel.astype(jnp.float32) + low * node["lora_scale"][:, None, None]).astype(kernel.dtype)

    return tree_of(weights(arch), leaf)
