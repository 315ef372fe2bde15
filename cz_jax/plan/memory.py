"""Bytes on one device, counted from shapes alone.

What stays (weights, moments, frozen roles) is exact. What a program needs while it runs is the largest of a few
moments, each a sum of the arrays that live then; the sums follow what XLA's CPU compiler keeps in float32, which the
tests hold it to. Compilers that fuse more (TPU, GPU) keep less.

Legend: P prompts, G rows of a prompt, Tp prompt tokens, T tokens of a row, D hidden, F feed-forward, V vocabulary, L
layers, N query heads, K key/value heads, H head size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cz_jax import parallel
from cz_jax.config import Config, MeshConfig
from cz_jax.errors import ConfigError
from cz_jax.models.lora import lora_weights
from cz_jax.models.spec import Arch, Weight, weights
from cz_jax.plan.targets import Target
from cz_jax.plan.work import Call, Seat, Work
from cz_jax.sampling.queue import places_of, prompts_side_by_side

SIZE = {"float32": 4, "bfloat16": 2}
GATHERED_LAYERS = 2  # of a sharded model that exist whole at one time: the one in use and the next
ROWS_READ = 16  # sampling.generate.CHOICE_ROWS


@dataclass(frozen=True)
class Shape:
    """The sizes of a mesh without its devices: what `parallel.partition_spec` asks of one."""

    shape: Mapping[str, int]

    @property
    def ways(self) -> int:
        return self.shape["data"] * self.shape["fsdp"]


def mesh_shape(mesh: MeshConfig, target: Target) -> Shape:
    """The mesh of a config over the target's devices, as `parallel.make_mesh` would make it. ConfigError where its
    axes do not divide them."""
    sizes = {name: getattr(mesh, name) for name in parallel.AXES}
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if target.devices % fixed or (-1 not in sizes.values() and fixed != target.devices):
        asked = " x ".join(f"{n}={s}" for n, s in sizes.items())
        raise ConfigError(
            f"mesh {asked} does not divide the {target.devices} devices of {target.name}",
            "the product of the mesh axes must be the number of devices",
            "mesh.data=1 mesh.fsdp=-1 mesh.tensor=1",
        )
    return Shape({n: target.devices // fixed if s == -1 else s for n, s in sizes.items()})


def bytes_of(table: tuple[Weight, ...], arch: Arch, mesh: Shape, size: int) -> int:
    """Bytes of these weights on one device, each split as the table of `parallel` says."""
    total = 0
    for w in table:
        spec = parallel.partition_spec(w.axes, arch.axis_units, mesh)
        shard = w.size
        for part in spec:
            names = (part,) if isinstance(part, str) else part or ()
            shard //= int(np.prod([mesh.shape[n] for n in names]))
        total += shard * size
    return total


def resident(config: Config, work: Work, mesh: Shape) -> dict[str, int]:
    """What stays on a device for the whole run, by kind. A model that several roles name in one dtype counts once,
    under the first of its kinds: parameters, evaluator, proposer, starting_weights (which the KL term of a fully
    trained solver holds on to)."""
    arch, s = work.solver.arch, SIZE[work.solver.dtype]
    base = bytes_of(weights(arch), arch, mesh, s)
    moments = SIZE[config.optimizer.moments_dtype]
    pairs = lora_weights(arch, config.lora.rank, config.lora.targets)
    seen, kinds = set(), {}
    if pairs:
        kinds["parameters"] = base + bytes_of(pairs, arch, mesh, 4)
        trained = tuple(w for w in pairs if w.path[-1] != "lora_scale")
        kinds["optimizer"] = 2 * bytes_of(trained, arch, mesh, moments)
        seen.add(work.solver.key)
    else:
        kinds["parameters"] = base
        kinds["optimizer"] = 2 * bytes_of(weights(arch), arch, mesh, moments)
    others = {"evaluator": work.evaluator, "proposer": work.proposer}
    for kind, seat in others.items():
        new = seat is not None and seat.key not in seen
        kinds[kind] = bytes_of(weights(seat.arch), seat.arch, mesh, SIZE[seat.dtype]) if new else 0
        seen |= {seat.key} if seat is not None else set()
    kinds["starting_weights"] = base if config.grpo.kl > 0 and work.solver.key not in seen else 0
    return kinds


def caches(call: Call, seat: Seat, mesh: Shape) -> int:
    """Keys and values of one sampling call: the prompts once, and every row its own tokens; where rows are queued,
    copies of the prompts in their places, too."""
    if call.stages:
        places = places_of(call.stages[0] // mesh.ways, call.group, call.prompts // mesh.ways)
        own = Call(call.stages[0], 1, 0, call.tokens)
        prompts = [Call(n, 1, call.prompt_tokens, 0) for n in (call.prompts, mesh.ways * places)]
        return sum(caches(c, seat, mesh) for c in (own, *prompts))
    a = seat.arch
    heads = _split(a.kv_heads, mesh)
    positions = _local(call, mesh) * (call.prompt_tokens + call.group * call.tokens)
    return 2 * a.layers * positions * heads * a.head_dim * SIZE[seat.compute]


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the arrays that a call's programs are made of, on one device."""

    layers: int  # all layers' weights, as they are stored
    layer: int  # one layer's weights, whole, in the compute dtype
    head: int  # the matrix to the vocabulary, whole, in the compute dtype
    hidden: int  # one [tokens, D]
    ffn: int  # one [tokens, F]
    products: int  # the results of one layer's matrix products and attention that its backward pass keeps
    scores: int  # the float32 scores of all attentions of one layer; a kernel keeps none
    logits: int  # float32 logits of one token


