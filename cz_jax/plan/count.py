"""A configuration counted on a target, and the nearest change that makes it fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from cz_jax.config import Config, from_dict
from cz_jax.errors import UserError
from cz_jax.plan import memory
from cz_jax.plan.targets import Target, larger
from cz_jax.plan.work import HUB_SHAPES, Work, work_of

LORA_RANK = 32


@dataclass(frozen=True)
class Counted:
    """Bytes on each device: what stays, by kind; what each phase needs beside it; the solver's caches."""

    work: Work
    mesh: memory.Shape
    kinds: dict[str, int]
    phases: dict[str, int]
    kv_cache: int

    @property
    def bytes_per_device(self) -> dict[str, int]:
        return memory.by_kind(self.kinds, self.phases, self.kv_cache)

    @property
    def total(self) -> int:
        return self.bytes_per_device["total"]


def count(config: Config, target: Target) -> Counted:
    """`config` on `target`, counted from shapes. ConfigError, ModelFolderError where it cannot be laid out there."""
    mesh = memory.mesh_shape(config.mesh, target)
    work = work_of(config, mesh.ways, target.platform)
    kinds = memory.resident(config, work, mesh)
    return Counted(
        work, mesh, kinds, memory.working(config, work, mesh), memory.caches(work.rollout, work.solver, mesh)
    )


def nearest_fit(config: Config, target: Target, scale: dict[str, float]) -> dict:
    """The smallest change of `config` that fits `target` by counting: "settings" (section.key=value words) and its
    "total", or, where none does, a "topology" that takes the configuration as it is; otherwise a "note".

    `scale`: by how much a compiler's bytes exceeded the counted ones, by phase. Changes that leave what is learned as
    it is come first: micro-batches, remat, fewer rows at a time, sharding; then precision; then LoRA.
    """

    def fits(changed: Config) -> int | None:
        total = _scaled(count(changed, target), scale)
        return total if total <= target.chip.bytes else None

    changes = list(_changes(config, target))
    for several in itertools.chain(([c] for c in changes), _growing(changes)):
        changed = _changed(config, several)
        total = fits(changed) if changed is not None else None
        if total is not None:
            several = _needed(config, several, fits)
            words = [f"{section}.{key}={_word(value)}" for change in several for section, key, value in change]
            return {"settings": words, "total": _scaled(count(_changed(config, several), target), scale)}
    for other in larger(target):
        if _total_on(config, other, scale) is not None:
            return {"topology": other.name, "total": _total_on(config, other, scale)}
    return {
        "note": "no single key and no machine of this kind makes room: smaller models, a smaller group, fewer tokens"
    }


def _scaled(counted: Counted, scale: dict[str, float]) -> int:
    phases = {name: int(size * max(1.0, scale.get(name, 1.0))) for name, size in counted.phases.items()}
    return memory.by_kind(counted.kinds, phases, counted.kv_cache)["total"]


def _total_on(config: Config, target: Target, scale: dict[str, float]) -> int | None:
    try:
        total = _scaled(count(config, target), scale)
    except UserError:  # a mesh that does not divide those devices
        return None
    return total if total <= target.chip.bytes else None


Change = list[tuple[str, str, object]]


def _changes(config: Config, target: Target) -> Iterator[Change]:
    """Single changes, those nearest to what was asked for first."""
    g, s, o = config.grpo, config.sampling, config.optimizer
    tokens = g.micro_batch_tokens
    while tokens > 1024:
        tokens //= 2
        yield [("grpo", "micro_batch_tokens", tokens)]
    if g.remat == "products":
        yield [("grpo", "remat", "layer")]
    if g.logprob_chunk > 256:
        yield [("grpo", "logprob_chunk", 256)]
    rows = s.max_sequences
    while rows > max(8, config.round.group_size):
        rows //= 2
        yield [("sampling", "max_sequences", rows)]
    if target.devices > 1 and config.mesh.fsdp != -1:
        yield [("mesh", "data", 1), ("mesh", "fsdp", -1), ("mesh", "tensor", 1)]
    if config.solver.compute_dtype == "float32":
        yield [("solver", "compute_dtype", "bfloat16")]
    if config.evaluator.dtype == "float32":
        yield [("evaluator", "dtype", "bfloat16")]
    if config.proposer.dtype == "float32" and config.proposer.model not in (None, "none"):
        yield [("proposer", "dtype", "bfloat16")]
    if o.moments_dtype == "float32":
        yield [("optimizer", "moments_dtype", "bfloat16")]
    if config.proposer.model not in (None, "none", config.evaluator.model):
        same = [("proposer", "model", config.evaluator.model), ("proposer", "dtype", config.evaluator.dtype)]
        yield [*same, ("proposer", "revision", config.evaluator.revision)] if config.proposer.revision else same
    if config.solver.param_dtype == "float32":
        yield [("solver", "param_dtype", "bfloat16")]
    if not config.lora.rank:
        yield [("lora", "rank", LORA_RANK)]
    yield from _smaller_judges(config)


def _smaller_judges(config: Config) -> Iterator[Change]:
    roles = [("evaluator", config.evaluator), ("proposer", config.proposer)]
    for model in ("Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-Coder-0.5B-Instruct"):
        change = [(name, "model", model) for name, role in roles if role.model in HUB_SHAPES and role.model != model]
        if change:
            yield change


def _growing(changes: list[Change]) -> Iterator[list[Change]]:
    """The last (strongest) change of each key, one more at a time."""
    strongest = {tuple((s, k) for s, k, _ in c): c for c in changes}
    ordered = list(strongest.values())
    for n in range(2, len(ordered) + 1):
        yield ordered[:n]


def _needed(config: Config, several: list[Change], fits) -> list[Change]:
    """`several` without those that the others can do without, the last ones (the furthest) tried first."""
    for change in reversed(list(several)):
        fewer = [c for c in several if c is not change]
        changed = _changed(config, fewer)
        if fewer and changed is not None and fits(changed) is not None:
            several = fewer
    return several


def _changed(config: Config, several: list[Change]) -> Config | None:
    """`config` with the changes, or None where they break a relation between keys."""
    data = {
        s: {k: v for k, v in section.items() if v is not None} for s, section in config.model_dump(mode="json").items()
    }
    for section, key, value in itertools.chain.from_iterable(several):
        data[section][key] = value
    try:
        return from_dict(data)
    except UserError:
        return None


def _word(value) -> str:
    return value if isinstance(value, str) else str(value).lower()
