"""A scripted `ports.LanguageModel`: what it replies and believes is a function of the prompt's text."""

import re
from collections.abc import Callable, Sequence

from cz_jax.ports import Sample, SamplingMethod

EOS = 0
HEADERS = {"system": 1, "user": 2, "assistant": 3}
WORDS = re.compile(r" ?\w+|\n| ?[^\w\s]+|\s")
CHARACTERS = re.compile(r"(?s).")


class FakeModel:
    """`reply(prompt, seed)` is the sampled text, ended with EOS where it fits into the limit; `belief(prompt)` gives
    (P(true), P(false)). `pieces` is how text is cut into tokens. Calls are kept in `sampled` and `chosen`, as text."""

    name = "fake"

    def __init__(
        self,
        reply: Callable[[str, int], str] = lambda prompt, seed: "",
        belief: Callable[[str], tuple[float, float]] = lambda prompt: (0.9, 0.05),
        max_context: int = 1 << 20,
        pieces: re.Pattern = WORDS,
        logprob: float = -0.5,
    ):
        self.max_context = max_context
        self._reply, self._belief, self._pieces, self._logprob = reply, belief, pieces, logprob
        self._texts = ["<eos>", *(f"<{role}>" for role in HEADERS)]
        self._ids: dict[str, int] = {}
        self.sampled: list[dict] = []
        self.chosen: list[dict] = []

    def encode_chat(self, messages: Sequence[dict[str, str]], forced: str = "") -> list[int]:
        tokens = []
        for m in messages:
            tokens += [HEADERS[m["role"]], *self.encode(m["content"])]
        return [*tokens, HEADERS["assistant"], *self.encode(forced)]

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in self._pieces.findall(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._texts[t] for t in tokens)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        max_new_tokens: int,
        method: SamplingMethod,
    ) -> list[list[Sample]]:
        assert len(prompts) == len(seeds) > 0
        assert all(len(p) + max_new_tokens <= self.max_context for p in prompts)
        texts = [self.decode(p) for p in prompts]
        lengths = [len(p) for p in prompts]
        call = {"prompts": texts, "lengths": lengths, "seeds": seeds, "limit": max_new_tokens, "method": method}
        self.sampled.append(call)
        return [[self._complete(t, s, max_new_tokens) for s in row] for t, row in zip(texts, seeds, strict=True)]

    def choice_probabilities(
        self, prompts: Sequence[Sequence[Sequence[int]]], choices: Sequence[int]
    ) -> list[list[list[float]]]:
        assert all(row and all(len(p) <= self.max_context for p in row) for row in prompts)
        texts = [[self.decode(p) for p in row] for row in prompts]
        lengths = [[len(p) for p in row] for row in prompts]
        names = "|".join(self.decode([c]) for c in choices)
        self.chosen.append({"prompts": texts, "lengths": lengths, "choices": names})
        return [[list(self._belief(t)) for t in row] for row in texts]

    def _complete(self, prompt: str, seed: int, limit: int) -> Sample:
        tokens = [*self.encode(self._reply(prompt, seed)), EOS][:limit]
        ended = tokens[-1] == EOS
        text = self.decode(tokens[:-1] if ended else tokens)
        return Sample(tuple(tokens), (self._logprob,) * len(tokens), ended, text)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._texts)
            self._texts.append(piece)
        return self._ids[piece]
