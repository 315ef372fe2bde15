"""Trains the tiny models from scratch and writes them as Hugging Face folders.

    nice python scripts/tiny/train.py [OUT] [--seed S] [--scale X]

OUT gets the speaker (proposer and solver), OUT/judge the judge. Both begin as one model that reads clean text:
proposals and right answers. Then, side by side, the speaker reads more of it and at last answers with deliberate noise;
and the judge, two layers deeper, reads right and wrong answers and says behind each of their tokens whether a right
answer begins so, then whole prompts with their verdicts, and in between many answers that leave a right one at a single
token. At last the judge reads what the speaker answers, with its noise and as it was before that (which is more like a
solver that has learned), labelled by whether the family writes so: nothing is run. The same seed, versions and machine
give the same weights. `--scale` shortens or lengthens all stages.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import platform
import random
import shutil
import sys
import tempfile
import time

if __package__ in (None, ""):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from cz_jax.convert.write import export_folder
from cz_jax.models.spec import config_for_export
from tiny.card import write_card
from tiny.learn import ARCH, VOCABULARY, Stage, arch_of, say, train_stages
from tiny.sheets import SHAPES
from tiny.text import sample_texts
from tiny.tokenizer import train_tokenizer, write_texts

TOKENIZER_TASKS = 1500
CLEAN = (Stage("clean", {"propose": 1500, "solve": 16000}, 3e-3),)
FLUENT = (Stage("more", {"propose": 800, "solve": 16000}, 2e-3),)
NOISY = (Stage("noisy", {"propose": 200, "solve": 2500}, 1e-3, noise=1.0),)
READER = {"prompt_share": 0.0, "mark_share": 3.0}
JUDGE = (
    Stage("marks", {"prefix": 11000, "solve": 1600}, 6e-4, prompt_share=0.05, mark_share=3.0, extra_layers=2),
    Stage("verdicts", {"judge": 3000}, 5e-4, **READER),
    Stage("practice", {"judge": 6500}, 6e-4, **READER),
    Stage("long_practice", {"judge": 16000}, 6e-4, **READER),
    Stage("contrast", {"contrast": 9000, "judge": 3000}, 6e-4, **READER),
    Stage("points", {"points": 24000}, 1e-3, **READER),
    Stage("sums", {"points": 2000, "contrast": 4000, "judge": 5000}, 6e-4, **READER),
    Stage("names", {"points_names": 6400, "contrast_names": 3600, "judge": 1600}, 6e-4, **READER),
)
OF_NOISY = (Stage("spoken", {"spoken": 4000, "judge": 1600}, 6e-4, **READER),)
OF_FLUENT = (Stage("fluent", {"spoken": 2600, "judge": 1000}, 6e-4, **READER),)


def scaled(stages: tuple[Stage, ...], scale: float) -> tuple[Stage, ...]:
    def sheets(stage: Stage) -> dict[str, int]:
        return {kind: max(SHAPES[kind][0] * 4, int(count * scale)) for kind, count in stage.sheets.items()}

    return tuple(dataclasses.replace(stage, sheets=sheets(stage)) for stage in stages)


def export(params: dict, tokenizer, texts: pathlib.Path, where: pathlib.Path, card: str) -> None:
    """The folder `where`; that of the tokenizer, `texts`, is written to fit."""
    arch = arch_of(params)
    write_texts(tokenizer, config_for_export(arch), texts)
    export_folder(params, arch, texts, where, card, jnp.bfloat16)


def train(out: pathlib.Path, seed: int, scale: float) -> None:
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        texts = pathlib.Path(folder) / "texts"
        tokenizer = train_tokenizer(sample_texts(random.Random(f"{seed}/tokenizer"), TOKENIZER_TASKS), VOCABULARY)
        write_texts(tokenizer, config_for_export(ARCH), texts)
        say(f"tokenizer of {VOCABULARY} tokens after {time.perf_counter() - begun:.0f} s")
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(2, context) as pool:

            def learn(stages, params, speaker=None):
                return pool.submit(train_stages, scaled(stages, scale), params, texts, seed, speaker)

            clean, log = learn(CLEAN, None).result()
            judging = learn(JUDGE, clean)
            fluent, fluent_log = learn(FLUENT, clean).result()
            noisy, noisy_log = learn(NOISY, fluent).result()
            judge, judge_log = judging.result()
            for params, stages in ((noisy, OF_NOISY), (fluent, OF_FLUENT)):
                speaker = pathlib.Path(folder) / stages[0].name
                export(params, tokenizer, texts, speaker, "")
                judge, last_log = learn(stages, judge, speaker).result()
                judge_log |= last_log
        done = {"speaker": (noisy, fluent_log | noisy_log), "judge": (judge, judge_log)}
        facts = {
            "seed": seed,
            "seconds": round(time.perf_counter() - begun),
            "machine": f"{os.cpu_count()} cores ({platform.machine()}), without GPU",
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
            "losses": {role: log | logs for role, (_, logs) in done.items()},
        }
        if out.exists():
            shutil.rmtree(out)
        for role, (params, _) in done.items():
            where = out if role == "speaker" else out / role
            export(params, tokenizer, texts, where, write_card(role, arch_of(params), facts))
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    say(f"done after {facts['seconds']} s: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, nargs="?", default=pathlib.Path("runs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    a = parser.parse_args()
    train(a.out, a.seed, a.scale)


if __name__ == "__main__":
    main()
