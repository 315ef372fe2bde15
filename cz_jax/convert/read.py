"""Weights of a Hugging Face folder -> parameters on the devices, a few MB of the files at a time.

A process reads the rows and columns that its own shards hold, and nothing else. At any time the host holds the shards
of one weight (all layers of it), one block of a file, and what already lies on devices that are the host's own memory.
"""

import math
import mmap
from collections.abc import Callable

import jax
import numpy as np

from cz_jax.convert.container import TensorFacts, blocks
from cz_jax.convert.folder import FolderFacts, check_folder
from cz_jax.errors import ModelFolderError
from cz_jax.models.spec import Arch, Weight, tree_of, weights

_OFF_ALIGNMENT = 8  # bytes


def read_params(
    folder, arch: Arch, dtype, sharding_of: Callable[[Weight], jax.sharding.Sharding] | None = None
) -> dict:
    """The parameter tree of `weights(arch)` from a folder, or from the `FolderFacts` of one that was checked before.

    `dtype`: of the parameters, a numpy or JAX type. `sharding_of`: where each weight goes (None: the default device).
    ModelFolderError: see `check_folder`; also for an architecture other than `arch`, for NaN or infinite weights (this
    process' shards are looked at), and for tied embeddings whose lm_head.weight is another matrix.
    """
    facts = folder if isinstance(folder, FolderFacts) else check_folder(folder)
    if facts.arch != arch:
        raise ModelFolderError(f"{facts.folder} holds {facts.arch}, not {arch}", "the folder of another model?")
    if arch.tied_embeddings and "lm_head.weight" in facts.tensors:
        _check_tied(facts)
    dtype = np.dtype(dtype)

    def read(w: Weight) -> jax.Array:
        sharding = sharding_of(w) if sharding_of is not None else None
        array = _read_weight(facts, w, dtype, sharding)
        return jax.block_until_ready(array)  # or the copies of several weights would wait in host memory together

    return tree_of(weights(arch), read)


def _read_weight(facts: FolderFacts, w: Weight, dtype: np.dtype, sharding) -> jax.Array:
    if sharding is None:
        return jax.device_put(_read_shard(facts, w, dtype, (slice(None),) * len(w.shape)))
    done: dict[tuple, np.ndarray] = {}  # devices that hold the same shard get it from one read

    def shard(index) -> np.ndarray:
        key = tuple(s.indices(n)[:2] for s, n in zip(index, w.shape, strict=True))
        if key not in done:
            done[key] = _read_shard(facts, w, dtype, index)
        return done[key]

    return jax.make_array_from_callback(w.shape, sharding, shard, dtype=dtype)


def _read_shard(facts: FolderFacts, w: Weight, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """`index` of the weight in our layout, as a new array; layers are read one by one, transposed on the way."""
    shape = [len(range(*s.indices(n))) for s, n in zip(index, w.shape, strict=True)]
    # Pages of their own, which go back to the system the moment the array is dropped (the heap keeps them). Off the
    # alignment at which JAX on a CPU adopts host memory instead of copying it: what it adopts cannot be donated.
    pages = mmap.mmap(-1, _OFF_ALIGNMENT + math.prod(shape) * dtype.itemsize)
    out = np.frombuffer(pages, dtype, offset=_OFF_ALIGNMENT).reshape(shape)
    names = w.hf_names()[index[0]] if w.stacked else w.hf_names()
    inner = index[1:] if w.stacked else index
    for i, name in enumerate(names):
        _fill(
            out[i] if w.stacked else out,
            name,
            facts.tensors[name],
            inner[::-1] if w.transposed else inner,
            w.transposed,
        )
    return out


def _fill(out: np.ndarray, name: str, tensor: TensorFacts, region: tuple[slice, ...], transposed: bool) -> None:
    """Copies rows and columns `region` of a stored tensor into `out`, which is transposed where asked."""
    target = out.T if transposed else out
    first = region[0].indices(tensor.shape[0])[0]
    for row, block in blocks(tensor, *region):
        part = target[row - first : row - first + len(block)]
        with np.errstate(over="ignore"):  # told below, with the tensor's name
            part[...] = block
        if not np.isfinite(part).all():
            why = f"a failed training run, or values beyond {out.dtype}?"
            raise ModelFolderError(f"{tensor.file}: the tensor {name} holds NaN or infinite values", why)


def _check_tied(facts: FolderFacts) -> None:
    embed, head = facts.tensors["model.embed_tokens.weight"], facts.tensors["lm_head.weight"]
    for (_, a), (_, b) in zip(blocks(embed), blocks(head), strict=True):
        if a.tobytes() != b.tobytes():
            what = f"{facts.folder}: config.json ties the embeddings, but lm_head.weight is another matrix"
            raise ModelFolderError(what, "a wrong config.json", "set tie_word_embeddings to false in config.json")
