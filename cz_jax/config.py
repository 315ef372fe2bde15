"""The configuration of a node: TOML in, frozen values out, every unknown key and every wrong relation refused.

`load(path, overrides)` reads a file and `section.key=value` words; `Config()` is the default of every section. No class
name and no code ever stands in a config. `to_toml` writes the resolved form that a run folder keeps.
"""

import difflib
import math
import pathlib
import re
import tomllib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cz_jax.errors import ConfigError, one_line
from cz_jax.nouns import digest

MAX_CONFIG_BYTES = 1 << 14  # reading a TOML file of dotted keys takes quadratic time

Dtype = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    rounds: Positive = 100
    peer: str = ""  # name under which groups are kept; empty: "solver"
    compile_cache: str = "auto"  # a folder, "auto" (per user) or "off"
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)] = 0.92  # of a GPU's, taken at once
    xla_flags: tuple[Annotated[str, Field(pattern=r"^--xla_[a-z0-9_]+(=\S+)?$")], ...] = ()
    # splash: the kernel for TPUs, which auto takes there. cudnn: the one for NVIDIA GPUs, only in bfloat16; its sums
    # have no fixed order, so that a resumed run does not repeat bit for bit, and auto does not take it.
    attention: Literal["auto", "plain", "splash", "cudnn"] = "auto"


class SolverConfig(Section):
    model: str = "tiny"
    revision: str | None = None
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"


class ProposerConfig(Section):
    model: str | None = "tiny"  # absent or "none": tasks come from the data sets alone
    revision: str | None = None
    dtype: Dtype = "float32"
    max_tries: Positive = 3  # samples per wanted task; then the data sets take over
    max_new_tokens: Positive = 384
    temperature: NonNegative = 0.8
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    top_k: Count = 0
    memory: Count = 512  # questions remembered, against near-copies
    near_copy: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85  # token-set similarity from which it is a copy
    imports: tuple[str, ...] = (
        "math",
        "re",
        "itertools",
        "functools",
        "collections",
        "string",
        "typing",
        "heapq",
        "bisect",
    )


class EvaluatorConfig(Section):
    model: str = "tiny/judge"
    revision: str | None = None
    dtype: Dtype = "float32"
    mode: Literal["direct", "reason", "generate"] = "direct"
    threshold: Share = 0.5  # P(true) / (P(true) + P(false)) from which an answer counts as correct
    abstain_below: Share = 0.3  # P(true) + P(false) under which the evaluator has said nothing
    reason_tokens: Positive = 192
    generate_tokens: Positive = 64
    max_failed_share: Share = 0.05  # of a round's verdicts; above it the run stops


class TasksConfig(Section):
    sources: tuple[str, ...] = ("builtin@train",)
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()  # one a source; empty: equal
    held_out: tuple[str, ...] = ("builtin@held_out",)  # may never enter training


class RoundConfig(Section):
    dataset_tasks: Count = 1
    proposed_tasks: Count = 1
    external_groups: Count = 0
    group_size: Annotated[int, Field(ge=2, le=1024)] = 8


class SamplingConfig(Section):
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0  # 0: off
    max_new_tokens: Positive = 256
    max_prompt_tokens: Positive = 1024
    max_sequences: Positive = 64  # rollouts decoded side by side


class RewardConfig(Section):
    preset: Literal["cz", "reference"] = "cz"
    structure: NonNegative = 0.3
    format: NonNegative = 0.2
    correctness: NonNegative = 1.0
    correctness_from: Literal["probability", "binary"] = "binary"


class LevelConfig(Section):
    rule: Literal["band", "trend"] = "band"
    start: Annotated[int, Field(ge=1, le=5)] = 2
    low: Share = 0.3
    high: Share = 0.7
    hysteresis: Share = 0.05  # beyond the band before the level moves
    min_count: Positive = 24  # outcomes at the current level before it may move
    window: Positive = 48  # outcomes looked back on


# What the backward pass computes again: all of a layer but its matrix products and the result of its attention, which
# costs next to no time; or all of it, of which only the input is kept.
Remat = Literal["products", "layer"]


class GrpoConfig(Section):
    loss: Literal["token_mean", "sequence_mean", "dr_grpo"] = "token_mean"
    divide_by_std: bool = True
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: Annotated[float, Field(gt=0.0)] = 0.28
    kl: NonNegative = 0.0  # weight of the k3 estimator against the starting weights
    updates: Positive = 1  # optimizer steps on one batch
    importance_cap: NonNegative = 2.0  # truncation of trainer/sampler importance weights; 0: no weights
    drop_zero_advantage: bool = True
    micro_batch_tokens: Positive = 2048
    logprob_chunk: Positive = 1024
    remat: Remat = "products"


class OptimizerConfig(Section):
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    moments_dtype: Dtype = "float32"


class LoraConfig(Section):
    rank: Count = 0  # 0: every weight is trained
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")


