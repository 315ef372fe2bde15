"""The tasks that come with cz_jax: written for it, five levels, a held-out quarter. The data file also holds a solution
to each; only the tests of this repository look at it."""

import importlib.resources

from cz_jax.tasks.rows import LoadedTasks, collect, file_task, read_json_row

SPLITS = ("train", "held_out", "all")


def builtin_tasks(split: str) -> LoadedTasks:
    """The tasks of a split of `SPLITS`, in the file's order (by level)."""
    text = importlib.resources.files("cz_jax").joinpath("assets/tasks/builtin.jsonl").read_text("utf-8")
    rows = [read_json_row(line) for line in text.splitlines()]
    return collect((row for row in rows if split in (row["split"], "all")), _task)


def _task(row: dict):
    return file_task({k: v for k, v in row.items() if k not in ("split", "solution")}, "builtin")
