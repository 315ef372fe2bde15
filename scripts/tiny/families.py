"""Task families: each makes a question, tests with literal values, right bodies, and inputs that tell a wrong one.

    python scripts/tiny/families.py OUT.jsonl [--split train|new_parts|new_families] [--count N] [--seed S]
    python scripts/tiny/families.py --embedded

The first writes tasks that `file:OUT.jsonl` reads, the second cz_jax/assets/tasks/tiny.jsonl. Every draw follows from
its seed. Two kinds of tasks are held out: whole families (`HELD_OUT_FAMILIES`), and combinations of parts that a
trained family is never seen with (`is_held_out`).
"""

import argparse
import functools
import json
import pathlib
import random
import re
import sys
import zlib
from dataclasses import dataclass

if __package__ in (None, ""):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cz_jax.nouns import Task
from cz_jax.text.answers import normalise
from tiny.interpreter import Program, Rejected
from tiny.parts import (
    ARGUMENTS,
    KINDS,
    LETTERS,
    NOUNS,
    SEPARATORS,
    SLOTS,
    VERBS,
    WORDS,
    Code,
    draw_value,
    fill_part,
)  # fmt: skip
from tiny.table import HELD_OUT_FAMILIES, TABLE, TOPICS_OF

FRAMES = (
    "Write a function {f}({args}) that returns {what}.",
    "{f}({args}) returns {what}.",
    "Define {f}({args}) so that it returns {what}.",
    "Write {f}({args}), which gives back {what}.",
)
LOOP_VARIABLES = ("x", "i", "item")
SPLITS = ("train", "new_parts", "new_families")
INPUTS = 14  # inputs on which a body is compared with a right one
EMBEDDED = pathlib.Path(__file__).resolve().parents[2] / "cz_jax" / "assets" / "tasks" / "tiny.jsonl"
EMBEDDED_TRAIN, EMBEDDED_HELD_OUT = 600, 120  # tasks that come with cz_jax
HELD_OUT_SHARE = 6  # one of so many combinations of parts is held out


@dataclass(frozen=True)
class Family:
    name: str
    level: int
    takes: str
    phrases: tuple[str, ...]
    bodies: tuple[str, ...]

    @functools.cached_property
    def slots(self) -> tuple[str, ...]:
        """The parts that the family is filled with: keys of SLOTS, in the order of the phrase."""
        found = re.findall(r"\{([a-z])[}:]", self.phrases[0])
        return tuple(dict.fromkeys(s for s in found if s in SLOTS))

    @property
    def topics(self) -> tuple[int, ...]:
        return TOPICS_OF[self.takes[0]]


FAMILIES = {row[0]: Family(row[0], row[1], row[2], tuple(row[3]), tuple(row[4])) for row in TABLE}


@dataclass(frozen=True)
class Item:
    """One task of a family. `right`: its right answers as whole functions, in the spelling of `normalise`. `parts`: the
    names of the family's parts, in the order of its slots. `inputs`: arguments on which wrong answers show."""

    family: str
    parts: tuple[str, ...]
    task: Task
    right: tuple[str, ...]
    inputs: tuple[tuple, ...]
    parameters: tuple[str, ...]

    @functools.cached_property
    def expected(self) -> tuple:
        return outcomes(self.right[0], self.task.entry_point, self.inputs)

    def solved_by(self, code: str) -> bool:
        """Whether `code`, walked by the interpreter, gives what a right body gives, for every input."""
        try:
            program = Program(code)
            return all(
                _same(program.call(self.task.entry_point, *given), wanted)
                for given, wanted in zip(self.inputs, self.expected, strict=True)
            )
        except Rejected:
            return False


def outcomes(code: str, entry_point: str, inputs) -> tuple:
    program = Program(code)
    return tuple(program.call(entry_point, *given) for given in inputs)


def is_held_out(family: str, parts: tuple[str, ...]) -> bool:
    """Whether this combination of a family and parts is never trained on."""
    return bool(parts) and zlib.crc32("/".join((family, *parts)).encode()) % HELD_OUT_SHARE == 0


def split_of(item: Item) -> str:
    if item.family in HELD_OUT_FAMILIES:
        return "new_families"
    return "new_parts" if is_held_out(item.family, item.parts) else "train"


def families_of(split: str, level: int | None = None) -> list[Family]:
    """The families of which `split` has tasks, at `level` or at all of them."""
    chosen = [f for f in FAMILIES.values() if (f.name in HELD_OUT_FAMILIES) == (split == "new_families")]
    if split == "new_parts":
        chosen = [f for f in chosen if f.slots]
    return [f for f in chosen if level in (None, f.level)]


def draw(rng: random.Random, split: str, level: int, topic: int | None = None) -> Item:
    """A task of `split` at `level`; about `topic` where a family of the level is."""
    chosen = families_of(split, level)
    fitting = [f for f in chosen if topic in f.topics]
    while True:
        # Families with parts hold many tasks, those without a handful: weigh them so.
        pool = fitting or chosen
        family = rng.choices(pool, [1 + len(f.slots) for f in pool])[0]
        item = draw_item(family, rng)
        if item is not None and split_of(item) == split:
            return item