class MeshConfig(Section):
    data: Annotated[int, Field(ge=-1)] = 1
    fsdp: Annotated[int, Field(ge=-1)] = -1  # -1: what the other axes leave of the devices
    tensor: Annotated[int, Field(ge=-1)] = 1


class CheckpointConfig(Section):
    every: Positive = 10
    keep: Positive = 2
    keep_best: Count = 1  # by mean reward
    folder: str = ""  # gs://BUCKET/PREFIX, or a folder, that all hosts of the run reach; empty: in the run folder


class EvalConfig(Section):
    tasks: tuple[str, ...] = ()  # empty: tasks.held_out
    k: Positive = 8
    max_tasks: Count = 32  # 0: all
    before_and_after: bool = True


class ReportConfig(Section):
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # trackers beside metrics.jsonl


class SwarmConfig(Section):
    relay: str = ""  # HOST:PORT of a relay; empty: alone
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "default"  # the log that is shared
    identity: str = ""  # a file of `cz-jax identity new`, or swarm.pem; empty: peer.key in the run folder
    tls: bool = False
    tls_ca: str = ""  # PEM file of the authority behind the relay's certificate; empty: the system's
    insecure: bool = False  # plaintext to a relay beyond this machine
    share_proposals: bool = True  # what an own proposer invents
    propose_seconds: Annotated[float, Field(ge=0.0, le=86_400.0)] = 10.0  # between turns of `cz-jax propose`
    per_peer: Annotated[int, Field(ge=1, le=256)] = 2  # external groups of one peer in one round
    oversample: Annotated[int, Field(ge=1, le=16)] = 3  # times round.external_groups that are judged to choose from
    max_age_seconds: Annotated[float, Field(gt=0.0)] = 900.0  # older messages are not used
    fetch_seconds: Annotated[float, Field(gt=0.0, le=60.0)] = 5.0  # that a relay has to answer; then the round goes on
    wait_seconds: Annotated[float, Field(ge=0.0, le=30.0)] = 0.0  # that a round waits for a first group of peers
    buffer: Annotated[int, Field(ge=1, le=100_000)] = 256  # own messages kept while the relay is away


