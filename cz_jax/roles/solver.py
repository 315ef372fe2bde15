"""The solver's sampling side: tasks in, groups of rollouts out."""

from collections.abc import Callable, Sequence

from cz_jax.config import SamplingConfig
from cz_jax.nouns import Group, Rollout, Task
from cz_jax.ports import LanguageModel, SamplingMethod
from cz_jax.rng import seed_for
from cz_jax.roles.prompts import solver_messages


class ModelSolver:
    """Implements `ports.Solver` with a language model. `policy_digest` is asked once a call, for the groups' label."""

    def __init__(
        self,
        model: LanguageModel,
        sampling: SamplingConfig,
        group_size: int,
        run_seed: int,
        peer: str,
        policy_digest: Callable[[], str],
    ):
        self._model, self._sampling, self._group_size = model, sampling, group_size
        self._run_seed, self._peer, self._policy_digest = run_seed, peer, policy_digest
        self._method = SamplingMethod(sampling.temperature, sampling.top_p, sampling.top_k)

    def prompt_tokens(self, task: Task) -> list[int]:
        """Token ids of the prompt of `task`, up to where the answer begins: the one encoding that sampling and training
        share."""
        return self._model.encode_chat(solver_messages(task))

    def fits(self, task: Task) -> bool:
        """Whether the prompt keeps to `sampling.max_prompt_tokens` and leaves room for `sampling.max_new_tokens` in the
        model's context. A prompt is never cut."""
        return self._room_for(len(self.prompt_tokens(task)))

    def roll_out(
        self,
        tasks: Sequence[Task],
        round_number: int,
        purpose: str = "roll out",
        group_size: int | None = None,
    ) -> tuple[Group, ...]:
        """One group of `group_size` (default: the solver's own) rollouts for each task that `fits`, in the order of
        `tasks`; a task that does not fit gets no group. A rollout's seed depends on the run seed, `purpose`, the round,
        the task and its index alone."""
        size = self._group_size if group_size is None else group_size
        encoded = [(task, self.prompt_tokens(task)) for task in tasks]
        encoded = [(task, tokens) for task, tokens in encoded if self._room_for(len(tokens))]
        if not encoded:
            return ()
        seeds_PG = [
            [seed_for(self._run_seed, purpose, round_number, task.id, g) for g in range(size)] for task, _ in encoded
        ]
        prompts = [tokens for _, tokens in encoded]
        samples_PG = self._model.sample(prompts, seeds_PG, self._sampling.max_new_tokens, self._method)
        policy = self._policy_digest()
        return tuple(
            Group(
                task=task,
                peer=self._peer,
                policy=policy,
                round=round_number,
                rollouts=tuple(
                    Rollout(s.text, s.ended, seed, s.tokens, s.logprobs) for s, seed in zip(samples, seeds, strict=True)
                ),
            )
            for (task, _), samples, seeds in zip(encoded, samples_PG, seeds_PG, strict=True)
        )

    def _room_for(self, prompt_length: int) -> bool:
        s = self._sampling
        return prompt_length <= min(s.max_prompt_tokens, self._model.max_context - s.max_new_tokens)
