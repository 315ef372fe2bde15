"""The proposer: a frozen model that invents tasks at a level. What it writes is parsed strictly or refused."""

from collections import Counter

from cz_jax.config import ProposerConfig
from cz_jax.errors import ConfigError
from cz_jax.nouns import Level, Task
from cz_jax.ports import LanguageModel, Proposals, Sample, SamplingMethod
from cz_jax.rng import seed_for
from cz_jax.roles.prompts import proposer_messages
from cz_jax.text.proposals import NearCopies, Refused, parse_proposal


class ModelProposer:
    """Implements `ports.Proposer` with a language model.

    Each wanted task is sampled up to `config.max_tries` times, all missing ones side by side. Refusals are counted by
    reason: those of `parse_proposal`, "cut_off" (no EOS within `config.max_new_tokens`) and "near_copy" (of a question
    that was already asked, in this round or before).
    """

    def __init__(self, model: LanguageModel, config: ProposerConfig, run_seed: int):
        self._model, self._config, self._run_seed = model, config, run_seed
        self._method = SamplingMethod(config.temperature, config.top_p, config.top_k)
        self._asked = NearCopies(config.memory, config.near_copy)

    def propose(self, level: Level, count: int, round_number: int) -> Proposals:
        """At most `count` tasks at `level`; fewer where the tries did not suffice. ConfigError if not even the bare
        prompt leaves room for `config.max_new_tokens` in the model's context."""
        tasks: list[Task] = []
        refused: Counter[str] = Counter()
        tries = 0
        this_round = NearCopies(max(1, count), self._config.near_copy)  # the memory may be smaller, or off
        for attempt in range(self._config.max_tries):
            missing = count - len(tasks)
            if missing <= 0:
                break
            seeds = [seed_for(self._run_seed, "propose", round_number, attempt, slot) for slot in range(missing)]
            prompts = [self._prompt(level, seed) for seed in seeds]
            samples = self._model.sample(prompts, [[s] for s in seeds], self._config.max_new_tokens, self._method)
            for (sample,) in samples:
                tries += 1
                try:
                    tasks.append(self._accept(sample, level, this_round))
                except Refused as e:
                    refused[e.reason] += 1
        return Proposals(tuple(tasks), tries, dict(sorted(refused.items())))

    def state(self) -> dict:
        """What `restore` needs so that later rounds refuse the same near-copies."""
        return {"asked": self._asked.state()}

    def restore(self, state: dict) -> None:
        self._asked.restore(state["asked"])

    def _prompt(self, level: Level, seed: int) -> list[int]:
        limit = self._model.max_context - self._config.max_new_tokens
        for avoid in (self._asked.state(), ()):
            tokens = self._model.encode_chat(proposer_messages(int(level), avoid, seed))
            if len(tokens) <= limit:
                return tokens
        raise ConfigError(
            f"proposer.max_new_tokens={self._config.max_new_tokens} does not fit: {self._model.name} has a context of "
            f"{self._model.max_context} tokens and the prompt takes {len(tokens)}",
            "a small model with a large token limit",
            f"proposer.max_new_tokens={max(1, self._model.max_context - len(tokens))}",
        )

    def _accept(self, sample: Sample, level: Level, this_round: NearCopies) -> Task:
        if not sample.ended:
            raise Refused("cut_off")
        task = parse_proposal(sample.text, int(level), self._config.imports)
        memories = (self._asked, this_round)
        if any(m.is_copy(task.question) for m in memories):
            raise Refused("near_copy")
        for m in memories:
            m.add(task.question)
        return task
