"""This machine's speed at the three things a round spends its time on, beside its own matmul peak.

FLOPs are counted from shapes: the work that has to be done once every prompt is computed once, not what a program
happens to do; recomputation in the backward pass does not count.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cz_jax import parallel
from cz_jax.build.models import load_model
from cz_jax.build.node import mesh_of, set_compile_cache
from cz_jax.config import Config, GrpoConfig, OptimizerConfig, from_dict
from cz_jax.errors import ConfigError
from cz_jax.grpo.batch import Row, pack
from cz_jax.grpo.loss import LossOptions, denominators
from cz_jax.grpo.optimizer import make_optimizer
from cz_jax.grpo.step import StepOptions, init_state, train_step
from cz_jax.models.spec import Arch
from cz_jax.ports import SamplingMethod
from cz_jax.sampling.engine import Engine

REPEATS = 3
PEAK_SIZES = {"cpu": 2048}
PEAK_SIZE = 8192
NO_STOP = -1  # a stop id that is never sampled


@dataclass(frozen=True)
class Shape:
    """B prompts of P tokens, G answers of C tokens to each."""

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int


class Numbers:
    """A tokenizer for random token ids: nothing ends an answer, and text is not looked at."""

    eos_ids, pad_id = (NO_STOP,), 0

    def decode(self, tokens) -> str:
        return ""


def bench(
    what: str, *, model: str, prompts: int, group: int, prompt_tokens: int, new_tokens: int, dtype: str = "float32",
    mode: str = "direct", say: Callable = lambda *_, **__: None,
) -> dict:  # fmt: skip
    """Times one rollout, one whole optimizer step or one judging of B x G answers.

    rollout: exactly C tokens for each answer. train: one AdamW step on B x G sequences. judge: verdicts on B x G
    answers of C tokens behind B tasks of P tokens, in `mode`. ConfigError where the model's context is too short.
    """
    shape = Shape(prompts, group, prompt_tokens, new_tokens)
    config = from_dict({"solver": {"param_dtype": dtype, "compute_dtype": dtype}})
    set_compile_cache("off")  # compile seconds are part of the result
    mesh = mesh_of(config)
    say("phase", name=f"loading {model}")
    loaded = load_model(model, None, dtype, mesh)
    if prompt_tokens + new_tokens + config.evaluator.reason_tokens > loaded.arch.max_context:
        raise ConfigError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {model}: {loaded.arch.max_context}"
        )
    rng = np.random.default_rng(0)
    rows = prompts * group
    engine = Engine(model, loaded.arch, lambda: loaded.params, Numbers(), mesh, jnp.dtype(dtype), rows)
    runs = {"rollout": _rollout, "train": _train, "judge": _judge}
    work, tokens, flops = runs[what](engine, shape, rng, config, mode)
    say("phase", name="compiling and the first run")
    first = _seconds(work)
    times = []
    for i in range(REPEATS):
        say("phase", name=f"run {i + 1} of {REPEATS}", expected=first)
        times.append(_seconds(work))
    memory = peak_bytes()  # before the matmul peak takes memory of its own
    say("phase", name="measuring the matmul peak")
    peak = matmul_peak(dtype)
    seconds = min(times)
    device = jax.devices()[0]
    return {
        "what": what, "model": model, "dtype": dtype, "prompts": prompts, "group": group,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "mode": mode if what == "judge" else None,
        "seconds": seconds, "tokens_per_second": tokens / seconds, "compile_seconds": max(0.0, first - seconds),
        "peak_bytes": memory, "flops": flops, "matmul_peak_flops_per_second": peak,
        "matmul_peak_share": flops / seconds / peak, "device": f"{len(jax.devices())} x {device.device_kind}",
        "jax": jax.__version__,
    }  # fmt: skip


def _rollout(engine: Engine, s: Shape, rng, config: Config, mode: str):
    prompts = _tokens(rng, engine, s.prompts, s.prompt_tokens)
    seeds = np.arange(s.prompts * s.group, dtype=np.uint64).reshape(s.prompts, s.group).tolist()

    def work():
        for rows in engine.sample(prompts, seeds, s.new_tokens, SamplingMethod()):
            assert all(len(row.tokens) == s.new_tokens for row in rows)

    return work, s.prompts * s.group * s.new_tokens, rollout_flops(engine.arch, s)


def _train(engine: Engine, s: Shape, rng, config: Config, mode: str):
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    g = GrpoConfig()
    options = StepOptions(engine.arch, LossOptions(), optimizer, config.solver.compute_dtype, g.remat, g.logprob_chunk)
    completions = [_tokens(rng, engine, s.group, s.new_tokens) for _ in range(s.prompts)]
    rows = [
        Row(p, c, rng.normal(size=s.group).tolist(), np.full((s.group, s.new_tokens), -10.0).tolist())
        for p, c in zip(_tokens(rng, engine, s.prompts, s.prompt_tokens), completions, strict=True)
    ]
    over = denominators(np.full((s.prompts, s.group), s.new_tokens), s.new_tokens)
    ways = parallel.batch_devices(engine.mesh)
    with jax.set_mesh(engine.mesh):
        params = engine.params()  # which the first step takes over, as a run's does
        state = [init_state(params, optimizer, jax.tree.map(lambda a: a.sharding, params))]
        batch = jax.tree.map(lambda a: parallel.place_batch(engine.mesh, a, 1), pack(rows, g.micro_batch_tokens, ways))

    def work():
        with jax.set_mesh(engine.mesh):
            state[0], metrics = train_step(options, state[0], {}, batch, over)
            assert metrics["finite"] == 1

    sequences = s.prompts * s.group
    return work, sequences * (s.prompt_tokens + s.new_tokens), train_flops(engine.arch, s)


def _judge(engine: Engine, s: Shape, rng, config: Config, mode: str):
    tasks = _tokens(rng, engine, s.prompts, s.prompt_tokens)
    prompts = [[[*task, *answer] for answer in _tokens(rng, engine, s.group, s.new_tokens)] for task in tasks]
    flat = [row for rows in prompts for row in rows]
    new = {"direct": 0, "reason": config.evaluator.reason_tokens, "generate": config.evaluator.generate_tokens}[mode]

    def work():
        asked = prompts
        if new:
            samples = engine.sample(flat, [[0]] * len(flat), new, SamplingMethod(temperature=0.0))
            assert all(len(rows[0].tokens) == new for rows in samples)
            thoughts = iter(samples)
            asked = [[[*row, *next(thoughts)[0].tokens] for row in rows] for rows in prompts]
        if mode != "generate":
            engine.choice_probabilities(asked, (1, 2))

    flops = forward_flops(engine.arch, s.prompt_tokens, 0, read=0) * s.prompts
    flops += forward_flops(engine.arch, s.new_tokens, s.prompt_tokens, read=1) * s.prompts * s.group
    flops += forward_flops(engine.arch, new, s.prompt_tokens + s.new_tokens) * s.prompts * s.group
    flops += head_flops(engine.arch) * s.prompts * s.group * max(1, new)
    return work, s.prompts * s.group * (s.prompt_tokens + s.new_tokens), flops


def forward_flops(arch: Arch, tokens: int, before: int, read: int | None = None) -> int:
    """FLOPs of `tokens` tokens behind `before` others through all layers: matmuls and causal attention. Where only the
    final hidden states of the last `read` tokens are asked for, the last layer gives keys and values of the others."""
    d, h = arch.hidden_size, arch.head_dim
    beside, keys_values = 2 * (2 * d * h * arch.heads + 3 * d * arch.ffn_size), 4 * d * h * arch.kv_heads

    def layer(tokens: int) -> float:  # beside keys and values
        return tokens * (beside + 4 * arch.heads * h * (before + (tokens + 1) / 2))

    unread = 0 if read is None else tokens - read
    return int(arch.layers * (layer(tokens) + tokens * keys_values) - layer(unread))


def head_flops(arch: Arch) -> int:
    return 2 * arch.hidden_size * arch.vocab_size


def rollout_flops(arch: Arch, s: Shape) -> int:
    answers = s.prompts * s.group
    return (
        s.prompts * forward_flops(arch, s.prompt_tokens, 0, read=1)
        + answers * forward_flops(arch, s.new_tokens - 1, s.prompt_tokens)
        + answers * s.new_tokens * head_flops(arch)
    )


def train_flops(arch: Arch, s: Shape) -> int:
    """Forward and backward: three times the forward pass over each prompt once and each answer."""
    answers = s.prompts * s.group
    forward = s.prompts * forward_flops(arch, s.prompt_tokens, 0) + answers * (
        forward_flops(arch, s.new_tokens, s.prompt_tokens) + s.new_tokens * head_flops(arch)
    )
    return 3 * forward


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matrix product of random numbers on one device, the best of several."""
    n = PEAK_SIZES.get(jax.default_backend(), PEAK_SIZE)
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)

    def many():
        x = a
        for _ in range(4):
            x = multiply(x, a)
        x.block_until_ready()

    many()
    return 4 * 2 * n**3 / min(_seconds(many) for _ in range(5)) * len(jax.devices())


def peak_bytes() -> int:
    """Peak memory of the fullest local device where it tells; on a CPU of this process."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tokens(rng, engine: Engine, rows: int, length: int) -> list[list[int]]:
    return rng.integers(3, engine.arch.vocab_size, (rows, length)).tolist()


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
