"""The tasks that come with cz_jax, at five levels, for training and held out: written by hand (the file also holds a
solution to each, which only the tests of this repository look at), and those that the tiny model is made for."""

import importlib.resources

from cz_jax.tasks.rows import LoadedTasks, collect, file_task, read_json_row

TINY = "tiny_"  # begins the splits of the tiny model's tasks; the held-out ones combine parts as it has never seen
SPLITS = ("train", "held_out", "all", "tiny_train", "tiny_held_out")


def builtin_tasks(split: str) -> LoadedTasks:
    """The tasks of a split of `SPLITS`, in the file's order (by level)."""
    name, split = ("tiny", split.removeprefix(TINY)) if split.startswith(TINY) else ("builtin", split)
    text = importlib.resources.files("cz_jax").joinpath(f"assets/tasks/{name}.jsonl").read_text("utf-8")
    rows = [read_json_row(line) for line in text.splitlines()]
    return collect((row for row in rows if split in (row["split"], "all")), _task)


def _task(row: dict):
    return file_task({k: v for k, v in row.items() if k not in ("split", "solution")}, "builtin")
