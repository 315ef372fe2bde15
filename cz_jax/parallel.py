"""The mesh and the one table that maps logical axes of arrays to its axes.

A mesh has three axes: `data` (whole copies), `fsdp` (weights split over their hidden dimension, gathered where used)
and `tensor` (heads, feed-forward and vocabulary split). Batches split over data x fsdp.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cz_jax.errors import ConfigError

GPU_MEMORY, FLAGS = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS"  # variables that JAX reads when it starts
AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "layer": None,
}


def prepare_devices(gpu_memory: float, xla_flags: Sequence[str]) -> str:
    """Tells JAX which share of a GPU's memory to take at once, and XLA its flags; what the environment says already
    wins. To be called before a device is asked for: later it changes nothing. Returns what is now set, to be shown."""
    os.environ.setdefault(GPU_MEMORY, f"{gpu_memory:g}")
    flags = os.environ.get(FLAGS, "").split()
    named = {flag.partition("=")[0] for flag in flags}
    flags += [flag for flag in xla_flags if flag.partition("=")[0] not in named]
    if flags:
        os.environ[FLAGS] = " ".join(flags)
    return f"{GPU_MEMORY}={os.environ[GPU_MEMORY]}, {FLAGS}={os.environ.get(FLAGS) or 'none'}"


def is_primary() -> bool:
    """Whether this process speaks for the run: it alone writes files, reports progress and talks to the swarm."""
    return jax.process_index() == 0


def wait_for_all(reason: str) -> None:
    """Returns when every process of the run is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(reason)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; all of them ask at the same point, and get the same answer."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def process_0_says(flag: bool) -> bool:
    """The flag of process 0, in every process: what stands in the run folder is for it alone to see."""
    return any_process(is_primary() and flag)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence | None = None) -> Mesh:
    """The mesh over `devices` (default: all). One axis may be -1: what the others leave. ConfigError where the product
    is not the number of devices."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([s for s in sizes.values() if s != -1]))
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        asked = " x ".join(f"{n}={s}" for n, s in sizes.items())
        raise ConfigError(
            f"mesh {asked} does not divide the {len(devices)} {devices[0].platform} devices found",
            "the product of the mesh axes must be the number of devices",
            "mesh.data=1 mesh.fsdp=-1 mesh.tensor=1",
        )
    shape = [len(devices) // fixed if s == -1 else s for s in sizes.values()]
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str | None], units: Mapping[str, int], mesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes. `units[axis]` counts what cannot be split further along
    that axis (heads, not their flattened columns); an axis whose units the mesh axis does not divide stays whole.
    ConfigError where two dimensions of one array map to the same mesh axis."""
    parts, owner = [], {}
    for axis in axes:
        target = LOGICAL_AXES[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else tuple(target or ())
        size = int(np.prod([mesh.shape[n] for n in names]))
        if not names or size == 1 or (axis in units and units[axis] % size):
            parts.append(None)
            continue
        for name in names:
            if name in owner:
                raise ConfigError(
                    f"logical axes {owner[name]!r} and {axis!r} both map to the mesh axis {name!r} in {tuple(axes)}"
                )
            owner[name] = axis
        parts.append(target)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: Sequence[str | None] = (), units: Mapping[str, int] | None = None) -> NamedSharding:
    """`partition_spec` as a sharding on `mesh`; no axes: replicated."""
    return NamedSharding(mesh, partition_spec(axes, units or {}, mesh))


def batch_devices(mesh: Mesh) -> int:
    """How many ways a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_batch(x: jax.Array) -> jax.Array:
    """`x` with its first dimension split as a batch, under `jax.set_mesh`; `x` itself where no mesh is set or the
    dimension does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_devices(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(LOGICAL_AXES["batch"], *(None,) * (x.ndim - 1)))


def place_batch(mesh: Mesh, array: np.ndarray, dimension: int = 0) -> jax.Array:
    """A host array, the same on every process, as a global array split over the batch axes along `dimension`."""
    where = sharding(mesh, (*(None,) * dimension, "batch", *(None,) * (array.ndim - 1 - dimension)))
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def to_host(tree):
    """The arrays of `tree` as numpy, gathered from all processes where they are split over several."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
    return jax.tree.map(np.asarray, tree)


@jax.jit
def _fingerprints(leaves):
    """uint32 [leaves, 4]: sums over all elements of a mix of their bits and their place. Integer sums do not depend on
    their order, so the result is the same however the leaves are laid out over devices."""

    def one(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]).astype(
            jnp.uint32
        )
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        lanes = []
        for salt in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):
            x = (bits ^ (place * jnp.uint32(salt))) * jnp.uint32(0x85EBCA6B)
            x = (x ^ (x >> 15) ^ jnp.uint32(salt)) * jnp.uint32(0xC2B2AE35)
            lanes.append(jnp.sum(x ^ (x >> 13), dtype=jnp.uint32))
        return jnp.stack(lanes)

    return jnp.stack([one(leaf) for leaf in leaves])


def tree_digest(tree) -> str:
    """64 hex digits that tell two trees of float arrays apart, whatever devices they lie on: SHA-256 over each leaf's
    path, shape, dtype and a 128-bit fingerprint computed on the device. It finds differences; it does not withstand
    somebody who makes two trees collide on purpose."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    prints = to_host(_fingerprints([leaf for _, leaf in flat]))
    rows = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {row.tolist()}"
        for (path, leaf), row in zip(flat, prints, strict=True)
    ]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
