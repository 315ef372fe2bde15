"""The programs of a round compiled ahead of time: sampling, judging and the update as the node calls them, over shapes
with shardings instead of arrays. Nothing is computed and no weight is read.
"""

import re
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cz_jax import parallel
from cz_jax.build.models import sharding_rule
from cz_jax.config import Config
from cz_jax.grpo.batch import Batch
from cz_jax.grpo.loss import denominators
from cz_jax.grpo.step import TrainState, train_step
from cz_jax.models import lora
from cz_jax.models.spec import tree_of, weights
from cz_jax.plan.targets import GIB, Target
from cz_jax.plan.work import Call, Seat, Work
from cz_jax.ports import SamplingMethod
from cz_jax.roles.learner import step_options
from cz_jax.sampling.engine import JUDGING_STEPS
from cz_jax.sampling.generate import choice_probabilities, generate
from cz_jax.sampling.queue import generate_queued

GREEDY = SamplingMethod(temperature=0.0)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
_REQUIRED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)")


@dataclass(frozen=True)
class Compiled:
    """One program on one device. `working`: bytes beside its arguments; None where the compiler found no room, and
    `required` is then what it says the program takes, arguments included (None: it did not say)."""

    seconds: float
    working: int | None = None
    required: int | None = None


def devices_of(target: Target) -> list:
    """The devices of a TPU slice that is not there, or this host's first CPU."""
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=target.layout, **target.options).devices


def lowered(config: Config, work: Work, mesh) -> dict[str, object]:
    """A function for each phase that lowers its program; see `compile_all`."""
    s = config.sampling
    method = SamplingMethod(s.temperature, s.top_p, s.top_k)
    p = config.proposer
    programs = {"rollout": lambda: _sampling(work.rollout, work.solver, mesh, method, config)}
    if work.proposing is not None:
        invent = SamplingMethod(p.temperature, p.top_p, p.top_k)
        programs["propose"] = lambda: _sampling(work.proposing, work.proposer, mesh, invent)
    if work.judging is not None:
        programs["judge"] = lambda: _judging(work.judging, work.evaluator, mesh)
    if work.reasoning is not None:
        programs["reason"] = lambda: _sampling(work.reasoning, work.evaluator, mesh, GREEDY)
    programs["update"] = lambda: _update(config, work, mesh)
    return programs


def compile_all(config: Config, work: Work, target: Target, say) -> dict[str, Compiled]:
    """Every program of the round, compiled for the target."""
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices_of(target))
    out = {}
    with jax.set_mesh(mesh):
        for name, lower in lowered(config, work, mesh).items():
            say("phase", name=f"compiling the {name} program for {target.name}", expected=90)
            out[name] = compiled(lower())
    return out


def compiled(program) -> Compiled:
    """`program` (lowered) compiled; a program without room is a result, anything else that goes wrong is raised."""
    begun = time.perf_counter()
    try:
        memory = program.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = _REQUIRED.search(str(e))
        required = int(float(said[1]) * _UNITS[said[2]]) if said else None
        return Compiled(time.perf_counter() - begun, required=required)
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    working = memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes
    return Compiled(time.perf_counter() - begun, working)


def _struct(shape, dtype, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def _split(mesh, shape, dtype, dimension: int = 0) -> jax.ShapeDtypeStruct:
    """An array that `parallel.place_batch` placed."""
    axes = (*(None,) * dimension, "batch", *(None,) * (len(shape) - 1 - dimension))
    return _struct(shape, dtype, parallel.sharding(mesh, axes))


def _weights(seat: Seat, mesh) -> dict:
    rule = sharding_rule(seat.arch, mesh)
    return tree_of(weights(seat.arch), lambda w: _struct(w.shape, seat.dtype, rule(w)))


def _solver(config: Config, seat: Seat, mesh) -> dict:
    """The solver's whole tree, low-rank pairs included."""
    params = _weights(seat, mesh)
    if not config.lora.rank:
        return params
    rule = sharding_rule(seat.arch, mesh)
    table = lora.lora_weights(seat.arch, config.lora.rank, config.lora.targets)
    return lora.join(tree_of(table, lambda w: _struct(w.shape, "float32", rule(w))), params)


def _sampling(call: Call, seat: Seat, mesh, method: SamplingMethod, config: Config | None = None):
    p, g = call.prompts, call.group
    params = _solver(config, seat, mesh) if config is not None else _weights(seat, mesh)
    program, more = generate, {}
    if call.stages:
        program, more = generate_queued, {"stages": call.stages, "ways": parallel.batch_devices(mesh)}
    return program.lower(
        seat.arch, params, _split(mesh, (p, call.prompt_tokens), "int32"), _split(mesh, (p,), "int32"),
        _split(mesh, (p, g, 2), "uint32"), _split(mesh, (p, g), "int32"),
        _struct((1,), "int32", parallel.sharding(mesh)),
        max_new_tokens=call.tokens, method=method, dtype=jnp.dtype(seat.compute), **more,
    )  # fmt: skip


def _judging(call: Call, seat: Seat, mesh):
    rows = (JUDGING_STEPS, call.prompts, call.group)
    return choice_probabilities.lower(
        seat.arch, _weights(seat, mesh), _split(mesh, (*rows[:2], call.prompt_tokens), "int32", 1),
        _split(mesh, rows[:2], "int32", 1), _split(mesh, (*rows, call.tokens), "int32", 1),
        _split(mesh, rows, "int32", 1),
        _struct((2,), "int32", parallel.sharding(mesh)), dtype=jnp.dtype(seat.compute),
    )  # fmt: skip


def _update(config: Config, work: Work, mesh):
    g, o, call = config.grpo, config.optimizer, work.update
    options = step_options(config, work.solver.arch)
    trainable, frozen = lora.split(_solver(config, work.solver, mesh))
    whole = parallel.sharding(mesh)
    count = _struct((), "int32", whole)
    mu, nu = (jax.tree.map(lambda a: _struct(a.shape, o.moments_dtype, a.sharding), trainable) for _ in range(2))
    state = TrainState(trainable, optax.ScaleByAdamState(count, mu, nu), count)
    m, p, rows, t = work.micro_batches, call.prompts, call.group, call.tokens
    tokens = _split(mesh, (m, p, rows, t), "float32", 1)
    batch = Batch(
        prompts=_split(mesh, (m, p, call.prompt_tokens), "int32", 1),
        prompt_lengths=_split(mesh, (m, p), "int32", 1),
        completions=_split(mesh, (m, p, rows, t), "int32", 1),
        lengths=_split(mesh, (m, p, rows), "int32", 1),
        advantages=_split(mesh, (m, p, rows), "float32", 1),
        own=_split(mesh, (m, p), "bool", 1),
        behaviour=tokens,
        old=tokens if g.updates > 1 else None,
        reference=tokens if g.kl > 0 else None,
    )
    over = denominators(np.full((p, rows), t), t)
    return train_step.lower(options, state, frozen, batch, over)