def draw_item(family: Family, rng: random.Random) -> Item | None:
    """A task of the family with random parts, names, constants and wording; None where a draw makes no sense."""
    fields, codes, parts = _fields(family, rng)
    if fields is None:
        return None
    fields["args"] = ", ".join(fields["parameters"])
    what = rng.choice(family.phrases).format(**fields)
    question = rng.choice(FRAMES).format(what=what, **fields)
    right = _right(family, fields, codes)
    inputs = tuple(tuple(draw_value(kind, rng) for kind in family.takes) for _ in range(INPUTS))
    try:
        expected = outcomes(right[0], fields["f"], inputs)
    except Rejected:
        return None
    tests = _tests(rng, fields["f"], inputs, expected)
    if tests is None:
        return None
    task = Task("file", question, tests, fields["f"], family.level)
    return Item(family.name, parts, task, right, inputs, tuple(fields["parameters"]))


def _fields(family: Family, rng: random.Random):
    """(what the templates name, the code of each part in its spellings, the parts' names)."""
    f = rng.choice(VERBS) if rng.random() < 0.25 else f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    names = []
    for kind in family.takes:
        names.append(rng.choice([n for n in ARGUMENTS[KINDS[kind]] if n not in names]))
    low, high = (2, 3) if family.takes[0] in "lwg" and "{h}" in family.phrases[0] else (2, 9)
    taken: set[int] = set()
    j = rng.randint(3, 9)
    h = rng.choice([x for x in range(low, high + 1) if x != j])
    if family.name == "grade":
        j, h = max(j, h), min(j, h)
    taken |= {j, h} if "{j}" in "".join(family.phrases) else set()
    q, z = rng.sample(LETTERS, 2)
    fields = {
        "f": f, "parameters": names, "a": names[0], "b": names[-1], "j": j, "h": h, "q": q, "z": z,
        "s": rng.choice(SEPARATORS), "k1": rng.choice(WORDS),
    }  # fmt: skip
    codes: dict[str, tuple[Code, ...]] = {}
    parts = []
    for slot in family.slots:
        part = rng.choice([p for p in SLOTS[slot] if p.name not in parts])
        fields[slot], codes[slot.upper()] = fill_part(part, rng, taken)
        parts.append(part.name)
    if {"even", "odd"} <= set(parts):
        return None, None, None
    return fields, codes, tuple(parts)


def _right(family: Family, fields: dict, codes: dict) -> tuple[str, ...]:
    """Every spelling of every body: each loop variable, and each spelling of the parts."""
    spellings = range(max((len(c) for c in codes.values()), default=1))
    chosen = [{name: c[min(n, len(c) - 1)] for name, c in codes.items()} for n in spellings]
    variables = [v for v in LOOP_VARIABLES if v not in fields["parameters"]]
    bodies = [b.format(v=v, **fields, **c) for b in family.bodies for c in chosen for v in variables]
    return tuple(_function(body, fields) for body in dict.fromkeys(bodies))


def _function(body: str, fields: dict) -> str:
    """The whole function in its one spelling."""
    if not re.search(r"^(return|if|for|while|\w+ = )", body):
        body = "return " + body
    lines = "\n".join("    " + line for line in body.split("\n"))
    code = normalise(f"def {fields['f']}({fields['args']}):\n{lines}\n")
    if code is None:
        raise ValueError(f"a body does not parse: {body}")
    return code


def _tests(rng: random.Random, name: str, inputs, expected) -> tuple[str, ...] | None:
    """1 to 3 asserts, with different results where there are such."""
    order = list(range(len(inputs)))
    rng.shuffle(order)
    wanted, chosen = rng.choices((1, 2, 3), (3, 5, 1))[0], []
    for fresh in (True, False):
        for i in order:
            seen = [expected[c] for c in chosen]
            if len(chosen) < wanted and i not in chosen and not (fresh and expected[i] in seen):
                chosen.append(i)
    if any(len(repr(expected[i])) > 60 for i in chosen):
        return None
    calls = (", ".join(map(repr, inputs[i])) for i in chosen)
    return tuple(f"assert {name}({call}) == {expected[i]!r}" for call, i in zip(calls, chosen, strict=True))


def _same(a, b) -> bool:
    """Equal, and of like type: True is no 1."""
    return type(a) is type(b) and a == b and (not isinstance(a, dict) or list(a) == list(b) or a == b)


def some_tasks(split: str, count: int, seed: int) -> list[dict]:
    """`count` different tasks of `split`, the levels in turn, as rows of a task file."""
    rng, found = random.Random(f"{seed}/{split}"), {}
    while len(found) < count:
        task = draw(rng, split, 1 + len(found) % 5).task
        row = {"level": task.level, "question": task.question, "entry_point": task.entry_point, "tests": task.tests}
        found.setdefault(task.id, row)
    return list(found.values())


def embedded_rows() -> list[dict]:
    """The tasks that come with cz_jax: for training, and held out because they combine parts as training never does."""
    return [
        {"split": name} | row
        for name, split, count in (("train", "train", EMBEDDED_TRAIN), ("held_out", "new_parts", EMBEDDED_HELD_OUT))
        for row in some_tasks(split, count, 0)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedded", action="store_true", help="write the tasks that come with cz_jax")
    a = parser.parse_args()
    if a.embedded == (a.out != EMBEDDED):
        parser.error("either OUT.jsonl or --embedded")
    rows = embedded_rows() if a.embedded else some_tasks(a.split, a.count, a.seed)
    a.out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
