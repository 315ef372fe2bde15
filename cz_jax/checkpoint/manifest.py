"""The manifest of a checkpoint: which round it is, which arrays it holds, the size and SHA-256 of each of its files.

It is written last, so a step folder without a valid one is not whole. A hash tells damage by accident; it is no
signature, and somebody who may write to the folder can make a new manifest.
"""

import hashlib
import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cz_jax.files import sync_folder, write_atomic
from cz_jax.nouns import canonical_json, digest

NAME = "manifest.json"
VERSION = 1
HASH_THREADS = 4
MAX_BYTES = 64 << 20


class Broken(Exception):
    """A step folder that is not whole; the message says why."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """What the manifest says of one array: its path in the tree, its global shape, its dtype's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files` maps each file's path in the step folder to (bytes, lower-case hex SHA-256)."""

    round: int
    score: float | None
    arrays: tuple[ArraySpec, ...]
    files: dict[str, tuple[int, str]]

    def to_bytes(self) -> bytes:
        body = {
            "version": VERSION,
            "round": self.round,
            "score": self.score,
            "arrays": [[a.name, list(a.shape), a.dtype] for a in self.arrays],
            "files": {name: list(entry) for name, entry in self.files.items()},
        }
        return (canonical_json(body | {"digest": digest(body)}) + "\n").encode("ascii")


def write(folder: pathlib.Path, round_number: int, score: float | None, arrays: tuple[ArraySpec, ...]) -> Manifest:
    """Hashes every file under `folder`, makes them survive a power cut, then writes the manifest. OSError as ever."""
    paths = _files(folder)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(lambda p: _sha256(p, sync=True), paths.values()))
    for path in sorted({p.parent for p in paths.values()} | {folder}):
        sync_folder(path)
    files = {name: (path.stat().st_size, h) for (name, path), h in zip(paths.items(), hashes, strict=True)}
    manifest = Manifest(round_number, score, arrays, files)
    write_atomic(folder / NAME, manifest.to_bytes())
    return manifest


def read(folder: pathlib.Path, round_number: int) -> Manifest:
    """The manifest of a step folder whose files have the right names and sizes; nothing is hashed. Broken if not so."""
    try:
        if not folder.is_dir():
            raise Broken("it is not a folder")
        if not any(folder.iterdir()):
            raise Broken("it is empty")
        if not (folder / NAME).is_file():
            raise Broken(f"it has no {NAME}: its save did not finish")
        manifest = _parse(folder / NAME)
        if manifest.round != round_number:
            raise Broken(f"its manifest is that of round {manifest.round}: it was copied or renamed")
        sizes = {name: path.stat().st_size for name, path in _files(folder).items()}
    except OSError as e:
        raise Broken(f"it cannot be read: {e.strerror or e}") from None
    for name in sorted(sizes.keys() | manifest.files.keys()):
        if name not in sizes:
            raise Broken(f"{name} is missing")
        if name not in manifest.files:
            raise Broken(f"{name} does not belong to it")
        if sizes[name] != manifest.files[name][0]:
            raise Broken(f"{name} has {sizes[name]} bytes, not {manifest.files[name][0]}")
    return manifest


def verify(folder: pathlib.Path, round_number: int) -> Manifest:
    """`read`, and then every byte of every file against its hash. Broken if anything differs."""
    manifest = read(folder, round_number)
    try:
        paths = _files(folder)
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashes = list(pool.map(_sha256, paths.values()))
    except OSError as e:
        raise Broken(f"it cannot be read: {e.strerror or e}") from None
    for name, found in zip(paths, hashes, strict=True):
        if found != manifest.files[name][1]:
            raise Broken(f"{name} is not what was saved: its SHA-256 differs")
    return manifest


def first_difference(saved: tuple[ArraySpec, ...], wanted: tuple[ArraySpec, ...]) -> str | None:
    """The first array that differs between what was saved and what is wanted, in words; None where none does."""
    a, b = ({s.name: s for s in specs} for specs in (saved, wanted))
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    if not names:
        return None
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}: saved {a.get(names[0], 'nothing')}, wanted {b.get(names[0], 'nothing')}{more}"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every file under `folder` but the manifest, by its relative path, sorted. Broken for a link or a device."""
    found = {}
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in names + folders:
            path = pathlib.Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Broken(f"{relative} is not a plain file")
            if path.is_file() and relative != NAME:
                found[relative] = path
    return dict(sorted(found.items()))


def _raise(error: OSError):
    raise error


def _sha256(path: pathlib.Path, sync: bool = False) -> str:
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
        if sync:
            os.fsync(f.fileno())
    return found


def _parse(path: pathlib.Path) -> Manifest:
    if path.stat().st_size > MAX_BYTES:
        raise Broken(f"{NAME} is larger than {MAX_BYTES} bytes")
    data = path.read_bytes()
    try:
        body = json.loads(data)
        if body["version"] != VERSION:
            raise Broken(f"{NAME} has version {body['version']!r}, and this program reads {VERSION}")
        arrays = tuple(ArraySpec(name, tuple(shape), dtype) for name, shape, dtype in body["arrays"])
        files = {name: (size, sha256) for name, (size, sha256) in body["files"].items()}
        manifest = Manifest(body["round"], body["score"], arrays, files)
        whole = manifest.to_bytes() == data and isinstance(manifest.score, float | None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Broken(f"{NAME} is damaged")
    return manifest
