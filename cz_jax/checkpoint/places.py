"""Where checkpoints lie: a folder that this machine sees, or a part of a bucket of Google Cloud Storage.

Both hold steps by name ("12"), and in each step files by their path in it ("arrays/d/0"). A file's checksum is a
SHA-256 in lower-case hex, or `crc32c:` and the CRC32C in base64, which is what a bucket says of its objects by itself.
"""

import base64
import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from cz_jax.errors import CheckpointError, one_line
from cz_jax.files import local_folder, sync_folder, write_atomic

BUCKET = "gs://"
CRC32C = "crc32c:"
HASH_THREADS = 4
BLOCK = 1 << 20


class Broken(Exception):
    """A step that is not whole; the message says why."""


def place_at(where: str | os.PathLike) -> "Folder | Bucket":
    """The place that `where` names: a path, or gs://BUCKET/PREFIX. CheckpointError where gcsfs is not installed;
    ConfigError for another URL."""
    return Bucket(str(where)) if str(where).startswith(BUCKET) else Folder(local_folder(where).absolute())


class Folder:
    """Steps in a folder of a file system. OSError as the system raises it."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __str__(self):
        return str(self.path)

    def claim(self) -> int:
        """The descriptor that holds the folder's lock; the system drops the lock when its process ends, however it
        ends. CheckpointError where another process has it, or where nothing can be written here."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise CheckpointError(f"{self} cannot be written to: {e.strerror or e}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except OSError as e:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            if not isinstance(e, BlockingIOError):
                raise CheckpointError(f"{self} cannot be locked: {e.strerror or e}") from None
            raise CheckpointError(
                f"{self} is in use by another trainer, process {holder}",
                "two runs on one folder",
                "another --out folder",
            ) from None
        return descriptor

    def names(self) -> list[str]:
        """Of everything in the place; none where there is no such place yet."""
        return [path.name for path in self.path.iterdir()] if self.path.is_dir() else []

    def has(self, step: str) -> bool:
        return (self.path / step).exists()

    def files(self, step: str) -> dict[str, int]:
        """The size of every file of the step. Broken where it is no folder, or holds a link or a device."""
        folder = self.path / step
        if not folder.is_dir():
            raise Broken("it is not a folder")
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in _plain_files(folder)}

    def settle(self, step: str) -> dict[str, tuple[int, str]]:
        """Makes the step's files survive a power cut; the size and checksum of each."""
        folder = self.path / step
        paths = _plain_files(folder)
        hashes = _in_threads(lambda path: _sha256(path, sync=True), paths)
        for path in sorted({p.parent for p in paths} | {folder}):
            sync_folder(path)
        return {
            path.relative_to(folder).as_posix(): (path.stat().st_size, found)
            for path, found in zip(paths, hashes, strict=True)
        }

    def checksums(self, step: str, recorded: Mapping[str, str]) -> dict[str, str]:
        """The checksum of each file as it is now, of the same kind as the recorded one."""
        paths = [self.path / step / name for name in recorded]
        kinds = [_crc32c if c.startswith(CRC32C) else _sha256 for c in recorded.values()]
        found = _in_threads(lambda pair: pair[0](pair[1]), list(zip(kinds, paths, strict=True)))
        return dict(zip(recorded, found, strict=True))

    def read(self, step: str, name: str) -> bytes:
        return (self.path / step / name).read_bytes()

    def write(self, step: str, name: str, data: bytes) -> None:
        """Whole or not at all, and it would survive a power cut."""
        write_atomic(self.path / step / name, data)

    def make(self, step: str) -> None:
        (self.path / step).mkdir()

    def made(self) -> None:
        """Makes the names of new steps survive a power cut."""
        sync_folder(self.path)

    def move(self, step: str, to: str) -> None:
        (self.path / step).rename(self.path / to)

    def remove(self, step: str, first: str) -> None:
        """Removes the step, its file `first` before all others."""
        if (self.path / step / first).exists():
            (self.path / step / first).unlink()
            sync_folder(self.path / step)
        shutil.rmtree(self.path / step)

    def url(self, step: str, name: str) -> pathlib.Path:
        """For Orbax, to be used inside of `told`."""
        return self.path / step / name

    def told(self):
        return contextlib.nullcontext()


@contextlib.contextmanager
def held(folder: pathlib.Path):
    """Holds the lock of a folder that the checkpoints are not in. CheckpointError where another process has it."""
    descriptor = Folder(folder).claim()
    try:
        yield
    finally:
        os.close(descriptor)


