"""The manifest of a checkpoint: which round it is, which arrays it holds, the size and checksum of each of its files.

It is written last, so a step without a valid one is not whole. A checksum tells damage by accident; it is no signature,
and somebody who may write there can make a new manifest. A place (see places.py) is where the step lies.
"""

import json
from dataclasses import dataclass

from cz_jax.checkpoint.places import Broken
from cz_jax.nouns import canonical_json, digest

NAME = "manifest.json"
VERSION = 1
MAX_BYTES = 64 << 20


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
    """`files` maps each file's path in the step folder to (bytes, checksum)."""

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


def write(place, step: str, score: float | None, arrays: tuple[ArraySpec, ...]) -> Manifest:
    """Makes every file of the step durable, then writes the manifest. OSError as ever."""
    manifest = Manifest(int(step), score, arrays, place.settle(step))
    place.write(step, NAME, manifest.to_bytes())
    return manifest


def read(place, step: str) -> Manifest:
    """The manifest of a step whose files have the right names and sizes; nothing is hashed. Broken if not so."""
    try:
        sizes = place.files(step)
        if not sizes:
            raise Broken("it is empty")
        if NAME not in sizes:
            raise Broken(f"it has no {NAME}: its save did not finish")
        if sizes.pop(NAME) > MAX_BYTES:
            raise Broken(f"{NAME} is larger than {MAX_BYTES} bytes")
        manifest = _parse(place.read(step, NAME))
    except OSError as e:
        raise Broken(f"it cannot be read: {e.strerror or e}") from None
    if str(manifest.round) != step:
        raise Broken(f"its manifest is that of round {manifest.round}: it was copied or renamed")
    for name in sorted(sizes.keys() | manifest.files.keys()):
        if name not in sizes:
            raise Broken(f"{name} is missing")
        if name not in manifest.files:
            raise Broken(f"{name} does not belong to it")
        if sizes[name] != manifest.files[name][0]:
            raise Broken(f"{name} has {sizes[name]} bytes, not {manifest.files[name][0]}")
    return manifest


def verify(place, step: str) -> Manifest:
    """`read`, and then every file against its checksum. Broken if anything differs."""
    manifest = read(place, step)
    recorded = {name: checksum for name, (_, checksum) in manifest.files.items()}
    try:
        found = place.checksums(step, recorded)
    except OSError as e:
        raise Broken(f"it cannot be read: {e.strerror or e}") from None
    for name, checksum in recorded.items():
        if found[name] != checksum:
            raise Broken(f"{name} is not what was saved: its checksum differs")
    return manifest


def first_difference(saved: tuple[ArraySpec, ...], wanted: tuple[ArraySpec, ...]) -> str | None:
    """The first array that differs between what was saved and what is wanted, in words; None where none does."""
    a, b = ({s.name: s for s in specs} for specs in (saved, wanted))
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    if not names:
        return None
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}: saved {a.get(names[0], 'nothing')}, wanted {b.get(names[0], 'nothing')}{more}"


def _parse(data: bytes) -> Manifest:
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
