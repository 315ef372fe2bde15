"""The GRPO update: one jitted, sharded, donated optax step over all micro-batches of a batch.

How it is put together: the state lives in the shardings of the weight table; a batch is split over data x fsdp; `jit`
with these shardings makes XLA insert the gathers and reductions. A loop over the micro-batches that hold rows adds
gradients and sums in float32, the denominators are those of the whole batch, so that the split changes nothing but
memory. A loss or gradient that is not finite leaves the state as it was.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cz_jax import shapes
from cz_jax.config import Remat
from cz_jax.grpo.batch import Batch
from cz_jax.grpo.logprobs import completion_logprobs
from cz_jax.grpo.loss import Denominators, LossOptions, add_sums, grpo_loss, zero_sums
from cz_jax.grpo.optimizer import apply_updates
from cz_jax.models.lora import join
from cz_jax.models.spec import Arch


class TrainState(NamedTuple):
    """What training changes: the trainable parameters, the optimizer's state, the number of steps."""

    params: dict
    optimizer: optax.OptState
    step: jax.Array  # int32, optimizer steps taken


@dataclass(frozen=True)
class StepOptions:
    """Everything that is fixed when the step is compiled; hashable."""

    arch: Arch
    loss: LossOptions
    optimizer: optax.GradientTransformation
    dtype: str = "float32"
    remat: Remat = "products"
    chunk: int = 1024
    temperature: float = 1.0
    seed: int = 0  # of the rounding of bfloat16 parameters


def init_state(params: dict, optimizer: optax.GradientTransformation, shardings: dict | None = None) -> TrainState:
    """A fresh state around `params`; the optimizer's moments take the parameters' shardings."""
    step, like = jnp.zeros((), jnp.int32), None
    if shardings is not None:
        whole = jax.sharding.NamedSharding(jax.tree.leaves(shardings)[0].mesh, jax.sharding.PartitionSpec())
        like = optax.ScaleByAdamState(whole, shardings, shardings)
        step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=whole)()
    return TrainState(params, jax.jit(optimizer.init, out_shardings=like)(params), step)


def _micro(batch: Batch, i) -> Batch:
    return jax.tree.map(lambda a: a[i], batch)


def _micro_logprobs(options: StepOptions, params, micro: Batch):
    return completion_logprobs(
        options.arch, params, micro.prompts, micro.prompt_lengths, micro.completions, dtype=jnp.dtype(options.dtype),
        remat=options.remat, chunk=options.chunk, temperature=options.temperature,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("options",))
def batch_logprobs(options: StepOptions, params: dict, batch: Batch) -> jax.Array:
    """float32 [M, P, G, T]: log-probabilities of the batch's completions under `params` (the whole tree), no gradient;
    0 in empty micro-batches."""

    def add(i, found):
        return found.at[i].set(_micro_logprobs(options, params, _micro(batch, i))[0])

    return jax.lax.fori_loop(0, shapes.filled(batch.lengths), add, jnp.zeros(batch.completions.shape))


@partial(jax.jit, static_argnames=("options",))
def loss_and_gradients(options: StepOptions, trainable: dict, frozen: dict, batch: Batch, over: Denominators):
    """(loss, gradients of `trainable` in float32, sums of `grpo.loss` plus "entropy") of a whole batch."""

    def micro_loss(trainable, micro: Batch):
        new, entropy = _micro_logprobs(options, join(trainable, frozen), micro)
        loss, sums = grpo_loss(
            new,
            micro.old,
            micro.behaviour,
            micro.reference,
            micro.advantages,
            micro.mask,
            over,
            options.loss,
            micro.own,
        )
        return loss, (sums, jnp.where(micro.mask, entropy, 0.0).sum())

    def add(i, total):
        micro = _micro(batch, i)
        (loss, (sums, entropy)), gradients = jax.value_and_grad(micro_loss, has_aux=True)(trainable, micro)
        old_loss, old_gradients, old_sums, old_entropy = total
        gradients = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), old_gradients, gradients)
        return old_loss + loss, gradients, add_sums(old_sums, sums), old_entropy + entropy

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), trainable)
    start = (jnp.zeros(()), zeros, zero_sums(), jnp.zeros(()))
    loss, gradients, sums, entropy = jax.lax.fori_loop(0, shapes.filled(batch.lengths), add, start)
    return loss, gradients, sums | {"entropy": entropy}


@partial(jax.jit, static_argnames=("options",), donate_argnames=("state",))
def train_step(options: StepOptions, state: TrainState, frozen: dict, batch: Batch, over: Denominators):
    """(new state, metrics): one optimizer step. Metrics are float32 scalars: "loss", "gradient_norm", "finite" (0: the
    state is unchanged) and the sums of `loss_and_gradients`. `state` is donated."""
    loss, gradients, sums = loss_and_gradients(options, state.params, frozen, batch, over)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def take(state):
        updates, optimizer = options.optimizer.update(gradients, state.optimizer, state.params)
        key = jax.random.fold_in(jax.random.key(options.seed & 0x7FFFFFFF), state.step)
        return TrainState(apply_updates(state.params, updates, key), optimizer, state.step + 1)

    state = jax.lax.cond(finite, take, lambda s: s, state)
    return state, sums | {"loss": loss, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}
