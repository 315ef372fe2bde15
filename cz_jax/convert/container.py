"""The safetensors container: its header read with suspicion, and files written tensor by tensor.

A file is 8 bytes (little-endian length of the header), the header (JSON: tensor name -> dtype, shape, data_offsets) and
the raw bytes, little-endian and row-major. Nothing but the header is read here until somebody asks for a block of rows.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes  # registers bfloat16 with numpy
import numpy as np

from cz_jax.errors import ModelFolderError

MAX_HEADER_BYTES = 100 << 20
BLOCK_BYTES = 4 << 20  # of one read
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFacts:
    """Where a tensor lies: `start` is a byte position in `file`; dtype is one of DTYPES."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


def read_header(path: pathlib.Path) -> dict[str, TensorFacts]:
    """The tensors of a safetensors file, by name. ModelFolderError unless every byte of the file is accounted for."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length < 2:
                raise ModelFolderError(f"{path} has no safetensors header", "an empty file, or half a download?")
            if length > size - 8:
                why = "half a download, or not a safetensors file?"
                raise ModelFolderError(
                    f"{path}: its header claims {length} bytes, the file has {size - 8} after it", why
                )
            if length > MAX_HEADER_BYTES:
                raise ModelFolderError(f"{path}: its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as e:
        raise ModelFolderError(
            f"{path} cannot be read: {e.strerror or e}", "no permission, or a broken link?"
        ) from None
    header = _parse(path, text)
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    _check_cover(path, spans, size - 8 - length)
    return {
        name: TensorFacts(path, header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + begin)
        for name, (begin, _) in spans.items()
    }


def _parse(path, text: bytes) -> dict:
    def unique(pairs):
        known = {}
        for name, value in pairs:
            if name in known:
                why = "the file was damaged or made to mislead"
                raise ModelFolderError(f"{path}: its header names {name!r} twice", why)
            known[name] = value
        return known

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError, MemoryError) as e:
        raise ModelFolderError(f"{path}: its header is not JSON ({e})", "damaged, or not a safetensors file?") from None
    if not isinstance(header, dict):
        raise ModelFolderError(f"{path}: its header is a JSON {type(header).__name__}, not an object")
    return header


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _span(path, name: str, entry) -> tuple[int, int]:
    """The byte range of one header entry, after checks of the entry by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelFolderError(f"{path}: the header entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        why = "quantised weights are not supported; use the F32, BF16 or F16 ones"
        raise ModelFolderError(f"{path}: {name!r} has dtype {dtype!r}, not one of {', '.join(DTYPES)}", why)
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
        raise ModelFolderError(f"{path}: {name!r} has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ModelFolderError(f"{path}: {name!r} has the data_offsets {offsets!r}")
    begin, end = offsets
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != need:
        raise ModelFolderError(f"{path}: {name!r} is {dtype} {shape}, {need} bytes, and its offsets span {end - begin}")
    return begin, end


def _check_cover(path, spans: dict[str, tuple[int, int]], data_bytes: int) -> None:
    """The spans must tile the data: no overlap, no hole, no end beyond the file, nothing after the last."""
    at, before = 0, "the header"
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != at:
            what = "overlaps" if begin < at else "leaves a hole after"
            raise ModelFolderError(
                f"{path}: {name!r} {what} {before} (byte {begin}, expected {at})", "a damaged header"
            )
        if end > data_bytes:
            why = "half a download? Fetch the file again"
            raise ModelFolderError(f"{path}: {name!r} ends at byte {end} of the data, the file at {data_bytes}", why)
        at, before = end, repr(name)
    if at != data_bytes:
        raise ModelFolderError(
            f"{path}: {data_bytes - at} bytes after the last tensor belong to none", "a damaged file"
        )


def blocks(
    tensor: TensorFacts, rows: slice = slice(None), columns: slice = slice(None)
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, array) for a 1- or 2-dimensional tensor, a few MB of whole rows a time, cut to `rows`, `columns`.

    Each array is a view of a mapping of its own, so that no more of the file than one block is held; copy what stays.
    """
    begin, end, _ = rows.indices(tensor.shape[0])
    step = max(1, BLOCK_BYTES // max(1, tensor.row_bytes))
    for row in range(begin, end, step):
        shape = (min(step, end - row), *tensor.shape[1:])
        start = tensor.start + row * tensor.row_bytes
        block = np.memmap(tensor.file, DTYPES[tensor.dtype], mode="r", offset=start, shape=shape)
        yield row, np.asarray(block[:, columns] if len(shape) > 1 else block)


class Writer:
    """A new safetensors file whose tensors are told beforehand and written in that order, so that none waits in memory.

    `layout`: name -> shape. Use as a context manager; leaving it flushes to disk. ValueError if the order is not kept.
    """

    def __init__(self, path: pathlib.Path, layout: dict[str, tuple[int, ...]], dtype: np.dtype):
        self._dtype, self._todo = dtype, list(layout.items())
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in layout.items():
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)  # the data start aligned
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, value: np.ndarray) -> None:
        """The next tensor, of the writer's dtype; any memory order."""
        expected = self._todo.pop(0)
        if (name, value.shape, value.dtype) != (*expected, self._dtype):
            raise ValueError(f"{name} {value.shape} {value.dtype} came where {expected} of {self._dtype} was told")
        self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self._file:
            if kind is None:
                if self._todo:
                    raise ValueError(f"{len(self._todo)} tensors were told and never written, first {self._todo[0][0]}")
                self._file.flush()
                os.fsync(self._file.fileno())
