"""Reads a task source named on the command line or in a config: our own tasks, MBPP, CodeContests, or a file.

Rows come through the `datasets` library, imported when first needed. Local files are streamed, so that nothing is
cached and no network is needed; JSONL is read as lines of text and parsed here, because one malformed line would cost
`datasets`' own JSON reader the whole file. Data sets that ask to run code of their own are not supported by `datasets`.
"""

import contextlib
import functools
import glob
import itertools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cz_jax.errors import TaskError, one_line
from cz_jax.nouns import Task
from cz_jax.tasks.builtin import SPLITS, builtin_tasks
from cz_jax.tasks.rows import (
    LoadedTasks,
    code_contests_task,
    collect,
    file_task,
    mbpp_task,
    read_json_row,
)

DEFAULT_SPLIT = "train"
STREAMED_ROWS = 2_000  # read of CodeContests where it is not local JSONL: the whole is gigabytes
HUB_TIMEOUT = 10.0  # seconds for the first answer of the hub

_FORMS = "builtin[@SPLIT], mbpp[:PATH][@SPLIT], code_contests[:PATH][@SPLIT] or file:PATH.jsonl"
_SPEC = re.compile(r"(?P<name>[a-z_]+)(?::(?P<path>.*?))?(?:@(?P<split>[\w-]+))?", re.DOTALL)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PARQUET_FOLDERS = ("", "data", "full")  # where data sets keep their parquet files


@dataclass(frozen=True)
class _DataSet:
    """One of the data sets that have a format here."""

    make: Callable[[dict], Task]
    hub_id: str
    hub_splits: tuple[str, ...]
    streamed: bool  # too large to be kept in the hub's cache


_DATA_SETS = {
    "mbpp": _DataSet(mbpp_task, "google-research-datasets/mbpp", ("train", "test", "validation", "prompt"), False),
    "code_contests": _DataSet(code_contests_task, "deepmind/code_contests", ("train", "valid", "test"), True),
}


def load_tasks(spec: str) -> LoadedTasks:
    """The tasks that `spec` names, in the order of the source, and the rows that were left out, counted by reason.

    `builtin[@train|held_out|all]`, `mbpp[:PATH][@SPLIT]`, `code_contests[:PATH][@SPLIT]` or `file:PATH.jsonl`; the
    split is "train" unless said. PATH is a folder with {SPLIT}.jsonl, a folder with parquet files named after the
    split, or a hub id; without it the data set is read from the hub. MBPP is kept in the hub's cache; CodeContests is
    streamed, and from the hub or from parquet only its first 2,000 rows. `rows.file_task` says what `file:` rows hold.

    A row is left out, never repaired or cut, where it is not a strict JSON object; lacks a field, has an empty one or
    one of another type; is not valid Unicode (a lone surrogate, NUL); has a question of more than 6,000 characters or a
    test of more than 2,000; has tests that do not parse or whose function cannot be told; or repeats an earlier task.
    Blank lines do not count. `rows.mbpp_task` and `rows.code_contests_task` say what else each format leaves out.

    TaskError: a spec of another form, a path or split that is not there, no network, or no usable row.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or match["name"] not in ("builtin", "file", *_DATA_SETS):
        raise TaskError(f"{spec!r} is no task source", f"known are {_FORMS}", "builtin@train")
    name, path, split = match["name"], match["path"], match["split"]
    if path == "":
        raise TaskError(
            f"{spec!r} names no path after the colon", "", f"{name}:PATH" if name != "builtin" else "builtin"
        )
    if name == "builtin":
        if path is not None:
            raise TaskError(f"{spec!r}: builtin takes no path", "the tasks come with cz_jax", "builtin@train")
        if (split or DEFAULT_SPLIT) not in SPLITS:
            raise _no_split(spec, split, SPLITS, "builtin")
        return builtin_tasks(split or DEFAULT_SPLIT)
    if name == "file":
        if split is not None or path is None:
            raise TaskError(
                f"{spec!r}: file takes a path and no split", "a file is one set of tasks", "file:tasks.jsonl"
            )
        return _usable(spec, _lines(spec, path), lambda line: file_task(read_json_row(line)))
    return _data_set(spec, name, path, split or DEFAULT_SPLIT)


def _data_set(spec: str, name: str, path: str | None, split: str) -> LoadedTasks:
    known = _DATA_SETS[name]
    if path is None:
        if split not in known.hub_splits:
            raise _no_split(spec, split, known.hub_splits, name)
        return _usable(spec, _hub_rows(spec, known.hub_id, split, known.streamed), known.make)
    folder = _expand(path)
    if os.path.isdir(folder):
        splits = sorted(p.stem for p in folder.glob("*.jsonl"))
        if split in splits:
            lines = _lines(spec, str(folder / f"{split}.jsonl"))
            return _usable(spec, lines, lambda line: known.make(read_json_row(line)))
        parquet = _parquet_files(folder)
        if split in parquet:
            return _usable(spec, _parquet_rows(spec, parquet[split], known.streamed), known.make)
        if not splits and not parquet:
            raise TaskError(
                f"{path} holds no *.jsonl and no *.parquet file", "another folder is meant?", f"{name}:FOLDER@{split}"
            )
        raise _no_split(spec, split, sorted({*splits, *parquet}), f"{name}:{path}")
    if os.path.exists(folder):
        raise TaskError(
            f"{path} is not a folder", "a data set is named by its folder", f"{name}:{folder.parent}@{split}"
        )
    if _HUB_ID.fullmatch(path):
        return _usable(spec, _hub_rows(spec, path, split, known.streamed), known.make)
    raise TaskError(
        f"no folder {path}", "the path is mistyped, or relative to another folder", f"{name}:FOLDER@{split}"
    )


def _usable(spec: str, rows: Iterator, make: Callable) -> LoadedTasks:
    loaded = collect(rows, make)
    if not loaded.tasks:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(loaded.skipped.items(), key=_most)[:3])
        raise TaskError(
            f"{spec} holds no usable task" + (f": {reasons}" if reasons else ": it has no rows"),
            "rows of another format than the spec says" if reasons else "an empty or half-written file",
            'JSONL rows like {"question": "...", "tests": ["assert f(1) == 2"], "entry_point": "f", "level": 1}'
            if spec.startswith("file:")
            else "builtin@train",
        )
    return loaded


def _most(item: tuple[str, int]):
    return -item[1], item[0]


def _no_split(spec: str, split: str | None, splits, name: str) -> TaskError:
    example = DEFAULT_SPLIT if DEFAULT_SPLIT in splits else splits[0]
    return TaskError(f"{spec!r}: there is no split {split!r}", f"known here: {', '.join(splits)}", f"{name}@{example}")


def _expand(path: str) -> pathlib.Path:
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:  # "~" without a home folder
        return pathlib.Path(path)


@functools.cache
def _datasets():
    """The `datasets` library without progress bars, and without the download counts it reports even for local files."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


