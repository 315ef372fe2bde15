"""Training text of the three roles, through the very prompts that real models get.

A `Sheet` is one prompt and its continuations, so that a prompt is computed once: several proposals for a level, one
answer to a task, or several answers that the judge sees. Every draw follows from the caller's random generator.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from cz_jax.convert.tokenizer import ChatTokenizer
from cz_jax.roles.prompts import TOPICS, VERDICT_FALSE, VERDICT_TRUE, judge_messages, proposer_messages, solver_messages
from cz_jax.sampling.engine import common_prefix
from tiny.families import Item, draw
from tiny.mutate import NAME_SLIPS, NEAR_SLIPS, wrong_bodies

LEVELS = (1, 2, 3, 4, 5)
# How often a solver's training answer is a wrong one, by level; and how often a right or wrong one is badly written.
WRONG_SHARE = {1: 0.10, 2: 0.25, 3: 0.36, 4: 0.46, 5: 0.63}
UNTIDY_SHARE = 0.35
PROPOSALS, ANSWERS = 4, 2  # continuations of a proposer's and of a judge's sheet
CONTRASTS = 3  # answers that miss by a token, beside the right one of a "contrast" sheet
SAID = 4  # answers of the speaker's own on a "spoken" sheet
POINTS = (2, 4, 1)  # right answers, ones that miss by a token, and other wrong ones of a "points" sheet
NAMES = "_names"
DECISIVE = 8.0  # weight of the mark of a token with which a wrong answer leaves the right ones
NONE, WRONG, RIGHT = -1, 0, 1


@dataclass
class Continuation:
    """Token ids; the weight of each token's own loss; and where the judge reads on: whether all of the answer so far is
    how a right one begins (RIGHT, WRONG, or NONE where that is not asked), and how much that weighs."""

    tokens: list[int]
    weights: list[float]
    marks: list[int] = field(default_factory=list)
    mark_weights: list[float] = field(default_factory=list)


@dataclass
class Sheet:
    kind: str  # a key of sheets.SHAPES
    prompt: list[int]
    rows: list[Continuation]


def proposal(item: Item) -> str:
    """The item as a proposer writes it."""
    value = json.dumps({"question": item.task.question, "tests": list(item.task.tests)})
    return f"```json\n{value}\n```"


def answer(code: str) -> str:
    return f"```python\n{code}\n```"


def solver_text(item: Item, rng: random.Random, noise: float) -> tuple[str, bool]:
    """(an answer, whether it goes on until it is cut). `noise` 0: right and tidy; 1: as in WRONG_SHARE and
    UNTIDY_SHARE."""
    code = rng.choice(item.right)
    if rng.random() < noise * WRONG_SHARE[item.task.level]:
        code = (wrong_bodies(item, rng, 1) or [code])[0]
    if rng.random() >= noise * UNTIDY_SHARE:
        return answer(code), False
    slip = rng.randrange(4)
    if slip == 0:
        return code, False  # no fence
    if slip == 1:
        return f"```\n{code}\n```", False
    if slip == 2:
        return f"```python\n{code}\n", False  # not closed
    return answer(code) + "\n" + answer(code), True


def propose_sheet(tokenizer: ChatTokenizer, rng: random.Random, level: int) -> Sheet:
    number = rng.randrange(len(TOPICS))
    avoid = [draw(rng, "train", level).task.question for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    prompt = tokenizer.encode_chat(proposer_messages(level, avoid, number))
    items = [draw(rng, "train", level, number) for _ in range(PROPOSALS)]
    rows = [_spoken(tokenizer, proposal(item), False) for item in items]
    return Sheet("propose", prompt, rows)


def solve_sheet(tokenizer: ChatTokenizer, rng: random.Random, level: int, noise: float) -> Sheet:
    item = draw(rng, "train", level)
    prompt = tokenizer.encode_chat(solver_messages(item.task))
    return Sheet("solve", prompt, [_spoken(tokenizer, *solver_text(item, rng, noise))])


def _spoken(tokenizer: ChatTokenizer, text: str, goes_on: bool) -> Continuation:
    tokens = tokenizer.encode(text) + ([] if goes_on else [tokenizer.eos_ids[0]])
    return Continuation(tokens, [1.0] * len(tokens), [NONE] * len(tokens), [0.0] * len(tokens))


def labelled_answers(item: Item, rng: random.Random, count: int, others: tuple[Item, ...]) -> list[tuple[str, bool]]:
    """`count` answers, right and wrong ones in turn, as far as there are different right ones."""
    right = rng.sample(item.right, min(count // 2, len(item.right)))
    wrong = wrong_bodies(item, rng, count - len(right), others)
    return [(code, True) for code in right] + [(code, False) for code in wrong]


def judge_sheet(
    tokenizer: ChatTokenizer, rng: random.Random, level: int, kind: str = "judge", said: Sequence[str] = ()
) -> Sheet:
    """Answers to one task under one nonce, with their verdicts. Right and wrong ones weigh the same, however many there
    are of each. Kind "prefix": the prompt ends where the code does, and right code is to be predicted instead of a
    verdict; "contrast": a right answer and several that miss it by a token; "points": as "prefix" with such answers,
    and the tokens where right and wrong part are what counts. With NAMES behind the latter two: half of the slips are
    names that the function does not have. "spoken": a right answer and some of those that were `said` to the task,
    which are right where they are one of the family's."""
    item, slips = draw(rng, "train", level), NAME_SLIPS if kind.endswith(NAMES) else NEAR_SLIPS
    if kind.startswith("contrast"):
        labelled = [(rng.choice(item.right), True)]
        labelled += [(code, False) for code in wrong_bodies(item, rng, CONTRASTS, slips=slips)]
    elif kind == "spoken":
        codes = dict.fromkeys((rng.choice(item.right), *rng.sample(said, min(SAID, len(said)))))
        labelled = [(code, code in item.right) for code in codes]
    elif kind.startswith("points"):
        labelled = [(code, True) for code in rng.sample(item.right, min(POINTS[0], len(item.right)))]
        wrong = wrong_bodies(item, rng, POINTS[1], slips=slips)
        wrong += wrong_bodies(item, rng, POINTS[2], (draw(rng, "train", level),))
        labelled += [(code, False) for code in dict.fromkeys(wrong)]
    else:
        labelled = labelled_answers(item, rng, ANSWERS, (draw(rng, "train", level),))
    cut = kind == "prefix" or kind.startswith("points")
    nonce = f"{rng.getrandbits(32):08x}"
    share = {label: 0.5 * len(labelled) / max(1, sum(b == label for _, b in labelled)) for label in (True, False)}

    def encode(code: str, forced: str) -> list[int]:
        return tokenizer.encode_chat(judge_messages(item.task, code, nonce), forced=forced)

    asked = [encode(code, VERDICT_TRUE if label else VERDICT_FALSE) for code, label in labelled]
    ways = [encode(code, VERDICT_TRUE) for code in item.right]
    closing, tail = _closing(tokenizer), common_suffix(encode("x", VERDICT_TRUE), encode("()", VERDICT_TRUE))
    start = common_prefix(asked + ways)
    ways = [way[start : len(way) - tail] for way in ways]
    rows = []
    for tokens, (_, label) in zip(asked, labelled, strict=True):
        code, rest = tokens[start : len(tokens) - tail], tokens[len(tokens) - tail : len(tokens) - closing]
        if cut:
            weights, marks = [share[True] if label else 0.0] * len(code), _marks(code, ways)
            rows.append(Continuation(code, weights, marks, [1.0] * len(code)))
            continue
        marks = _marks(code, ways) + [NONE] * len(rest)
        weights = [0.0] * (len(code) + len(rest) - 1) + [share[label]]
        rows.append(Continuation(code + rest, weights, marks, [1.0] * len(code) + [0.0] * len(rest)))
    if kind.startswith("points") or kind == "spoken":
        _stress(rows)
    return Sheet(kind, asked[0][:start], rows)


