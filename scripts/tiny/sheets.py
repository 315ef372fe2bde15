"""Sheets of training text by number, and batches of few shapes from them."""

import pathlib
import random
from collections.abc import Sequence

import numpy as np

from cz_jax.convert.tokenizer import ChatTokenizer, load_tokenizer
from cz_jax.models.spec import arch_from_folder
from tiny.families import draw
from tiny.speak import speak
from tiny.text import LEVELS, NONE, Sheet, judge_sheet, propose_sheet, solve_sheet

# Kind of sheet -> (sheets a step, [(prompt tokens, continuation tokens), ...]); a sheet goes where it first fits.
SHAPES = {
    "propose": (4, ((128, 96), (192, 144))),
    "solve": (16, ((112, 40), (176, 80))),
    "prefix": (8, ((160, 48), (208, 72))),
    "points": (8, ((144, 32), (176, 40), (208, 64))),
    "judge": (8, ((160, 84), (208, 112))),
    "contrast": (8, ((160, 84), (208, 112))),
    "points_names": (8, ((144, 32), (176, 40), (208, 64))),
    "contrast_names": (8, ((160, 84), (208, 112))),
    "spoken": (8, ((160, 84), (208, 112))),
}


def sheet_rng(kind: str, number: int, seed: str) -> tuple[random.Random, int]:
    """What sheet `number` is drawn with, and its level."""
    return random.Random(f"{seed}/{kind}/{number}"), LEVELS[number % len(LEVELS)]


def make_sheet(
    tokenizer: ChatTokenizer, kind: str, number: int, noise: float, seed: str, said: Sequence[str] = ()
) -> Sheet:
    rng, level = sheet_rng(kind, number, seed)
    if kind == "propose":
        return propose_sheet(tokenizer, rng, level)
    if kind == "solve":
        return solve_sheet(tokenizer, rng, level, noise)
    return judge_sheet(tokenizer, rng, level, kind, said)


def make_sheets(
    counts: dict[str, int], seed: str, noise: float, folder: pathlib.Path, speaker: pathlib.Path | None = None
) -> list[Sheet]:
    """So many sheets of each kind, the levels in turn; each follows from its number. `folder`: the tokenizer's;
    `speaker`: the folder of the model whose answers "spoken" sheets show."""
    tokenizer = load_tokenizer(folder, arch_from_folder(folder))
    sheets = []
    for kind, count in counts.items():
        said = [()] * count
        if kind == "spoken":
            drawn = (sheet_rng(kind, n, seed) for n in range(count))
            said = speak(speaker, [draw(rng, "train", level) for rng, level in drawn])
        sheets += [make_sheet(tokenizer, kind, n, noise, seed, said[n]) for n in range(count)]
    return sheets


def batches_of(sheets: list[Sheet], rng: random.Random, pad: int) -> list[dict]:
    """The sheets as batches of few shapes, in random order. What does not fit, and the last incomplete batch of a
    shape, is left out."""
    shelves: dict[tuple, list[Sheet]] = {}
    for sheet in sheets:
        for shape in SHAPES[sheet.kind][1]:
            if len(sheet.prompt) <= shape[0] and max(len(r.tokens) for r in sheet.rows) <= shape[1]:
                shelves.setdefault((sheet.kind, shape), []).append(sheet)
                break
    made = []
    for (kind, shape), shelf in shelves.items():
        rng.shuffle(shelf)
        size = SHAPES[kind][0]
        made += [batch_of(shelf[i : i + size], shape, pad) for i in range(0, len(shelf) - size + 1, size)]
    rng.shuffle(made)
    return made


def batch_of(sheets: list[Sheet], shape: tuple[int, int], pad: int) -> dict:
    """Arrays: prompts [P, Tp], lengths [P], rows, weights, marks and mark_weights [P, G, Ts], ends [P, G];
    `only_last` where of each row just the last token has a loss of its own."""
    p, g = len(sheets), max(len(s.rows) for s in sheets)
    batch = {
        "prompts": np.full((p, shape[0]), pad, np.int32),
        "lengths": np.array([len(s.prompt) for s in sheets], np.int32),
        "rows": np.full((p, g, shape[1]), pad, np.int32),
        "weights": np.zeros((p, g, shape[1]), np.float32),
        "marks": np.full((p, g, shape[1]), NONE, np.int8),
        "mark_weights": np.zeros((p, g, shape[1]), np.float32),
        "ends": np.ones((p, g), np.int32),
    }
    for i, sheet in enumerate(sheets):
        batch["prompts"][i, : len(sheet.prompt)] = sheet.prompt
        for j, row in enumerate(sheet.rows):
            n = len(row.tokens)
            batch["rows"][i, j, :n], batch["weights"][i, j, :n] = row.tokens, row.weights
            batch["marks"][i, j, :n], batch["mark_weights"][i, j, :n] = row.marks, row.mark_weights
            batch["ends"][i, j] = n
    return {"only_last": sheets[0].kind.startswith(("judge", "contrast", "spoken")), "kind": sheets[0].kind, **batch}
