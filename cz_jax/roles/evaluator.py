"""The evaluator: a frozen model that predicts whether code is correct. Nothing is ever executed.

The code reaches the model parsed and rewritten (no comments, no docstrings), between tags with a nonce that neither the
task nor the code holds. What this does not protect from: names and string literals that argue for themselves.
"""

import math
from collections.abc import Sequence

from cz_jax.config import EvaluatorConfig
from cz_jax.errors import ModelFolderError
from cz_jax.nouns import Group, Outcome, Task, Verdict, digest
from cz_jax.ports import LanguageModel, Sample, SamplingMethod
from cz_jax.rng import seed_for
from cz_jax.roles.prompts import VERDICT_FALSE, VERDICT_TRUE, judge_messages
from cz_jax.text.answers import extract_code, normalise
from cz_jax.text.names import fault
from cz_jax.text.verdicts import parse_verdict

GREEDY = SamplingMethod(temperature=0.0)

NO_CODE = Verdict(Outcome.WRONG, 0.0, "no code")
DOES_NOT_PARSE = Verdict(Outcome.WRONG, 0.0, "does not parse")
TOO_LONG = Verdict(Outcome.UNREADABLE, None, "too long")
NO_VERDICT = Verdict(Outcome.UNREADABLE, None, "no verdict")
NOT_FINITE = Verdict(Outcome.FAILED, None, "the evaluator's probabilities are not finite")
NOT_SPLIT = Verdict(Outcome.FAILED, None, "the tokenizer splits the verdict of this prompt in another way")

Key = tuple[str, str]  # task id, normalised code: what is judged once
Prompts = dict[Key, list[int]]
Verdicts = dict[Key, Verdict]