@contextlib.contextmanager
def _readable(spec: str):
    """Turns what reading local data raises into a TaskError."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException, _datasets().exceptions.DatasetsError) as e:
        cause = e.__cause__ or e
        raise TaskError(
            f"{spec} cannot be read: {one_line(str(cause), 200)}", "no permission, or a damaged file?"
        ) from None


def _lines(spec: str, path: str) -> Iterator[str]:
    """The lines of a text file that are not blank. A byte that is not UTF-8 becomes an escape that JSON refuses."""
    file = _expand(path)
    if not os.path.isfile(file):
        what = "is a folder" if os.path.isdir(file) else "does not exist"
        raise TaskError(f"{path} {what}", "the path is mistyped, or relative to another folder", "file:PATH.jsonl")
    rows = _stream(spec, "text", [file], encoding_errors="backslashreplace")
    return (row["text"] for row in rows if row["text"].strip())


def _parquet_files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of each split, named SPLIT.parquet or SPLIT-00000-of-00002.parquet, of the first folder with any."""
    for name in _PARQUET_FOLDERS:
        files: dict[str, list[pathlib.Path]] = {}
        for file in sorted((folder / name).glob("*.parquet")):
            files.setdefault(re.sub(r"-\d+(-of-\d+.*)?$", "", file.stem), []).append(file)
        if files:
            return files
    return {}


def _parquet_rows(spec: str, files: list[pathlib.Path], bounded: bool) -> Iterator[dict]:
    return itertools.islice(_stream(spec, "parquet", files), STREAMED_ROWS if bounded else None)


def _stream(spec: str, reader: str, files: list[pathlib.Path], **options) -> Iterator[dict]:
    """The rows of local files, one by one, through a reader of `datasets`; nothing outlives the iteration on disk."""
    paths = [glob.escape(str(file.resolve())) for file in files]
    with _readable(spec), tempfile.TemporaryDirectory() as cache:
        yield from _datasets().load_dataset(
            reader, data_files={"train": paths}, split="train", streaming=True, cache_dir=cache, **options
        )


def _hub_rows(spec: str, hub_id: str, split: str, streamed: bool) -> Iterator[dict]:
    """The rows of a data set on the hub. Asks the hub once, with a deadline, before `datasets` would retry for long."""
    datasets = _datasets()
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:  # offline, what the hub's cache holds may still do
            HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)
        rows = datasets.load_dataset(hub_id, split=split, streaming=streamed)
        yield from itertools.islice(rows, STREAMED_ROWS if streamed else None)
    except Exception as e:  # each major version of the hub's client lets another HTTP library's errors through
        name = re.split("[:@]", spec, maxsplit=1)[0]
        here = f"there is no folder {hub_id} here, and " if ":" in spec else ""
        raise TaskError(
            f"{spec}: {here}{hub_id} cannot be read from the Hugging Face hub: {one_line(str(e), 200)}",
            _hub_cause(e),
            f"{name}:FOLDER@{split} with a local copy",
        ) from None


def _hub_cause(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "no such data set there, or a private one"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the hub's cache does not hold it"
    return "no such split, or a damaged data set" if isinstance(error, ValueError) else "no network?"
