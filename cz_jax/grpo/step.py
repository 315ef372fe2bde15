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
from cz_jax.grpo.logprobs import chunked_logprobs, chunked_loss
from cz_jax.grpo.loss import Denominators, LossOptions, add_sums, loss_inputs, zero_sums
from cz_jax.grpo.optimizer import apply_updates
from cz_jax.models import qwen
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


def _predicting(options: StepOptions, params, micro: Batch):
    """(the hidden states that predict the completions [P, G, T, D], the head's matrix [D, V]); each prompt is computed
    once for its G completions. What stands in a completion's padding is read too: mask it."""
    arch, dtype = options.arch, jnp.dtype(options.dtype)
    prompt, suffix = qwen.shared_forward(
        arch, params, micro.prompts, micro.prompt_lengths, micro.completions, dtype, options.remat
    )
    return qwen.predicting_hidden(prompt, micro.prompt_lengths, suffix), qwen.head_matrix(arch, params)


@partial(jax.jit, static_argnames=("options",))
def batch_logprobs(options: StepOptions, params: dict, batch: Batch) -> jax.Array:
    """float32 [M, P, G, T]: log-probabilities of the batch's completions under `params` (the whole tree), no gradient;
    0 in empty micro-batches."""

    def add(i, found):
        micro = _micro(batch, i)
        hidden, head = _predicting(options, params, micro)
        read = partial(chunked_logprobs, chunk=options.chunk, temperature=options.temperature)
        return found.at[i].set(read(hidden, head, micro.completions))

    return jax.lax.fori_loop(0, shapes.filled(batch.lengths), add, jnp.zeros(batch.completions.shape))


@partial(jax.jit, static_argnames=("options",))
def loss_and_gradients(options: StepOptions, trainable: dict, frozen: dict, batch: Batch, over: Denominators):
    """(loss, gradients of `trainable` in float32, sums of `chunked_loss`) of a whole batch."""

    def micro_loss(trainable, micro: Batch):
        hidden, head = _predicting(options, join(trainable, frozen), micro)
        inputs = loss_inputs(
            micro.old, micro.behaviour, micro.reference, micro.advantages, micro.mask, over, options.loss.loss,
            micro.own,
        )  # fmt: skip
        read = partial(chunked_loss, chunk=options.chunk, temperature=options.temperature)
        return read(hidden, head, micro.completions, inputs, options.loss)

    def add(i, total):
        (loss, sums), gradients = jax.value_and_grad(micro_loss, has_aux=True)(trainable, _micro(batch, i))
        old_loss, old_gradients, old_sums = total
        gradients = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), old_gradients, gradients)
        return old_loss + loss, gradients, add_sums(old_sums, sums)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), trainable)
    return jax.lax.fori_loop(0, shapes.filled(batch.lengths), add, (jnp.zeros(()), zeros, zero_sums()))


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
