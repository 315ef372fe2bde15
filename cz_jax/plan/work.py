"""What a round of a configuration asks of its models, in shapes: which model plays which role, and how large the calls
are. No weights are read: an architecture comes from a folder's config.json or from the table of published shapes.
"""

import pathlib
from dataclasses import dataclass, replace

from cz_jax import shapes
from cz_jax.config import Config
from cz_jax.convert.folder import is_hub_id, locate
from cz_jax.errors import ConfigError, ModelFolderError
from cz_jax.evaluate import TASKS_AT_ONCE
from cz_jax.grpo.batch import Row, pack
from cz_jax.models.attention import implementation
from cz_jax.models.spec import RANDOM_SHAPES, Arch, arch_from_folder
from cz_jax.sampling.engine import Engine, judged_at_once, prompts_at_once

RANDOM = "random:"
HUB_SHAPES = {
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": "qwen2.5-coder-0.5b",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "qwen2.5-coder-1.5b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-coder-0.5b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-coder-1.5b",
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-1.7B": "qwen3-1.7b",
    "Qwen/Qwen3-4B": "qwen3-4b",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b-instruct-2507",
}
PROPOSER_PROMPT_TOKENS = 512  # what prompts.PROPOSER_TEMPLATE comes to, with room
JUDGE_PROMPT_TOKENS = 128  # instructions around task and answer
LONGEST = shapes.LADDER[-1]


@dataclass(frozen=True)
class Seat:
    """A model in a role. Seats of the same `key` share one copy in memory."""

    key: tuple[str, str | None, str]  # model, revision, dtype
    arch: Arch
    dtype: str  # of the weights
    compute: str  # of the arithmetic


@dataclass(frozen=True)
class Call:
    """One compiled call: P prompts of Tp tokens, G rows behind each, T tokens a row. `stages`: how many rows are
    decoded side by side where they are queued, one number after the other; none: all of them."""

    prompts: int
    group: int
    prompt_tokens: int
    tokens: int
    stages: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.prompts * self.group


@dataclass(frozen=True)
class Work:
    """A round. `groups` counts own and external ones, `judged_groups` also those that external ones are chosen from.
    `rollout` is the largest sampling call of the solver, in training or evaluation; a call that the configuration does
    not make is None. `ways`: how many ways a batch is split."""

    solver: Seat
    evaluator: Seat
    proposer: Seat | None
    own: int
    groups: int
    judged_groups: int
    rollout: Call
    proposing: Call | None
    reasoning: Call | None
    judging: Call | None
    update: Call  # one micro-batch
    micro_batches: int
    ways: int


def architecture(model: str) -> Arch:
    """The architecture of `model` as a config names it: a folder, one of ours, an embedded one, `random:SHAPE`, or the
    hub id of a published shape; any other hub id is asked for at the hub's cache. ModelFolderError where it cannot be
    told."""
    if model.startswith(RANDOM):
        name = model.removeprefix(RANDOM)
        if name not in RANDOM_SHAPES:
            raise ModelFolderError(f"{model} is not a known shape", f"known: {', '.join(RANDOM_SHAPES)}")
        return RANDOM_SHAPES[name]
    path = pathlib.Path(model).expanduser()
    if path.is_dir():
        ours = path / "model"
        return arch_from_folder(ours if (ours / "config.json").is_file() else path)
    if model in HUB_SHAPES:
        return RANDOM_SHAPES[HUB_SHAPES[model]]
    if is_hub_id(model):
        raise ModelFolderError(
            f"the shape of {model} is not known here",
            "plan fetches nothing from the hub",
            f"a local folder with its config.json, or one of {', '.join(HUB_SHAPES)}",
        )
    return arch_from_folder(locate(model))