def _marks(code: list[int], ways: list[list[int]]) -> list[int]:
    """For each token of the code: is all until here the beginning of a right answer?"""
    marks = []
    for at, token in enumerate(code):
        ways = [way for way in ways if at < len(way) and way[at] == token]
        marks.append(RIGHT if ways else WRONG)
    return marks


def _stress(rows: list[Continuation]) -> None:
    """Gives weight to the marks of the tokens with which a wrong answer leaves the right ones, and of the tokens that a
    right answer has in their places."""
    for wrong in (row for row in rows if WRONG in row.marks):
        at = wrong.marks.index(WRONG)
        wrong.mark_weights[at] = DECISIVE
        for right in (row for row in rows if WRONG not in row.marks):
            if right.tokens[:at] == wrong.tokens[:at] and at < len(right.tokens):
                right.mark_weights[at] = DECISIVE


def common_suffix(a, b) -> int:
    """How many items the two end with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def _closing(tokenizer: ChatTokenizer) -> int:
    """How many tokens of the forced verdict stand behind its true or false."""
    true, false = (tokenizer.encode(v) for v in (VERDICT_TRUE, VERDICT_FALSE))
    return common_suffix(true, false)


def sample_texts(rng: random.Random, count: int):
    """What the tokenizer learns its merges from: prompts and answers of the three roles."""
    for number in range(count):
        level = LEVELS[number % len(LEVELS)]
        item = draw(rng, "train", level)
        codes = [code for code, _ in labelled_answers(item, rng, 2, ())]
        nonce = f"{rng.getrandbits(32):08x}"
        chats = [
            proposer_messages(level, [item.task.question], rng.randrange(len(TOPICS))),
            solver_messages(item.task),
            judge_messages(item.task, codes[-1], nonce),
            judge_messages(item.task, codes[0], nonce, "reason"),
        ]
        for chat in chats:
            for message in chat:
                yield f"{message['role']}\n"
                yield message["content"]
        yield "assistant\n"
        yield proposal(item)
        yield from map(answer, codes)
        yield f"It should be:\n{codes[0]}\nThat is the same.\nThat is different.\n{VERDICT_TRUE}\n{VERDICT_FALSE}"
