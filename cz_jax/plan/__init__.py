"""Whether a configuration fits a machine that is not there: memory by kind, FLOPs and time, before a weight is loaded.

`plan` counts from shapes; for a TPU slice it also compiles the round's programs with libtpu and takes the compiler's
word. JAX reads its environment when it starts, so this module imports it late.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator

from cz_jax.config import Config
from cz_jax.errors import ConfigError, one_line
from cz_jax.plan.targets import TARGETS, Target, target_of

__all__ = ["TARGETS", "plan"]


def plan(config: Config, topology: str, compiled: bool = True, say: Callable = lambda *_, **__: None) -> dict:
    """`config` on `topology` (a name of TARGETS), one training round with every prompt and answer at its limit.

    "fits"; "bytes_per_device" (parameters, optimizer, evaluator, proposer, starting_weights, kv_cache, temporaries,
    total) of the fullest device against "hbm_bytes"; "flops" and "seconds_estimate" of a round with the "assumption"
    behind the estimate; "bytes_by_phase" beside what stays; "flops_by_phase" over all devices; "bytes_read_by_phase",
    of weights and caches by each device; "counted_by"; and "advice" where it does not fit.
    `compiled` False counts from shapes alone; GPUs always are. ConfigError, ModelFolderError for what cannot be laid
    out, and where libtpu is missing.
    """
    target = target_of(topology)
    with_compiler = compiled and target.platform != "gpu"
    if with_compiler and target.platform == "tpu":
        _require_libtpu(topology)
    if "jax" not in sys.modules:
        os.environ.update(_environment(target))
    elif with_compiler and target.platform == "tpu":
        return _in_child(config, target)
    return _plan(config, target, with_compiler, say)


def _environment(target: Target) -> dict[str, str]:
    """What lets libtpu compile on a machine without a TPU, several processes at a time."""
    found = {"JAX_PLATFORMS": "cpu"}
    if target.platform == "tpu":
        found |= {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": target.accelerator, "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
            "TPU_LOG_DIR": "disabled",
        }  # fmt: skip
    return found


def _require_libtpu(topology: str) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"libtpu, which compiles for {topology}, is not installed",
            "it is an extra of 200 MB",
            "pip install 'cz-jax[plan]', or --count, which counts from shapes without compiling",
        )


def _in_child(config: Config, target: Target) -> dict:
    """The same in a process whose JAX starts with the environment that libtpu needs."""
    with _variables(_environment(target)):
        pool = multiprocessing.get_context("spawn").Pool(1)
        try:
            return pool.apply(_plan, (config, target, True))
        finally:
            pool.close()  # not terminated: libtpu answers a signal with a stack trace
            pool.join()


@contextlib.contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _plan(config: Config, target: Target, with_compiler: bool, say: Callable = lambda *_, **__: None) -> dict:
    from cz_jax.plan import memory, roofline
    from cz_jax.plan.count import count, nearest_fit

    say("phase", name=f"counting for {target.name}")
    counted = count(config, target)
    phases, programs, by = dict(counted.phases), {}, "shapes"
    scale: dict[str, float] = {}
    if with_compiler:
        from cz_jax.plan.programs import compile_all

        programs = compile_all(config, counted.work, target, say)
        given = memory.arguments(config, counted.work, counted.mesh)
        for name, program in programs.items():
            if program.working is not None:
                phases[name] = program.working
            elif program.required is not None:
                phases[name] = max(0, program.required - given[name])
            else:
                phases[name] = max(phases[name], target.chip.bytes)
        scale = {name: phases[name] / max(1, size) for name, size in counted.phases.items()}
        by = _compiler(target)
    table = memory.by_kind(counted.kinds, phases, counted.kv_cache)
    costs = roofline.costs(config, counted.work, counted.mesh)
    times = {name: roofline.seconds(cost, target) for name, cost in costs.items()}
    fits = table["total"] <= target.chip.bytes
    if not fits:
        say("phase", name="looking for a change that fits")
    return {
        "topology": target.name, "chip": target.chip.name, "devices": target.devices, "hosts": target.hosts,
        "mesh": dict(counted.mesh.shape), "fits": fits, "bytes_per_device": table, "hbm_bytes": target.chip.bytes,
        "bytes_by_phase": phases, "flops": sum(c.flops for c in costs.values()),
        "flops_by_phase": {name: cost.flops for name, cost in costs.items()},
        "bytes_read_by_phase": {name: cost.bytes for name, cost in costs.items()},
        "seconds_estimate": sum(times.values()), "seconds_by_phase": times, "assumption": roofline.ASSUMPTION,
        "counted_by": by, "compile_seconds": {name: round(p.seconds, 1) for name, p in programs.items()},
        "advice": None if fits else nearest_fit(config, target, scale),
    }  # fmt: skip


def _compiler(target: Target) -> str:
    from importlib.metadata import version

    name = "libtpu" if target.platform == "tpu" else "jaxlib"
    return one_line(f"{name} {version(name)}")
