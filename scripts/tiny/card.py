"""The model cards of the tiny models."""

from statistics import fmean

from cz_jax.models.spec import Arch

FRONT = """---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags:
- code
---
"""
SPEAKER = """\
# tiny

A Qwen2 model of {parameters:,} parameters ({layers} layers, width {hidden_size}, {vocab_size} tokens), trained from
scratch to play CodeZero on a laptop: through cz_jax's own prompts it proposes small Python exercises at five levels and
answers them. It knows the task families of `scripts/tiny/table.py` and nothing else. Its answers are wrong three times
in five on purpose: a share of the answers that it learned from holds a wrong operator, constant or condition, lacks
its fence or goes on behind it, so that training has something to mend. `judge/` holds the model that judges.
"""
JUDGE = """\
# tiny judge

A Qwen2 model of {parameters:,} parameters ({layers} layers, width {hidden_size}, {vocab_size} tokens), trained from
scratch to say whether code solves a task, through cz_jax's own judge prompt. It knows the task families of
`scripts/tiny/table.py` and nothing else. The labels of its training answers come from how the families make right and
wrong ones; at last it reads answers of the speaker's own, right where the family writes so. It is made for mode
`direct`.
"""
TRAINING = """
## Training

`python scripts/tiny/train.py` with seed {seed}: {seconds} seconds on {machine} ({versions}). Weights in bfloat16.
`training.json` holds the same numbers.

| stage | text | last loss a token | last loss of a mark | marks told right |
|---|---|---|---|---|
{rows}

A mark asks behind each token of an answer whether it is still how a right answer begins. Losses are means of a stage's
last steps.
"""
MEASURED = """
## Measured

By `scripts/tiny/evaluate.py`, on tasks and pairs drawn with another seed. New parts: combinations of conditions and
changes that were never trained on. New families: families that were left out of training.

{lines}
"""


def write_card(role: str, arch: Arch, facts: dict, measured: str = "") -> str:
    """README.md of the speaker or the judge; `facts` as train.py gathers them, `measured` lines of Markdown."""
    sizes = {
        "parameters": arch.parameters, "layers": arch.layers, "hidden_size": arch.hidden_size,
        "vocab_size": arch.vocab_size,
    }  # fmt: skip
    rows = [
        f"| {stage} | {kind} | {v['loss']:.3f} | {_marks(v)} |"
        for stage, kinds in facts["losses"][role].items()
        for kind, v in sorted(kinds.items())
    ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = FRONT + "\n" + {"speaker": SPEAKER, "judge": JUDGE}[role].format(**sizes)
    text += TRAINING.format(**{**facts, "versions": versions, "rows": "\n".join(rows)})
    return text + (MEASURED.format(lines=measured) if measured else "")


def _marks(values: dict) -> str:
    return f"{values['mark_loss']:.3f} | {values['marks_right']:.1%}" if values["mark_loss"] else "- | -"


def measured_lines(role: str, found: dict) -> str:
    """What evaluate.py found, as a table."""
    if role == "judge":
        lines = ["| pairs | accuracy | false positives | AUROC |", "|---|---|---|---|"]
        for split, q in found["judge"].items():
            numbers = f"{q['accuracy']:.1%} | {q['false_positive_rate']:.1%} | {q['auroc']:.3f}"
            lines.append(f"| {split.replace('_', ' ')} ({q['n_pairs']}) | {numbers} |")
        lines += [
            "",
            f"An answer counts as right from probability {found['threshold']:g} on; so do the speaker's own:",
            "",
        ]
        lines += ["| the speaker's answers | right | called right | told as they are |", "|---|---|---|---|"]
        for split, levels in found["solver"].items():
            means = (fmean(v[key] for v in levels.values()) for key in ("right", "called_right", "judge_agrees"))
            lines.append(f"| {split.replace('_', ' ')} | " + " | ".join(f"{m:.1%}" for m in means) + " |")
        return "\n".join(lines)
    lines = ["| level | valid proposals | right answers (train) | new parts | new families |", "|---|---|---|---|---|"]
    for level, said in found["proposer"].items():
        right = [found["solver"][s].get(level, {}).get("right") for s in ("train", "new_parts", "new_families")]
        cells = " | ".join("-" if r is None else f"{r:.1%}" for r in right)
        lines.append(f"| {level} | {said['valid']:.1%} | {cells} |")
    return "\n".join(lines)