class Config(Section):
    run: RunConfig = RunConfig()
    solver: SolverConfig = SolverConfig()
    proposer: ProposerConfig = ProposerConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    tasks: TasksConfig = TasksConfig()
    round: RoundConfig = RoundConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    level: LevelConfig = LevelConfig()
    grpo: GrpoConfig = GrpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()
    swarm: SwarmConfig = SwarmConfig()

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved configuration."""
        return digest(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _relations(self):
        for broken, message in self._broken_relations():
            if broken:
                raise ValueError(message)
        return self

    def _broken_relations(self):
        r, lv, t = self.round, self.level, self.tasks
        has_proposer = self.proposer.model not in (None, "none") or bool(self.swarm.relay)
        own = r.dataset_tasks + (r.proposed_tasks if has_proposer else 0)
        yield (
            own + r.external_groups == 0,
            (
                "round.dataset_tasks + proposed_tasks + external_groups is 0, so there is nothing to train on: "
                "set round.dataset_tasks=1 (round.proposed_tasks counts only with proposer.model)"
            ),
        )
        yield not t.sources, 'tasks.sources is empty: name one, for example tasks.sources=["builtin@train"]'
        yield (
            t.weights and len(t.weights) != len(t.sources),
            (f"tasks.weights has {len(t.weights)} numbers for {len(t.sources)} tasks.sources: one a source, or none"),
        )
        overlap = sorted(set(t.sources) & set(t.held_out + self.eval.tasks))
        yield overlap, f"{overlap} is both trained on (tasks.sources) and held out (tasks.held_out, eval.tasks)"
        yield lv.low >= lv.high, f"level.low={lv.low} must be below level.high={lv.high}"
        yield (
            lv.rule == "band" and (lv.low - lv.hysteresis < 0 or lv.high + lv.hysteresis > 1),
            ("level.hysteresis pushes the band beyond [0, 1], so the level could never move: lower it"),
        )
        yield lv.min_count > lv.window, f"level.min_count={lv.min_count} exceeds level.window={lv.window}"
        wild = [a for a in ("data", "fsdp", "tensor") if getattr(self.mesh, a) == -1]
        zero = [a for a in ("data", "fsdp", "tensor") if getattr(self.mesh, a) == 0]
        yield len(wild) > 1, f"mesh.{' and mesh.'.join(wild)} are -1: only one axis can take the remaining devices"
        yield zero, f"mesh.{' and mesh.'.join(zero)} is 0: an axis has at least one device (-1: the remaining ones)"
        dtypes = {
            "solver.compute_dtype": self.solver.compute_dtype,
            "proposer.dtype": self.proposer.dtype,
            "evaluator.dtype": self.evaluator.dtype,
        }
        wide = [f"{name}={dtype}" for name, dtype in dtypes.items() if dtype == "float32"]
        yield (
            self.run.attention == "cudnn" and wide,
            f"run.attention=cudnn computes in bfloat16: {', '.join(wide)} must be bfloat16, or run.attention=plain",
        )
        sinks = self.report.sinks
        yield len(set(sinks)) < len(sinks), f"report.sinks={list(sinks)} names one twice"
        yield from self._broken_swarm()
        total = self.reward.structure + self.reward.format + self.reward.correctness
        yield (
            self.reward.preset == "cz" and total == 0,
            "reward.structure, format and correctness are all 0: nothing to learn",
        )

    def _broken_swarm(self):
        s = self.swarm
        host, _, port = s.relay.rpartition(":")
        yield (
            s.relay and not (host and s.relay.isprintable() and re.fullmatch("[0-9]{1,5}", port) and int(port) < 65536),
            f'swarm.relay={s.relay!r} is not HOST:PORT: for example swarm.relay="127.0.0.1:7443"',
        )
        near = host == "localhost" or host == "[::1]" or re.fullmatch(r"127(\.\d{1,3}){3}", host)
        yield (
            s.relay and not (near or s.tls or s.insecure),
            f"swarm.relay={s.relay} is another machine, and without TLS everybody on the way can read along: "
            "swarm.tls=true, or swarm.insecure=true to do without",
        )
        yield s.tls_ca and not s.tls, "swarm.tls_ca is set and swarm.tls is not: set swarm.tls=true"


def load(path=None, overrides=()) -> Config:
    """The configuration in the TOML file `path` (None: the defaults) with `section.key=value` words laid over it.

    Raises ConfigError for an unreadable file, an unknown key (it names the nearest), a wrong type or a broken relation.
    """
    where = str(path) if path is not None else "the defaults"
    data = _read(pathlib.Path(path)) if path is not None else {}
    for word in overrides:
        _lay_over(data, word)
    return from_dict(data, where)


def from_dict(data: dict, where: str = "the configuration") -> Config:
    try:
        return Config.model_validate_json(_json_of(data))
    except ValidationError as e:
        raise ConfigError(*_explain(e, where)) from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: {e}", "a value that no key takes") from None


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to the same value (absent keys are None)."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(v)}" for key, v in values.items() if v is not None]
        lines += [
            f'{key} = "none"' for key, v in values.items() if v is None and (section, key) == ("proposer", "model")
        ]
        lines.append("")
    return "\n".join(lines)


def changed_keys(old: Config, new: Config) -> list[str]:
    """The `section.key` names whose values differ."""
    a, b = old.model_dump(), new.model_dump()
    return [f"{s}.{k}" for s in a for k in a[s] if a[s][k] != b[s][k]]


def _read(path: pathlib.Path) -> dict:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes", "this is not a configuration file")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", "", "cz-jax train configs/cpu.toml") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", "a TOML file is wanted", f"cz-jax train {path}/config.toml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", "a binary file was named as the configuration") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty", "", "start from one of configs/*.toml")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path} is not TOML: {e}", "a missing quote, or a key written twice") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a configuration") from None


def _lay_over(data: dict, word: str):
    name, eq, text = word.partition("=")
    section, dot, key = name.partition(".")
    if not (eq and dot and section and key):
        raise ConfigError(
            f"{word!r} is not a setting", "settings are section.key=value", "optimizer.learning_rate=1e-5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text  # a bare word is a string
    table = data.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{section} is not a section", _nearest(section, Config.model_fields))
    table[key] = value


def _json_of(data):
    import json

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a number that a setting can have")
        if isinstance(value, (str, int, float, bool)) or value is None:
            return value
        raise ValueError(f"a {type(value).__name__} ({value}) where no key takes one")

    return json.dumps(plain(data))


def _explain(error: ValidationError, where: str):
    """(what, why) of the first complaint of pydantic, in our words."""
    first, more = error.errors()[0], error.error_count() - 1
    loc = ".".join(str(p) for p in first["loc"])
    tail = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        *section, key = first["loc"]
        fields = Config.model_fields[section[0]].annotation.model_fields if section else Config.model_fields
        return f"{where}: unknown key {loc}{tail}", _nearest(key, fields, section[0] if section else "")
    if not loc:
        return f"{where}: {first['msg'].removeprefix('Value error, ')}{tail}", ""
    return f"{where}: {loc} = {one_line(repr(first['input']), 80)}: {first['msg'].lower()}{tail}", ""


def _nearest(key, fields, section=""):
    close = difflib.get_close_matches(str(key), list(fields), 1, 0.5)
    prefix = f"{section}." if section else ""
    if close:
        return f"did you mean {prefix}{close[0]}?"
    elsewhere = [f"{s}.{key}" for s, f in Config.model_fields.items() if key in f.annotation.model_fields]
    return f"it belongs to {elsewhere[0]}" if elsewhere else f"known here: {', '.join(fields)}"


def _toml_value(value) -> str:
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
