"""Judging beside an evaluator that replies: greedy generate of transformers, one answer at a time.

usage: python scripts/compare_judging.py MODEL_DIR [--modes direct generate] [--repeats 3] [--answers 10]

MODEL_DIR is a Hugging Face folder that both load; torch has to be installed. 8 tasks x 8 answers, 256 + 128 tokens, 64
new tokens where a reply is generated. Each repeat times every mode and then transformers on --answers of the 64
answers, whose median counts 64 times; a ratio is the median over repeats of the pairs.
"""

import argparse
import statistics
import time

import torch
from compare_peers import ours
from transformers import AutoModelForCausalLM

TASKS, GROUP, TASK_TOKENS, ANSWER_TOKENS, NEW_TOKENS = 8, 8, 256, 128, 64
SHAPE = [str(n) for n in (TASKS, GROUP, TASK_TOKENS, ANSWER_TOKENS)]


def transformers_one_by_one(model, answers: int) -> float:
    tokens = torch.randint(3, model.config.vocab_size, (answers + 1, 1, TASK_TOKENS + ANSWER_TOKENS))
    times = []
    for row in tokens:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                row, attention_mask=torch.ones_like(row), do_sample=False, min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS, pad_token_id=2,
            )  # fmt: skip
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * TASKS * GROUP  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--modes", nargs="+", choices=("direct", "reason", "generate"), default=["direct", "generate"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=10)
    a = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    turns = []
    for _ in range(a.repeats):
        turn = {mode: ours(a.model, "judge", SHAPE, "--mode", mode)["seconds"] for mode in a.modes}
        turns.append(turn | {"transformers": transformers_one_by_one(model, a.answers)})
    print("| mode | seconds | transformers, one by one | x (range) |")
    print("|---|---|---|---|")
    theirs = statistics.median(t["transformers"] for t in turns)
    for mode in a.modes:
        ratios = sorted(t["transformers"] / t[mode] for t in turns)
        cells = [mode, f"{statistics.median(t[mode] for t in turns):.2f}", f"{theirs:.1f}"]
        cells.append(f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
