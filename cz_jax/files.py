"""Writing a file so that a crash, a kill or a full disk leaves the old one or the new one and never a part of it."""

import os
import pathlib
import threading


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