def _sizes(call: Call, seat: Seat, mesh: Shape) -> _Sizes:
    a, b = seat.arch, SIZE[seat.compute]
    p, g, tp, t = _local(call, mesh), call.group, call.prompt_tokens, call.tokens
    tensor = Shape({**mesh.shape, "fsdp": 1, "data": 1})
    inner = tuple(w for w in weights(a) if w.stacked)
    tokens = p * (tp + g * t)
    ffn = tokens * _split(a.ffn_size, mesh) * b
    heads = tokens * (_split(a.heads, mesh) + _split(a.kv_heads, mesh)) * a.head_dim * b
    return _Sizes(
        layers=bytes_of(inner, a, mesh, SIZE[seat.dtype]),
        layer=bytes_of(inner, a, tensor, b) // a.layers,
        head=a.hidden_size * _split(a.vocab_size, mesh) * b,
        hidden=tokens * a.hidden_size * b,
        ffn=ffn,
        products=2 * heads + tokens * a.hidden_size * b + 2 * ffn,
        scores=p * _split(a.heads, mesh) * (tp * tp + g * t * (tp + t)) * 4 * (a.attention == "plain"),
        logits=_split(a.vocab_size, mesh) * 4,
    )


def rollout_bytes(call: Call, seat: Seat, mesh: Shape) -> int:
    """Working memory of `sampling.generate.generate`, or of `sampling.queue.generate_queued`, their caches
    included."""
    kept, all_prompts = caches(call, seat, mesh), Call(call.prompts, 1, call.prompt_tokens, 0)
    cache_of_prompts, at_once = caches(all_prompts, seat, mesh), all_prompts
    copied = (kept - cache_of_prompts) // 2  # the first half's caches, as the whole ones begin
    if call.stages:
        slots, *later = call.stages
        count = prompts_side_by_side(call.prompts // mesh.ways, slots // mesh.ways, call.group) * mesh.ways
        call, at_once = Call(slots, 1, call.prompt_tokens, call.tokens), Call(count, 1, call.prompt_tokens, 0)
        copied = caches(Call(later[0], 1, 0, call.tokens), seat, mesh) if later else 0
    prompt = _sizes(at_once, seat, mesh)
    gathered = 0
    if mesh.shape["fsdp"] > 1:  # compilers gather the weights once for all steps where they can
        gathered = prompt.layer * seat.arch.layers
    rows = _local(call, mesh) * call.group
    prefill = cache_of_prompts + max(3 * prompt.ffn, 2 * prompt.scores) + 4 * prompt.hidden
    step = kept + cache_of_prompts + max(4 * rows * prompt.logits, copied)
    return _read_head(prompt, seat, mesh) + prompt.layers + gathered + max(prefill, step)


def _read_head(sizes: _Sizes, seat: Seat, mesh: Shape) -> int:
    """What `qwen.next_logits` makes of the head: nothing where it can be read as it lies."""
    return sizes.head if mesh.shape["fsdp"] > 1 or seat.dtype != seat.compute else 0


def judge_bytes(call: Call, seat: Seat, mesh: Shape) -> int:
    """Working memory of `sampling.generate.choice_probabilities`."""
    s = _sizes(call, seat, mesh)
    whole = GATHERED_LAYERS * s.layer if mesh.shape["fsdp"] > 1 else s.layer
    inner = whole + max(2 * s.ffn, 2 * s.scores) + 4 * s.hidden
    return _read_head(s, seat, mesh) + max(inner, s.hidden + 2 * min(ROWS_READ, call.rows) * s.logits)


def update_bytes(config: Config, call: Call, seat: Seat, mesh: Shape) -> int:
    """Working memory of `grpo.step.train_step`: at the logits, inside of a layer's backward pass, or in the optimizer,
    whichever is most."""
    a = seat.arch
    s = _sizes(call, seat, mesh)
    pairs = lora_weights(a, config.lora.rank, config.lora.targets)
    table = tuple(w for w in pairs if w.path[-1] != "lora_scale") or weights(a)
    sums = bytes_of(table, a, mesh, 4)
    gradients = bytes_of(table, a, mesh, 4 if pairs else SIZE[seat.dtype])
    head = s.head if not pairs else 0  # the head's gradient, whole
    whole = GATHERED_LAYERS * s.layer if mesh.shape["fsdp"] > 1 else s.layer
    per_layer = s.hidden
    if config.grpo.remat == "products":
        per_layer += s.products
    kept = a.layers * per_layer
    p = _local(call, mesh)
    chunk = p * min(max(1, config.grpo.logprob_chunk // call.prompts), call.group * call.tokens)
    at_logits = sums + kept + s.head + 2 * head + chunk * s.logits + 4 * s.hidden
    in_layer = sums + gradients + s.head + kept + whole + max(5 * s.ffn, 2 * s.ffn + 4 * s.scores) + 8 * s.hidden
    return max(at_logits, in_layer, 2 * sums)


def working(config: Config, work: Work, mesh: Shape) -> dict[str, int]:
    """Bytes that each phase needs beside what stays."""
    phases = {"rollout": rollout_bytes(work.rollout, work.solver, mesh)}
    if work.proposing is not None:
        phases["propose"] = rollout_bytes(work.proposing, work.proposer, mesh)
    if work.judging is not None:
        phases["judge"] = judge_bytes(work.judging, work.evaluator, mesh)
    if work.reasoning is not None:
        phases["reason"] = rollout_bytes(work.reasoning, work.evaluator, mesh)
    phases["update"] = update_bytes(config, work.update, work.solver, mesh)
    return phases


def arguments(config: Config, work: Work, mesh: Shape) -> dict[str, int]:
    """Bytes of the weights (and moments) that each program of the round is given."""

    def of(seat: Seat) -> int:
        return bytes_of(weights(seat.arch), seat.arch, mesh, SIZE[seat.dtype])

    pairs = bytes_of(lora_weights(work.solver.arch, config.lora.rank, config.lora.targets), work.solver.arch, mesh, 4)
    solver, judge = of(work.solver) + pairs, of(work.evaluator)
    update = solver + resident(config, work, mesh)["optimizer"]
    inventor = of(work.proposer) if work.proposer is not None else 0
    return {"rollout": solver, "propose": inventor, "judge": judge, "reason": judge, "update": update}


def by_kind(kinds: dict[str, int], phases: dict[str, int], kv_cache: int) -> dict[str, int]:
    """`bytes_per_device`: what stays by kind, the solver's caches, what the fullest phase needs beyond their room, and
    the total."""
    most = max(kv_cache, *phases.values())
    table = kinds | {"kv_cache": kv_cache, "temporaries": most - kv_cache}
    return table | {"total": sum(table.values())}


def _local(call: Call, mesh: Shape) -> int:
    """Prompts of a call on one device."""
    return call.prompts // mesh.ways if call.prompts % mesh.ways == 0 else call.prompts


def _split(units: int, mesh: Shape) -> int:
    tensor = mesh.shape["tensor"]
    return units // tensor if units % tensor == 0 else units
