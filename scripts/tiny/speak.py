"""Answers that a trained speaker gives, for the judge to read: sampled and spelled out, never run."""

import pathlib

from cz_jax import parallel
from cz_jax.build.models import load_model
from cz_jax.config import SamplingConfig
from cz_jax.roles.solver import ModelSolver
from cz_jax.text.answers import extract_code, normalise
from cz_jax.text.names import fault
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
            codes = (extract_code(r.text).code for r in group.rollouts)
            plain = dict.fromkeys(normalise(code) for code in codes if code is not None)
            said.append([code for code in plain if code and fault(code, item.task) is None])
        print(f"  the speaker answered {len(said)}/{len(items)} tasks", flush=True)
    return said
