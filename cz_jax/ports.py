"""The interfaces between the rooms. `loop.py` knows these and the nouns, and nothing else.

Everything here takes and returns host values. Arrays live behind `LanguageModel` and `Learner`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cz_jax.nouns import Group, Level, Round, Task, Verdict


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion: `tokens` (EOS included) with their log-probabilities (nats, of the softmax at the
    sampling temperature before top-p and top-k), whether it ended with a stop id, and its text without that stop
    token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    text: str


@dataclass(frozen=True, slots=True)
class SamplingMethod:
    """How a token is drawn. temperature 0: greedy. top_p 1 and top_k 0: the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class LanguageModel(Protocol):
    """A model with its tokenizer, ready for inference on its mesh."""

    name: str
    max_context: int

    def encode_chat(self, messages: Sequence[dict[str, str]], forced: str = "") -> list[int]:
        """Token ids of the chat (roles "system", "user", "assistant"), the assistant's header and then `forced`. Chat
        tokens that stand in a message's content are plain text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; chat tokens in it are plain text."""

    def decode(self, tokens: Sequence[int]) -> str: ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        max_new_tokens: int,
        method: SamplingMethod,
    ) -> list[list[Sample]]:
        """len(seeds[i]) completions of prompts[i], one for each 64-bit seed; equal seeds give equal tokens whatever
        else is in the call."""

    def choice_probabilities(
        self, prompts: Sequence[Sequence[Sequence[int]]], choices: Sequence[int]
    ) -> list[list[list[float]]]:
        """P(next token = c) for each c of `choices`, after each of prompts[i]; prompts of one i that begin alike are
        computed from their common prefix once. NaN where the model's logits are not finite."""


@dataclass(frozen=True, slots=True)
class Proposals:
    """What a proposer came up with: the valid tasks, how many samples it took, and why the others were refused."""

    tasks: tuple[Task, ...]
    tries: int
    refused: dict[str, int]


class Proposer(Protocol):
    def propose(self, level: Level, count: int, round_number: int) -> Proposals: ...
    def state(self) -> dict: ...
    def restore(self, state: dict) -> None: ...


class TaskStream(Protocol):
    """Training tasks without end, in an order that `state` continues exactly."""

    def take(self, count: int) -> tuple[Task, ...]: ...
    def state(self) -> dict: ...
    def restore(self, state: dict) -> None: ...


class Solver(Protocol):
    def roll_out(self, tasks: Sequence[Task], round_number: int) -> tuple[Group, ...]: ...


class Evaluator(Protocol):
    def judge(self, groups: Sequence[Group], round_number: int) -> tuple[tuple[Verdict, ...], ...]: ...


class Exchange(Protocol):
    """Where groups come from and go to. A node that is alone has one that keeps nothing."""

    def publish(self, groups: Sequence[Group]) -> None: ...
    def fetch(self, count: int, round_number: int) -> tuple[Group, ...]: ...
    def state(self) -> dict: ...
    def restore(self, state: dict) -> None: ...


class Learner(Protocol):
    """Owner of the solver's trainable parameters."""

    def update(
        self, groups: Sequence[Group], rewards: Sequence[Sequence[float]], own: Sequence[bool]
    ) -> dict[str, float]:
        """One GRPO update (or `grpo.updates` of them) on groups whose totals are `rewards`; metrics of it. `own[i]`:
        the group's tokens and log-probabilities are ours; other groups are re-encoded."""

    def policy_digest(self) -> str:
        """Hex digest of the parameters, independent of how they are laid out over devices."""


class Ledger(Protocol):
    def write(self, round_: Round) -> None: ...