def work_of(config: Config, ways: int, platform: str) -> Work:
    """The round of `config` where a batch is split `ways` ways, every prompt and answer as long as it may be.
    `platform`: as JAX names it. ConfigError for lengths that no compiled program takes, and for a kernel that the
    platform does not have."""
    for name in ("max_prompt_tokens", "max_new_tokens"):
        if getattr(config.sampling, name) > LONGEST:
            raise ConfigError(f"sampling.{name}={getattr(config.sampling, name)} exceeds {LONGEST}")
    s, e, p, r = config.solver, config.evaluator, config.proposer, config.round
    attention = implementation(config.run.attention, platform)

    def seat(role, dtype: str, compute: str) -> Seat:
        arch = replace(architecture(role.model), attention=attention)
        return Seat((role.model, role.revision, dtype), arch, dtype, compute)

    solver, evaluator = seat(s, s.param_dtype, s.compute_dtype), seat(e, e.dtype, e.dtype)
    proposer = None
    if p.model not in (None, "none"):
        proposer = seat(p, p.dtype, p.dtype)
    proposed = r.proposed_tasks if proposer is not None else 0
    own = r.dataset_tasks + (r.proposed_tasks if proposer is not None or config.swarm.relay else 0)
    groups, seats = own + r.external_groups, config.sampling.max_sequences
    judged_groups = own + r.external_groups * (config.swarm.oversample if config.swarm.relay else 1)
    tokens = config.sampling.max_new_tokens
    prompt = shapes.rung(config.sampling.max_prompt_tokens)
    calls = [_sampling(own, r.group_size, prompt, tokens, seats, ways, platform)] if own else []
    if config.eval.before_and_after:
        at_once = min(config.eval.max_tasks or TASKS_AT_ONCE, TASKS_AT_ONCE)
        calls.append(_sampling(at_once, config.eval.k, prompt, tokens, seats, ways, platform))
    row = Row([0] * config.sampling.max_prompt_tokens, [[0] * tokens] * r.group_size, [0.0] * r.group_size)
    batch = pack([row] * groups, config.grpo.micro_batch_tokens, ways, max_new_tokens=tokens)
    m, pp, g, t = batch.completions.shape
    proposing = None
    if proposed:
        proposing = _sampling(proposed, 1, PROPOSER_PROMPT_TOKENS, p.max_new_tokens, seats, ways, platform)
    judged = config.sampling.max_prompt_tokens + JUDGE_PROMPT_TOKENS
    reasoning = judging = None
    extra = {"direct": 0, "reason": e.reason_tokens, "generate": e.generate_tokens}[e.mode]
    if extra:
        reasoning = _sampling(judged_groups * r.group_size, 1, _rung(judged + tokens), extra, seats, ways, platform)
    if e.mode != "generate":
        judging = _judging(r.group_size, judged, tokens + extra, ways)
    return Work(
        solver, evaluator, proposer, own, groups, judged_groups,
        max(calls, key=lambda c: c.rows) if calls else Call(ways, r.group_size, pp, tokens),
        proposing, reasoning, judging, Call(pp, g, batch.prompts.shape[-1], t), m, ways,
    )  # fmt: skip


def _sampling(prompts: int, group: int, length: int, tokens: int, seats: int, ways: int, platform: str) -> Call:
    """What `Engine` makes of `prompts` groups of answers, `seats` of them side by side."""
    at_once = prompts_at_once(prompts, group, length, seats, Engine.max_tokens)
    stages = shapes.stages(seats, ways, platform) if at_once * group > seats else ()
    return Call(shapes.rows(at_once, ways), group, length, tokens, stages)


def _judging(group: int, prefix: int, suffix: int, ways: int) -> Call:
    """One step of the judging program."""
    group = shapes.group(group)
    prefix, suffix = shapes.judged(min(prefix, LONGEST), min(suffix, LONGEST))
    return Call(judged_at_once(prefix, suffix, group, ways), group, prefix, suffix)


def _rung(length: int) -> int:
    """The padded length of a prompt; the evaluator reads none that is longer than the ladder."""
    return shapes.rung(min(length, LONGEST))
