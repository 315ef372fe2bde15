"""How good the tiny models are, through the real roles; what an answer gives is found by our own small interpreter.

    nice python scripts/tiny/evaluate.py [FOLDER] [--judge FOLDER] [--tasks N] [--pairs N] [--mode direct|reason]
                                         [--seed S] [--card]

FOLDER holds the speaker (default: the embedded model), or a solver that was trained from it; the judge is the one
beside it, or --judge. Prints one JSON object: valid proposals by level; right answers of the solver by level and split
(train: new draws of trained families; new_parts: combinations of parts never trained on; new_families) and the share
that the judge calls right, whose growing distance from the first would be reward hacking, of all and of the wrong ones;
the judge on made pairs by split.
"""

import argparse
import json
import os
import pathlib
import random
import sys
from statistics import fmean

if __package__ in (None, ""):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from cz_jax import parallel
from cz_jax.build.models import load_model
from cz_jax.config import EvaluatorConfig, ProposerConfig, SamplingConfig
from cz_jax.local_swarm import DEMO
from cz_jax.metrics import judge_quality
from cz_jax.models.spec import arch_from_folder
from cz_jax.nouns import Level, Outcome
from cz_jax.roles.evaluator import ModelEvaluator
from cz_jax.roles.proposer import ModelProposer
from cz_jax.roles.solver import ModelSolver
from cz_jax.text.answers import extract_code
from tiny.card import measured_lines, write_card
from tiny.families import SPLITS, Item, draw, families_of
from tiny.mutate import wrong_bodies
from tiny.text import LEVELS

