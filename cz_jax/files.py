"""Writing a file so that a crash, a kill or a full disk leaves the old one or the new one and never a part of it."""

import os
import pathlib
import re
import threading

from cz_jax.errors import ConfigError


def local_folder(path: str | os.PathLike) -> pathlib.Path:
    """`path` as a folder of this machine. ConfigError for a URL: gs://x would be a folder named `gs:`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        url = re.sub(r":/+", "://", str(path), count=1)
        raise ConfigError(
            f"{url} is no folder of this machine",
            "runs, models and logs are written to local folders, because files there can be locked and made durable",
            f"runs/{pathlib.PurePosixPath(url).name}, copied with gcloud storage rsync --recursive (tpu/run does where "
            "BUCKET is set); checkpoints alone may go to checkpoint.folder=gs://...",
        )
    return pathlib.Path(path)


def is_taken(out: pathlib.Path) -> bool:
    """Whether something stands at `out` that a new folder there would mix with or replace."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Puts `data` at `path`, whole or not at all, and returns once it would survive a power cut.

    OSError where the disk is full or the folder is missing; what stood at `path` is then still there.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: str | os.PathLike) -> None:
    """Makes the names in a folder (new, renamed, removed) survive a power cut. OSError where it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
