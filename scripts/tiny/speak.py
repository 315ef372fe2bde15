"""Answers that a trained speaker gives, for the judge to read: sampled and spelled out, never run."""

import pathlib

from cz_jax import parallel
from cz_jax.build.models import load_model
from cz_jax.config import SamplingConfig
from cz_jax.roles.evaluator import readable
from cz_jax.roles.solver import ModelSolver
from tiny.families import Item

TRIES = 16  # answers to a task
NEW_TOKENS = 96
AT_ONCE = 256


def speak(folder: pathlib.Path, items: list[Item]) -> list[list[str]]:
    """For each item the different answers of `TRIES` that an evaluator would be asked about, as it reads them."""
    mesh = parallel.make_mesh(1, -1, 1)
    engine = load_model(str(folder), None, "float32", mesh).engine(mesh, "float32", AT_ONCE)
    solver = ModelSolver(engine, SamplingConfig(max_new_tokens=NEW_TOKENS), TRIES, 0, "tiny", lambda: "")
    said = []
    for at in range(0, len(items), AT_ONCE):
        some = items[at : at + AT_ONCE]
        for item, group in zip(some, solver.roll_out([i.task for i in some], at), strict=True):
            read = dict.fromkeys(readable(item.task, r.text) for r in group.rollouts)
            said.append([code for code in read if isinstance(code, str)])
        print(f"  the speaker answered {len(said)}/{len(items)} tasks", flush=True)
    return said
