"""FLOPs of a round and the bytes it reads, counted from shapes, and its time by roofline.

The FLOPs are those of `bench`: the work that has to be done once every prompt is computed once. A compiler's own count
takes a scanned layer once, whatever its length, so it is not used.
"""

from dataclasses import dataclass

from cz_jax.bench import forward_flops, head_flops
from cz_jax.config import Config
from cz_jax.plan.memory import SIZE, Shape
from cz_jax.plan.targets import Target
from cz_jax.plan.work import Seat, Work

MFU = 0.4  # share of the peak that large matrix products reach
BANDWIDTH_SHARE = 0.7  # share of the memory bandwidth that a step of decoding reaches
FLOAT32_SHARE = 0.5  # of the bfloat16 peak
ASSUMPTION = (
    f"one round with every prompt and answer at its limit; {MFU:.0%} of the bfloat16 peak (float32: "
    f"{FLOAT32_SHARE:.0%} of that), {BANDWIDTH_SHARE:.0%} of the memory bandwidth while decoding; no compilation, no "
    "waiting for other chips"
)


@dataclass(frozen=True)
class Cost:
    """FLOPs of a phase over all devices; `dense` run as large products, the others in `steps` of one token."""

    flops: int
    dense: float = 0.0  # with what is computed twice
    steps: int = 0
    step_bytes: float = 0.0  # read by each device at each step
    step_flops: float = 0.0  # over all devices at each step
    dense_bytes: float = 0.0  # of weights that each device reads for the large products
    compute: str = "bfloat16"

    @property
    def bytes(self) -> int:
        """Read by each device, of weights and caches: no program reads less."""
        return int(self.dense_bytes + self.steps * self.step_bytes)


def sampling_cost(seat: Seat, prompts: int, group: int, tp: int, c: int, at_once: int, mesh: Shape) -> Cost:
    """`prompts` x `group` answers of `c` tokens behind prompts of `tp`, those of `at_once` prompts side by side."""
    a, rows = seat.arch, prompts * group
    prefill = prompts * (forward_flops(a, tp, 0, read=1) + head_flops(a))
    decode = rows * (forward_flops(a, max(0, c - 1), tp) + max(0, c - 1) * head_flops(a))
    calls = -(-prompts // max(1, at_once))
    steps = calls * max(1, c - 1)
    size = SIZE[seat.compute]
    weights = _weights(seat, mesh)
    held = min(group, 2) if prompts > at_once else 1  # times the prompts that fill the slots are read by queued rows
    positions = min(prompts, at_once) * (held * tp + group * c / 2) / mesh.ways
    cache = 2 * a.layers * positions * a.kv_heads * a.head_dim * size / mesh.shape["tensor"]
    return Cost(prefill + decode, prefill, steps, weights + cache, decode / steps, calls * weights, seat.compute)


def costs(config: Config, work: Work, mesh: Shape) -> dict[str, Cost]:
    """The cost of each phase of one training round."""
    r, s = config.round, config.sampling
    tp, c, g = s.max_prompt_tokens, s.max_new_tokens, r.group_size
    at_once = max(1, s.max_sequences // g)
    phases = {"rollout": sampling_cost(work.solver, work.own, g, tp, c, at_once, mesh)}
    if work.proposing is not None:
        p = work.proposing
        wanted = r.proposed_tasks
        phases["propose"] = sampling_cost(work.proposer, wanted, 1, p.prompt_tokens, p.tokens, wanted, mesh)
    judge, judged = work.evaluator.arch, work.judged_groups * g
    extra = work.reasoning.tokens if work.reasoning is not None else 0
    behind = c + extra
    if work.judging is not None:
        flops = work.judged_groups * forward_flops(judge, tp, 0, read=0)
        flops += judged * (forward_flops(judge, behind, tp, read=1) + head_flops(judge))
        calls = -(-work.judged_groups // work.judging.prompts)
        phases["judge"] = Cost(
            flops, flops, dense_bytes=calls * _weights(work.evaluator, mesh), compute=work.evaluator.compute
        )
    if work.reasoning is not None:
        phases["reason"] = sampling_cost(work.evaluator, judged, 1, tp + c, extra, s.max_sequences, mesh)
    forward = work.groups * forward_flops(work.solver.arch, tp, 0)
    forward += work.groups * g * (forward_flops(work.solver.arch, c, tp) + c * head_flops(work.solver.arch))
    backward = 1 if config.lora.rank else 2  # frozen weights take no gradient
    passes = (1 + backward) * config.grpo.updates + (config.grpo.updates > 1) + (config.grpo.kl > 0)
    again = config.grpo.updates if config.grpo.remat == "layer" else 0  # computed twice, counted once
    phases["update"] = Cost(
        passes * forward, (passes + again) * forward,
        dense_bytes=(passes + again) * work.micro_batches * _weights(work.solver, mesh), compute=work.solver.compute,
    )  # fmt: skip
    return phases


def _weights(seat: Seat, mesh: Shape) -> float:
    """Bytes of all weights as a device reads them."""
    return seat.arch.parameters * SIZE[seat.compute] / mesh.shape["tensor"]


def seconds(cost: Cost, target: Target) -> float:
    """The phase's time on the target: products at the peak's share, then each step at the slower of memory and
    arithmetic."""
    peak = target.devices * target.chip.flops * MFU * (1.0 if cost.compute == "bfloat16" else FLOAT32_SHARE)
    step = max(cost.step_bytes / (target.chip.bandwidth * BANDWIDTH_SHARE), cost.step_flops / peak)
    return cost.dense / peak + cost.steps * step