NEW_TOKENS = 160
THRESHOLD = DEMO["evaluator"]["threshold"]  # from which probability an answer counts as right
ROLLOUTS = 8
AT_ONCE = 64


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def evaluate_proposer(engine, count: int, seed: int) -> dict:
    """Valid proposals of `count` tries at each level, and why the others were refused."""
    proposer = ModelProposer(engine, ProposerConfig(max_tries=1, max_new_tokens=NEW_TOKENS, memory=0), seed)
    found = {}
    for level in LEVELS:
        refused: dict[str, int] = {}
        valid = tries = 0
        for number in range(max(1, count // 16)):
            said = proposer.propose(Level(level), 16, number)
            valid, tries = valid + len(said.tasks), tries + said.tries
            for reason, n in said.refused.items():
                refused[reason] = refused.get(reason, 0) + n
        found[level] = {"valid": valid / tries, "refused": refused}
        _tell(f"proposals of level {level}: {valid / tries:.1%} of {tries} valid")
    return found


def evaluate_solver(solver: ModelSolver, split: str, count: int, seed: int, evaluator: ModelEvaluator | None) -> dict:
    """By level: the share of right answers, of answers with one python fence, of those that ended; and how the
    evaluator's verdicts agree with what the answers give."""
    found = {}
    for level in LEVELS:
        if not families_of(split, level):
            continue
        rng = random.Random(f"{seed}/solver/{split}/{level}")
        items = list({i.task.id: i for i in (draw(rng, split, level) for _ in range(count))}.values())
        groups = solver.roll_out([i.task for i in items], 0)
        rows = [(i, r) for i, g in zip(items, groups, strict=True) for r in g.rollouts]
        codes = [extract_code(r.text).code for _, r in rows]
        right = [code is not None and item.solved_by(code) for (item, _), code in zip(rows, codes, strict=True)]
        found[level] = {
            "right": fmean(right),
            "solved_at_all": fmean(any(right[at : at + ROLLOUTS]) for at in range(0, len(right), ROLLOUTS)),
            "one_fence": fmean(code is not None for code in codes),
            "ended": fmean(r.ended for _, r in rows),
            "tokens": fmean(len(r.tokens) for _, r in rows),
        }
        if evaluator is not None:
            said = [v.outcome is Outcome.CORRECT for row in evaluator.judge(groups, 0) for v in row]
            of_wrong = [called for called, ok in zip(said, right, strict=True) if not ok]
            found[level] |= {
                "called_right": fmean(said),
                "wrong_called_right": fmean(of_wrong) if of_wrong else None,
                "judge_agrees": fmean(a == b for a, b in zip(said, right, strict=True)),
            }
        _tell(f"answers of {split}, level {level}: {fmean(right):.1%} of {len(right)} right")
    return found


def made_pairs(split: str, count: int, seed: int) -> list[tuple[Item, str, bool]]:
    """(task, answer, whether it is right), half and half, all levels alike. A task gives two pairs: a right answer and
    a wrong one."""
    rng, pairs = random.Random(f"{seed}/pairs/{split}"), []
    levels = [level for level in LEVELS if families_of(split, level)]
    while len(pairs) < count:
        level = levels[len(pairs) // 2 % len(levels)]
        item = draw(rng, split, level)
        wrong = wrong_bodies(item, rng, 1, (draw(rng, split, level),))
        if wrong:
            pairs += [(item, rng.choice(item.right), True), (item, wrong[0], False)]
    return pairs[:count]


def evaluate_judge(evaluator: ModelEvaluator, pairs: list[tuple[Item, str, bool]]) -> dict:
    verdicts = []
    for at in range(0, len(pairs), AT_ONCE):
        if at % (8 * AT_ONCE) == 0:
            _tell(f"pairs: {at} of {len(pairs)} judged")
        verdicts += evaluator.judge_pairs([(item.task, code) for item, code, _ in pairs[at : at + AT_ONCE]])
    labels = [label for _, _, label in pairs]
    quality = judge_quality([v.probability for v in verdicts], labels, THRESHOLD)
    called = [v.outcome is Outcome.CORRECT for v in verdicts]
    by_level = {
        level: fmean(c == b for c, (i, _, b) in zip(called, pairs, strict=True) if i.task.level == level)
        for level in sorted({i.task.level for i, _, _ in pairs})
    }
    return quality | {"n_pairs": len(pairs), "accuracy_by_level": by_level}


def evaluate(folder: str, judge_folder: str, tasks: int, pairs: int, mode: str, seed: int) -> dict:
    mesh = parallel.make_mesh(1, -1, 1)
    speaker = load_model(folder, None, "float32", mesh).engine(mesh, "float32", AT_ONCE)
    judge = load_model(judge_folder, None, "float32", mesh).engine(mesh, "float32", AT_ONCE)
    evaluator = ModelEvaluator(judge, EvaluatorConfig(mode=mode, reason_tokens=96, threshold=THRESHOLD), seed)
    solver = ModelSolver(speaker, SamplingConfig(max_new_tokens=NEW_TOKENS), ROLLOUTS, seed, "tiny", lambda: "")
    return {
        "threshold": THRESHOLD,
        "proposer": evaluate_proposer(speaker, tasks, seed) if tasks else {},
        "solver": {s: evaluate_solver(solver, s, tasks, seed, evaluator) for s in SPLITS} if tasks else {},
        "judge": {s: evaluate_judge(evaluator, made_pairs(s, pairs, seed)) for s in SPLITS} if pairs else {},
    }


def write_cards(folder: pathlib.Path, found: dict) -> None:
    facts = json.loads((folder / "training.json").read_text("utf-8"))
    for role, where in (("speaker", folder), ("judge", folder / "judge")):
        card = write_card(role, arch_from_folder(where), facts, measured_lines(role, found))
        (where / "README.md").write_text(card, "utf-8")


def main() -> None:
    embedded = pathlib.Path(__file__).resolve().parents[2] / "cz_jax" / "assets" / "tiny"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=str(embedded))
    parser.add_argument("--judge", help="default: FOLDER/judge where it is, else the embedded one")
    parser.add_argument("--tasks", type=int, default=64, help="tasks and proposals a level and split; 0: none")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs a split; 0: none")
    parser.add_argument("--mode", choices=("direct", "reason"), default="direct")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--card", action="store_true", help="write what was measured into the model cards")
    a = parser.parse_args()
    beside = pathlib.Path(a.folder) / "judge"
    judge = a.judge or str(beside if beside.is_dir() else embedded / "judge")
    found = evaluate(a.folder, judge, a.tasks, a.pairs, a.mode, a.seed)
    if a.card:
        write_cards(pathlib.Path(a.folder), found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
