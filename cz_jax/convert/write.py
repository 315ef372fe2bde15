"""Parameters -> a Hugging Face folder that `transformers` loads, written tensor by tensor and renamed when whole."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np

from cz_jax.convert.container import DTYPE_NAMES, Writer
from cz_jax.convert.folder import INDEX, SINGLE, read_json
from cz_jax.errors import ModelFolderError
from cz_jax.files import is_taken
from cz_jax.models.spec import Arch, Weight, arch_from_folder, config_for_export, leaf_of, weights

MAX_FILE_BYTES = 5 * 10**9
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "LICENSE", "NOTICE",
)  # fmt: skip


def export_folder(
    params, arch: Arch, source_folder, out, card: str, dtype, max_file_bytes: int = MAX_FILE_BYTES
) -> pathlib.Path:
    """Writes the folder `out` (absent or empty) and returns it: weights in `dtype` (float32, bfloat16 or float16),
    config and tokenizer files of `source_folder` (None: a config of `arch` and no tokenizer), `card` as README.md.

    `params`: the tree of `weights(arch)`, NumPy or JAX arrays whose shards this process can see. The folder appears
    under its name when it is whole. ModelFolderError: `out` is taken or cannot be written, the source is of another
    architecture, or a weight is not finite.
    """
    out, dtype = pathlib.Path(out), np.dtype(dtype)
    source = pathlib.Path(source_folder) if source_folder is not None else None
    if dtype not in DTYPE_NAMES:
        raise ModelFolderError(f"weights cannot be exported as {dtype}", fix="float32, bfloat16 or float16")
    if is_taken(out):
        raise ModelFolderError(f"{out} exists and is not an empty folder", "an earlier export?", "name a new folder")
    if source is not None and arch_from_folder(source) != arch:
        raise ModelFolderError(f"{source} is of another architecture than the weights", "the folder of another model?")
    half = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.half")
    try:
        half.mkdir(parents=True)
        try:
            _write_weights(params, arch, half, dtype, max_file_bytes)
            _write_texts(arch, source, half, card, dtype)
            os.replace(half, out)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    except OSError as e:
        why = "a full disk, or no permission?"
        raise ModelFolderError(f"{out} cannot be written: {e.strerror or e}", why, "name another folder") from None
    return out


def _write_texts(arch: Arch, source: pathlib.Path | None, folder: pathlib.Path, card: str, dtype: np.dtype) -> None:
    config = read_json(source / "config.json") if source is not None else config_for_export(arch)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")} | {key: dtype.name}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name in COPIED:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    (folder / "README.md").write_text(card, "utf-8")


def _write_weights(params, arch: Arch, folder: pathlib.Path, dtype: np.dtype, max_file_bytes: int) -> None:
    files = _plan(arch, dtype, max_file_bytes)
    names = (
        [SINGLE]
        if len(files) == 1
        else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    )
    tensors = _tensors(params, arch)
    for file_name, layout in zip(names, files, strict=True):
        with Writer(folder / file_name, layout, dtype) as writer:
            for name in layout:
                with np.errstate(over="ignore"):  # told below, with the tensor's name
                    value = next(tensors).astype(dtype, copy=False)
                if not np.isfinite(value).all():
                    raise ModelFolderError(
                        f"{name} holds NaN or infinite values", "a diverged run", "an earlier checkpoint"
                    )
                writer.write(name, value)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, layout in zip(names, files, strict=True) for name in layout}
        index = {"metadata": {"total_size": arch.parameters * dtype.itemsize}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _plan(arch: Arch, dtype: np.dtype, max_file_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensor name -> shape for each file, in the order of writing; only a file of one tensor exceeds the limit."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for w in weights(arch):
        size = int(np.prod(w.hf_shape)) * dtype.itemsize
        for name in w.hf_names():
            if files[-1] and held + size > max_file_bytes:
                files.append({})
                held = 0
            files[-1][name] = w.hf_shape
            held += size
    return files


def _tensors(params, arch: Arch) -> Iterator[np.ndarray]:
    """Every tensor in Hugging Face's orientation, in the order of `_plan`; fetched from the devices layer by layer."""
    for w in weights(arch):
        leaf = leaf_of(params, w)
        if tuple(leaf.shape) != w.shape:
            raise ValueError(f"the weight {'.'.join(w.path)} has shape {tuple(leaf.shape)}, not {w.shape}")
        for i in range(len(w.hf_names())):
            value = _fetch(leaf, w, i)
            yield value.T if w.transposed else value


def _fetch(leaf, w: Weight, layer: int) -> np.ndarray:
    if not w.stacked:
        return np.asarray(leaf)
    if isinstance(leaf, np.ndarray):
        return leaf[layer]
    return np.asarray(jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False))
