"""The seven nouns of a CodeZero round: frozen values, standard library only, JSON in and out.

    Level --propose--> Task --roll out--> Group --share--> Groups --judge--> Verdicts
      ^                                                                         |
      +------- adapt <------- Rewards <------------------ reward <--------------+
                                 +--pack--> Batch --grpo step--> TrainState     all --> Round --> ledger

A `Group` is the one unit that is shared, signed, judged, trained on and audited. Text is the truth: a receiver
re-encodes a peer's text with its own tokenizer and computes its own log-probabilities. A `Round` is a value, so that a
later audit can be a function of it.
"""

import dataclasses
import enum
import hashlib
import json
from dataclasses import dataclass

MIN_LEVEL, MAX_LEVEL = 1, 5
LEVEL_NAMES = {1: "beginner", 2: "easy", 3: "intermediate", 4: "advanced", 5: "expert"}


class Level(int):
    """Difficulty 1 (beginner) to 5 (expert). Raises ValueError outside of that."""

    def __new__(cls, value):
        if isinstance(value, bool) or int(value) != value or not MIN_LEVEL <= value <= MAX_LEVEL:
            raise ValueError(f"a level is a whole number from {MIN_LEVEL} to {MAX_LEVEL}, not {value!r}")
        return super().__new__(cls, value)

    @property
    def label(self) -> str:
        return LEVEL_NAMES[int(self)]


def canonical_json(value) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII, no NaN. ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value) -> str:
    """Lower-case hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


@dataclass(frozen=True, slots=True)
class Task:
    """One coding task. `tests` are assert lines for a function task; for a program task (`entry_point` None) each test
    is the canonical JSON of {"input": stdin text, "output": expected stdout text}."""

    source: str  # "proposer", "mbpp", "code_contests", "builtin" or "file"
    question: str
    tests: tuple[str, ...]
    entry_point: str | None
    level: int

    def __post_init__(self):
        object.__setattr__(self, "tests", tuple(self.tests))
        object.__setattr__(self, "level", int(Level(self.level)))

    @property
    def id(self) -> str:
        """SHA-256 of what is asked (question, tests, entry point); who asked it and how hard it is do not count."""
        return digest({"question": self.question, "tests": list(self.tests), "entry_point": self.entry_point})

    @property
    def is_program(self) -> bool:
        return self.entry_point is None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer. `ended`: the model sampled its EOS token (told by its id, never by length). `seed`: the 64-bit seed
    of its key. `tokens` (EOS included) and `logprobs` (nats, one a token) only where they are ours."""

    text: str
    ended: bool
    seed: int = 0
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("tokens", "logprobs"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if (self.tokens is None) != (self.logprobs is None) or len(self.tokens or ()) != len(self.logprobs or ()):
            raise ValueError("a rollout holds tokens and log-probabilities together, one of each a position")


@dataclass(frozen=True, slots=True)
class Group:
    """G answers of one policy version of one peer to one task."""

    task: Task
    peer: str
    policy: str  # digest of the parameters that sampled it
    round: int
    rollouts: tuple[Rollout, ...]

    def __post_init__(self):
        object.__setattr__(self, "rollouts", tuple(self.rollouts))

    @property
    def id(self) -> str:
        """SHA-256 of the task, the peer, the policy and the answers' text: what a receiver can check."""
        answers = [[r.text, r.ended] for r in self.rollouts]
        return digest([self.task.id, self.peer, self.policy, self.round, answers])


class Outcome(enum.StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    UNREADABLE = "unreadable"  # the evaluator worked and gave no verdict (it abstained, or its text was no verdict)
    FAILED = "failed"  # the evaluator broke; says nothing about the answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evaluator says of one answer. `probability` of being correct, where there is one."""

    outcome: Outcome
    probability: float | None = None
    detail: str = ""

    def __post_init__(self):
        object.__setattr__(self, "outcome", Outcome(self.outcome))
        decided = self.outcome in (Outcome.CORRECT, Outcome.WRONG)
        if decided and not (self.probability is not None and 0.0 <= self.probability <= 1.0):
            raise ValueError(f"a {self.outcome} verdict needs a probability within [0, 1], not {self.probability!r}")


@dataclass(frozen=True, slots=True)
class Reward:
    """A total and its named parts, e.g. {"structure": 0.2, "format": 0.1, "correctness": 1.0}; total = their sum."""

    total: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Round:
    """All of one turn of one node. `verdicts` and `rewards` run along `groups` (own first, then `external`), one per
    rollout; `rewards[i]` is None where a FAILED verdict left group i out. `trained` lists the ids of the groups that
    entered the update. `metrics` is the line that metrics.jsonl holds."""

    number: int
    level_before: int
    level_after: int
    own: tuple[Group, ...]
    external: tuple[Group, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    rewards: tuple[tuple[Reward, ...] | None, ...]
    trained: tuple[str, ...]
    policy_before: str
    policy_after: str
    config_digest: str
    metrics: dict[str, object]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.own + self.external


def to_json(value):
    """A noun (or a tuple, list, dict of nouns) as plain JSON types. Inverse: `from_json(cls, ...)`."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


_NESTED = {
    (Group, "task"): lambda v: from_json(Task, v),
    (Group, "rollouts"): lambda v: tuple(from_json(Rollout, r) for r in v),
    (Round, "own"): lambda v: tuple(from_json(Group, g) for g in v),
    (Round, "external"): lambda v: tuple(from_json(Group, g) for g in v),
    (Round, "verdicts"): lambda v: tuple(tuple(from_json(Verdict, x) for x in row) for row in v),
    (Round, "rewards"): lambda v: tuple(None if row is None else tuple(from_json(Reward, x) for x in row) for row in v),
    (Round, "trained"): tuple,
}


def from_json(cls, value):
    """The noun `cls` from what `to_json` made. ValueError for a missing or an unknown field."""
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) - names:
        unknown = sorted(set(value) - names) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"not a {cls.__name__}: unexpected {unknown}")
    try:
        return cls(**{k: _NESTED.get((cls, k), lambda v: v)(v) for k, v in value.items()})
    except (TypeError, AttributeError, OverflowError) as e:
        raise ValueError(f"not a {cls.__name__}: {e}") from None