class ModelEvaluator:
    """Implements `ports.Evaluator` with a language model, in one of three modes.

    "direct" reads P(true) and P(false) where the verdict stands in a reply that is forced to begin with it; "reason"
    does so after greedily sampled reasoning; "generate" parses a greedily sampled reply. ModelFolderError where the
    tokenizer cannot tell the two verdicts apart.
    """

    def __init__(self, model: LanguageModel, config: EvaluatorConfig, run_seed: int):
        self._model, self._config, self._run_seed = model, config, run_seed
        probe = judge_messages(Task("builtin", "", (), "f", 1), "", "", config.mode)
        in_chat = [model.encode_chat(probe, forced=v) for v in (VERDICT_TRUE, VERDICT_FALSE)]
        self._direct_choices, length = self._tell_apart(*in_chat)
        self._direct_tail = in_chat[0][length:]
        after_text = [model.encode("\n" + v) for v in (VERDICT_TRUE, VERDICT_FALSE)]
        self._reason_choices, length = self._tell_apart(*after_text)
        self._reason_suffix = after_text[0][:length]

    def judge(self, groups: Sequence[Group], round_number: int) -> tuple[tuple[Verdict, ...], ...]:
        """A verdict for each rollout of each group, whatever its source. An answer without exactly one python fence, or
        with code that does not parse or has a `text.names.fault`, is WRONG without asking the model."""
        answers = [(g.task, readable(g.task, r.text)) for g in groups for r in g.rollouts]
        verdicts = iter(self._verdicts(answers, round_number))
        return tuple(tuple(next(verdicts) for _ in g.rollouts) for g in groups)

    def judge_pairs(self, items: Sequence[tuple[Task, str]], round_number: int = 0) -> list[Verdict]:
        """A verdict for each (task, bare source code without a fence), by the same means as `judge`."""
        return self._verdicts([(task, _normalised(task, code)) for task, code in items], round_number)

    def _verdicts(self, answers: Sequence[tuple[Task, str | Verdict]], round_number: int) -> list[Verdict]:
        ids = [task.id for task, _ in answers]
        tasks: dict[str, tuple[Task, dict[str, None]]] = {}
        for task_id, (task, code) in zip(ids, answers, strict=True):
            if isinstance(code, str):
                tasks.setdefault(task_id, (task, {}))[1][code] = None
        chats = {}
        for task_id, (task, codes) in tasks.items():
            nonce = self._nonce(task, codes, round_number)
            for code in codes:
                chats[task_id, code] = judge_messages(task, code, nonce, self._config.mode)
        asked = {"direct": self._direct, "reason": self._reason, "generate": self._generate}[self._config.mode](chats)
        return [
            code if isinstance(code, Verdict) else asked[task_id, code]
            for task_id, (_, code) in zip(ids, answers, strict=True)
        ]

    def _nonce(self, task: Task, codes: Sequence[str], round_number: int) -> str:
        """8 hex digits for all answers to the task. Where a text holds them, the next ones depend on the texts, so no
        text can be written to hold those too."""
        texts = (task.question, *task.tests, *codes)
        path = ("nonce", round_number, task.id)
        while True:
            nonce = f"{seed_for(self._run_seed, *path) & 0xFFFFFFFF:08x}"
            if not any(nonce in text for text in texts):
                return nonce
            path = (*path, nonce, digest(texts))

    def _direct(self, chats: dict[Key, list[dict[str, str]]]) -> Verdicts:
        prompts, verdicts = {}, {}
        cut = len(self._direct_tail)
        for key, messages in chats.items():
            tokens = self._model.encode_chat(messages, forced=VERDICT_TRUE)
            if tokens[-cut:] == self._direct_tail:
                prompts[key] = tokens[:-cut]
            else:
                verdicts[key] = NOT_SPLIT
        prompts, too_long = self._fitting(prompts, room=0)
        return verdicts | too_long | self._read(prompts, self._direct_choices)

    def _reason(self, chats: dict[Key, list[dict[str, str]]]) -> Verdicts:
        limit = self._config.reason_tokens
        prompts = {key: self._model.encode_chat(messages) for key, messages in chats.items()}
        prompts, verdicts = self._fitting(prompts, room=limit + len(self._reason_suffix))
        reasoned = {}
        for key, sample in self._sample(prompts, limit).items():
            if not _finite(sample):
                verdicts[key] = NOT_FINITE
                continue
            thoughts = sample.tokens[:-1] if sample.ended else sample.tokens
            reasoned[key] = [*prompts[key], *thoughts, *self._reason_suffix]
        return verdicts | self._read(reasoned, self._reason_choices)

    def _generate(self, chats: dict[Key, list[dict[str, str]]]) -> Verdicts:
        limit = self._config.generate_tokens
        prompts = {key: self._model.encode_chat(messages) for key, messages in chats.items()}
        prompts, verdicts = self._fitting(prompts, room=limit)
        for key, sample in self._sample(prompts, limit).items():
            said = parse_verdict(sample.text)
            if not _finite(sample):
                verdicts[key] = NOT_FINITE
            elif said is None:
                verdicts[key] = NO_VERDICT
            else:
                verdicts[key] = Verdict(Outcome.CORRECT, 1.0) if said else Verdict(Outcome.WRONG, 0.0)
        return verdicts

    def _sample(self, prompts: Prompts, max_new_tokens: int) -> dict[Key, Sample]:
        if not prompts:
            return {}
        seeds = [[0]] * len(prompts)  # greedy: no random number is drawn
        rows = self._model.sample(list(prompts.values()), seeds, max_new_tokens, GREEDY)
        return {key: sample for key, (sample,) in zip(prompts, rows, strict=True)}

    def _read(self, prompts: Prompts, choices: tuple[int, int]) -> Verdicts:
        """The verdicts of prompts that end where " true" or " false" would follow; one call, a row a task."""
        rows: dict[str, list[Key]] = {}
        for key in prompts:
            rows.setdefault(key[0], []).append(key)
        if not rows:
            return {}
        answers = self._model.choice_probabilities([[prompts[k] for k in row] for row in rows.values()], choices)
        return {
            key: self._decide(*pair)
            for row, pairs in zip(rows.values(), answers, strict=True)
            for key, pair in zip(row, pairs, strict=True)
        }

    def _decide(self, p_true: float, p_false: float) -> Verdict:
        said = p_true + p_false
        if not math.isfinite(said):
            return NOT_FINITE
        if said < self._config.abstain_below or said <= 0.0:
            return Verdict(Outcome.UNREADABLE, None, f"P(true) + P(false) = {said:.3g}")
        p = p_true / said
        return Verdict(Outcome.CORRECT if p >= self._config.threshold else Outcome.WRONG, p)

    def _fitting(self, prompts: Prompts, room: int) -> tuple[Prompts, Verdicts]:
        """The prompts that leave `room` tokens in the context, and a verdict for the others."""
        long = {k: TOO_LONG for k, tokens in prompts.items() if len(tokens) + room > self._model.max_context}
        return {k: tokens for k, tokens in prompts.items() if k not in long}, long

    def _tell_apart(self, true: list[int], false: list[int]) -> tuple[tuple[int, int], int]:
        """The first tokens in which the two differ, and their position."""
        for position, pair in enumerate(zip(true, false, strict=False)):
            if pair[0] != pair[1]:
                return pair, position
        raise ModelFolderError(
            f"the tokenizer of {self._model.name} encodes {VERDICT_TRUE} and {VERDICT_FALSE} alike",
            "a tokenizer of another model, or one that cannot write them",
        )


def readable(task: Task, text: str) -> str | Verdict:
    """The normalised code of an answer, which the model is asked about, or the verdict that needs no model."""
    code = extract_code(text).code
    return NO_CODE if code is None else _normalised(task, code)


def _normalised(task: Task, code: str) -> str | Verdict:
    plain = normalise(code)
    if plain is None:
        return DOES_NOT_PARSE
    if not plain.strip():
        return NO_CODE
    why = fault(plain, task)
    return Verdict(Outcome.WRONG, 0.0, why) if why else plain


def _finite(sample: Sample) -> bool:
    return all(math.isfinite(p) for p in sample.logprobs)