class Bucket:
    """Steps under gs://BUCKET/PREFIX, as gcsfs and TensorStore reach it: with the credentials of the machine or of
    `gcloud auth application-default login`. What the bucket has taken is durable, and what it says of an object's
    size and CRC32C is believed, so that nothing is read back. CheckpointError where it cannot be reached.

    A bucket has no lock that goes away with its holder: that one trainer alone writes here is for the user to see to.
    """

    def __init__(self, where: str):
        prefix = where.removeprefix(BUCKET).strip("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9](/[^/#?*\[\]]+)+", prefix):
            raise CheckpointError(f"{where} names no place in a bucket", "", "gs://my-bucket/runs/first/checkpoints")
        try:
            import fsspec
            import gcsfs
        except ImportError:
            raise CheckpointError(
                f"{where} is in a bucket, and gcsfs is not installed", "", "pip install 'cz-jax[gcs]'"
            ) from None
        # Other hosts write here too, so a listing that is kept would soon be wrong; Orbax asks for "gcs" by name.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        self._files = gcsfs.GCSFileSystem(use_listings_cache=False)
        self._prefix, self._bucket = prefix, prefix.split("/")[0]

    def __str__(self):
        return BUCKET + self._prefix

    def claim(self) -> None:
        """CheckpointError where the bucket cannot be reached."""
        self.names()

    def names(self) -> list[str]:
        with self.told():
            try:
                found = self._files.ls(self._prefix, detail=False)
            except FileNotFoundError:
                found = []
                try:
                    self._files.ls(self._bucket, detail=False)
                except FileNotFoundError as e:
                    raise self._unreachable(e) from None
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {""})

    def has(self, step: str) -> bool:
        return bool(self._find(step))

    def files(self, step: str) -> dict[str, int]:
        return {name: entry["size"] for name, entry in self._entries(step).items()}

    def settle(self, step: str) -> dict[str, tuple[int, str]]:
        return {name: (e["size"], CRC32C + e["crc32c"]) for name, e in self._entries(step).items()}

    def checksums(self, step: str, recorded: Mapping[str, str]) -> dict[str, str]:
        entries = self._entries(step)
        found = {name: CRC32C + entries[name]["crc32c"] for name in recorded}
        others = [name for name, checksum in recorded.items() if not checksum.startswith(CRC32C)]
        return found | dict(zip(others, _in_threads(lambda name: self._sha256(step, name), others), strict=True))

    def read(self, step: str, name: str) -> bytes:
        with self.told():
            return self._files.cat_file(self._at(step, name))

    def write(self, step: str, name: str, data: bytes) -> None:
        with self.told():
            self._files.pipe_file(self._at(step, name), data)

    def make(self, step: str) -> None:
        """Nothing: in a bucket a folder is there as soon as something lies in it."""

    def made(self) -> None:
        """Nothing: what a bucket has taken is durable."""

    def move(self, step: str, to: str) -> None:
        paths, at = list(self._find(step)), self._at(step)
        with self.told():
            for path in paths:
                self._files.cp_file(path, self._at(to) + path.removeprefix(at))
            self._files.rm(paths)

    def remove(self, step: str, first: str) -> None:
        paths, before = self._find(step), self._at(step, first)
        with self.told():
            for batch in ([before] if before in paths else [], sorted(paths.keys() - {before})):
                if batch:
                    self._files.rm(batch)

    def url(self, step: str, name: str):
        from etils import epath

        return epath.Path(BUCKET + self._at(step, name))

    def _at(self, *names: str) -> str:
        return "/".join((self._prefix, *names))

    def _find(self, step: str) -> dict[str, dict]:
        with self.told():
            return self._files.find(self._at(step), detail=True)

    def _entries(self, step: str) -> dict[str, dict]:
        """What the bucket says of each object of the step. Broken where the step is an object itself."""
        at, found = self._at(step), self._find(step)
        if at in found:
            raise Broken("it is not a folder")
        return {path.removeprefix(at + "/"): entry for path, entry in sorted(found.items())}

    def _sha256(self, step: str, name: str) -> str:
        with self.told(), self._files.open(self._at(step, name), "rb", block_size=8 * BLOCK) as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    @contextlib.contextmanager
    def told(self):
        """gcsfs and TensorStore raise what the libraries below them raise; here it is a CheckpointError, so that no
        step is taken for broken because the network is. FileNotFoundError passes."""
        try:
            yield
        except (FileNotFoundError, CheckpointError):
            raise
        except Exception as e:
            raise self._unreachable(e) from e

    def _unreachable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self} cannot be used: {type(error).__name__}: {one_line(str(error))}",
            "no such bucket, no network, or no credentials that may write to it",
            f"gcloud auth application-default login, and gcloud storage ls {BUCKET}{self._bucket}",
        )


def _plain_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every file under `folder`, sorted. Broken for a link or a device."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in names + folders:
            path = pathlib.Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Broken(f"{path.relative_to(folder).as_posix()} is not a plain file")
            if path.is_file():
                found.append(path)
    return sorted(found)


def _raise(error: OSError):
    raise error


def _in_threads(work, items: list) -> list:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(work, items))


def _sha256(path: pathlib.Path, sync: bool = False) -> str:
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
        if sync:
            os.fsync(f.fileno())
    return found


def _crc32c(path: pathlib.Path) -> str:
    try:
        import google_crc32c
    except ImportError:
        raise CheckpointError(
            f"{path} was copied from a bucket, and its CRC32C cannot be checked here", "", "pip install 'cz-jax[gcs]'"
        ) from None
    found = google_crc32c.Checksum()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            found.update(block)
    return CRC32C + base64.b64encode(found.digest()).decode("ascii")
