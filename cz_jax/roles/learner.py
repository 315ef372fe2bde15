"""The learner: groups and their rewards in, one GRPO update of the solver's trainable parameters out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cz_jax import parallel
from cz_jax.config import Config
from cz_jax.errors import RunStopped
from cz_jax.grpo.advantages import advantages
from cz_jax.grpo.batch import Batch, Row, pack
from cz_jax.grpo.loss import LossOptions, denominators, finish_metrics
from cz_jax.grpo.optimizer import learning_rate_at, make_optimizer
from cz_jax.grpo.step import StepOptions, TrainState, batch_logprobs, init_state, train_step
from cz_jax.models import lora
from cz_jax.models.spec import Arch
from cz_jax.nouns import Group, Rollout, Task
from cz_jax.rng import seed_for


def total_steps(config: Config) -> int:
    """Optimizer steps of a whole run."""
    return config.run.rounds * config.grpo.updates


def step_options(config: Config, arch: Arch) -> StepOptions:
    """What the compiled update of a run of `config` is fixed to."""
    g = config.grpo
    # Without bfloat16 nothing is rounded at random, and nodes of every seed share one compiled step.
    rounds = "bfloat16" in (config.solver.param_dtype, config.optimizer.moments_dtype)
    seed = seed_for(config.run.seed, "round weights") if rounds else 0
    return StepOptions(
        arch=arch,
        loss=LossOptions(g.loss, g.clip_low, g.clip_high, g.kl, g.importance_cap),
        optimizer=make_optimizer(config.optimizer, total_steps(config), seed),
        dtype=config.solver.compute_dtype,
        remat=g.remat,
        chunk=g.logprob_chunk,
        temperature=config.sampling.temperature,
        seed=seed,
    )


class GrpoLearner:
    """Implements `ports.Learner`; owns the train state.

    `params`: the solver's whole tree (low-rank pairs included, where they are trained); what is trainable moves into
    the state and is donated at every step. `encode_prompt` gives the very tokens that the sampler was given;
    `encode_answer` a peer's text in our own tokens. `shardings`: of the trainable leaves. `reference`: the whole tree
    that the KL term holds on to, needed where grpo.kl > 0.
    """

    def __init__(
        self,
        arch: Arch,
        params: dict,
        config: Config,
        mesh: jax.sharding.Mesh,
        encode_prompt: Callable[[Task], Sequence[int]],
        encode_answer: Callable[[Rollout], Sequence[int]],
        shardings: dict | None = None,
        reference: dict | None = None,
    ):
        self._config, self._mesh = config, mesh
        self._encode_prompt, self._encode_answer = encode_prompt, encode_answer
        self._reference = reference
        self._total_steps = total_steps(config)
        self._options = step_options(config, arch)
        trainable, self._frozen = lora.split(params)
        self.state: TrainState = init_state(trainable, self._options.optimizer, shardings)
        self._digest: str | None = None

    def params(self) -> dict:
        """The whole parameter tree as it is now."""
        return lora.join(self.state.params, self._frozen)

    def restore(self, state: TrainState) -> None:
        self.state, self._digest = state, None

    def policy_digest(self) -> str:
        if self._digest is None:
            self._digest = parallel.tree_digest(self.state.params)
        return self._digest

    def update(self, groups: Sequence[Group], rewards: Sequence[Sequence[float]], own: Sequence[bool]) -> dict:
        """See ports.Learner. A group whose rewards are all equal has no gradient and is left out of the step
        (grpo.drop_zero_advantage); the denominators count its tokens all the same. Metrics "groups_trained",
        "groups_dropped" (their share), and those of `grpo.loss.finish_metrics`, "loss", "gradient_norm", "entropy" and
        "learning_rate" of the last step. RunStopped where loss or gradient are not finite; the state is then unchanged.
        """
        rows = [self._row(*each) for each in zip(groups, rewards, own, strict=True)]
        lengths = [len(c) for row in rows for c in row.completions]
        kept = [r for r in rows if any(r.advantages) or not self._config.grpo.drop_zero_advantage]
        metrics = {"groups_trained": len(kept), "groups_dropped": 1 - len(kept) / len(rows) if rows else 0.0}
        if not kept or not sum(lengths):
            return metrics
        over = denominators(lengths, self._config.sampling.max_new_tokens)
        r, ways = self._config.round, parallel.batch_devices(self._mesh)
        batch = pack(
            kept, self._config.grpo.micro_batch_tokens, ways, max_new_tokens=self._config.sampling.max_new_tokens,
            most_rows=r.dataset_tasks + r.proposed_tasks + r.external_groups,
        )  # fmt: skip
        with jax.set_mesh(self._mesh):
            placed = self._complete(jax.tree.map(lambda a: parallel.place_batch(self._mesh, a, 1), batch))
            for _ in range(self._config.grpo.updates):
                self.state, sums = train_step(self._options, self.state, self._frozen, placed, over)
                self._digest = None
            sums = {name: float(value) for name, value in sums.items()}
        if not sums["finite"]:
            raise RunStopped(
                f"the update is not finite: loss {sums['loss']}, gradient norm {sums['gradient_norm']}",
                "a learning rate that is too high, or broken weights; the parameters were left as they were",
                "resume with a lower optimizer.learning_rate",
            )
        step = int(self.state.step)
        return metrics | finish_metrics(sums) | {
            "loss": sums["loss"],
            "gradient_norm": sums["gradient_norm"],
            "entropy": sums["entropy"] / sums["tokens"],
            "learning_rate": learning_rate_at(self._config.optimizer, self._total_steps, step - 1),
        }  # fmt: skip

    def _row(self, group: Group, rewards: Sequence[float], own: bool) -> Row:
        a = advantages([rewards], self._config.grpo.divide_by_std)[0].tolist()
        if own:
            completions = [r.tokens for r in group.rollouts]
            return Row(self._encode_prompt(group.task), completions, a, [r.logprobs for r in group.rollouts])
        return Row(self._encode_prompt(group.task), [self._encode_answer(r) for r in group.rollouts], a)

    def _complete(self, batch: Batch) -> Batch:
        """The batch with what its loss needs beside the batch itself: old log-probabilities where several updates are
        made of it, and those of the reference where the KL term is on. One update and no KL term need neither pass."""
        old = reference = None
        if self._config.grpo.updates > 1:
            old = batch_logprobs(self._options, self.params(), batch)
        if self._config.grpo.kl > 0:
            reference = batch_logprobs(self._options, self._reference, batch)
        return batch.replace(old=old, reference=reference)


def state_target(state: TrainState):
    """The shapes, dtypes and shardings of a train state, which a checkpoint is restored into."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype), sharding=a.sharding), state)
