"""The machines that `cz-jax plan` knows: what one device holds and does, and how a TPU slice is named to libtpu.

Memory is what a program can use: of a TPU what its compiler says, of a GPU and of a host 92% of the nominal size (the
rest is for the driver, fragments and, on a host, everything else). Peaks are the makers' dense bfloat16 figures.
"""

from dataclasses import dataclass, field

from cz_jax.errors import ConfigError

GIB = 1 << 30
SHARE = 0.92  # of a GPU's or a host's memory; what run.gpu_memory is set to


@dataclass(frozen=True)
class Chip:
    name: str
    bytes: int  # usable, of one device
    flops: float  # bfloat16, a second
    bandwidth: float  # bytes a second


@dataclass(frozen=True)
class Target:
    """One machine or slice. `layout`, `options`: how libtpu is told of it; `accelerator`: its TPU_ACCELERATOR_TYPE."""

    name: str
    platform: str  # "tpu", "gpu" or "cpu"
    chip: Chip
    devices: int = 1
    hosts: int = 1
    layout: str = ""
    accelerator: str = ""
    options: dict = field(default_factory=dict)


V4 = Chip("TPU v4", int(30.75 * GIB), 275e12, 1.228e12)
V5E = Chip("TPU v5e", int(15.75 * GIB), 197e12, 0.819e12)
V5P = Chip("TPU v5p", int(95.74 * GIB), 459e12, 2.765e12)
V6E = Chip("TPU v6e", int(31.25 * GIB), 918e12, 1.64e12)
GPU_24 = Chip("24 GB GPU (an NVIDIA A10G)", int(24e9 * SHARE), 70e12, 0.6e12)
GPU_80 = Chip("80 GB GPU (an NVIDIA A100)", int(80e9 * SHARE), 312e12, 2.039e12)
HOST_16 = Chip("16 GB host (8 cores)", int(16e9 * SHARE), 0.4e12, 0.04e12)


def _slice(name, chip, devices, layout, accelerator="", hosts=1, **options) -> Target:
    return Target(name, "tpu", chip, devices, hosts, layout, accelerator or name, options)


_ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}

TARGETS = {
    t.name: t
    for t in (
        _slice("v4-8", V4, 4, "v4:2x2x1", chip_config_name="megacore"),
        _slice("v4-16", V4, 8, "v4:2x2x2", hosts=2, chip_config_name="megacore"),
        _slice("v5e-1", V5E, 1, "v5e:1x1", "v5litepod-1", **_ONE_CHIP),
        _slice("v5e-4", V5E, 4, "v5e:2x2", "v5litepod-4"),
        _slice("v5e-8", V5E, 8, "v5e:2x4", "v5litepod-8"),
        _slice("v5e-16", V5E, 16, "v5e:4x4", "v5litepod-16", hosts=4),
        _slice("v5e-32", V5E, 32, "v5e:4x8", "v5litepod-32", hosts=8),
        _slice("v5p-8", V5P, 4, "v5p:2x2x1"),
        _slice("v5p-16", V5P, 8, "v5p:2x2x2", hosts=2),
        _slice("v6e-1", V6E, 1, "v6e:1x1", **_ONE_CHIP),
        _slice("v6e-4", V6E, 4, "v6e:2x2"),
        _slice("v6e-8", V6E, 8, "v6e:2x4"),
        _slice("v6e-16", V6E, 16, "v6e:4x4", hosts=4),
        _slice("v6e-32", V6E, 32, "v6e:4x8", hosts=8),
        Target("gpu-24gb", "gpu", GPU_24),
        Target("gpu-80gb", "gpu", GPU_80),
        Target("cpu-16gb", "cpu", HOST_16),
    )
}


def target_of(topology: str) -> Target:
    """The target of that name; ConfigError with the known ones."""
    if topology not in TARGETS:
        raise ConfigError(
            f"--topology {topology} is not known",
            f"known are {', '.join(TARGETS)}",
            "cz-jax plan CONFIG.toml --topology v5e-8",
        )
    return TARGETS[topology]


def larger(target: Target) -> list[Target]:
    """The targets of the same chip with more devices, and for a GPU those with more memory, smallest first."""
    same = [t for t in TARGETS.values() if t.platform == target.platform]
    same = [t for t in same if t.chip == target.chip or target.platform == "gpu"]
    size = target.devices * target.chip.bytes
    return sorted((t for t in same if t.devices * t.chip.bytes > size), key=lambda t: t.devices * t.chip.bytes)
