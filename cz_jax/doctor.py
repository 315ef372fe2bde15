"""What this machine can do, in words that can be pasted anywhere.

Left out on purpose: tokens, host name, user name, environment variables that are not named here. The home folder is
shown as `~` and the user's name in any other path as `<user>`. No other program is started.
"""

import os
import pathlib
import platform
import re
import shutil
from importlib import metadata

from cz_jax.errors import one_line

PACKAGES = (
    "cz-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "transformers", "tokenizers",
    "datasets", "numpy", "grpcio", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip
SHOWN_VARIABLES = (
    "JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE", "GLIBC_TUNABLES",
)  # fmt: skip
ATTENTION = {
    "plain": "plain: jax.numpy, compiled by XLA",
    "splash": "splash: the TPU kernel that comes with JAX",
    "cudnn": "cudnn: the fused attention of NVIDIA's cuDNN",
}
GOOGLE_PCI_VENDOR = "0x1ae0"


def examine(config=None) -> dict:
    """Everything `cz-jax doctor` prints. "problems" holds a sentence for each thing that would make a run fail or use
    less than the machine has; empty is healthy. `config`: a Config to hold against the devices."""
    hardware = accelerators()
    holder = tpu_holder() if any(sign.startswith("tpu") for sign in hardware) else None
    if holder is None:
        devices, trouble = _devices()
    else:  # JAX would wait for it without a word
        devices = []
        trouble = f"{holder} holds the TPU, which belongs to one process at a time: end it, or wait for it"
    problems = [trouble] if trouble else []
    fallback = None if trouble else silent_fallback(hardware, {d["platform"] for d in devices}, dict(os.environ))
    problems += [fallback] if fallback else []
    if config is not None and not trouble:
        problems += _against(config)
    attention, missing = _attention(config, devices[0]["platform"]) if devices else (None, [])
    problems += missing
    report = {
        "ok": not problems,
        "versions": {"python": platform.python_version(), **_versions()},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": _cores(),
        "ram_bytes": _ram_bytes(),
        "devices": devices,
        "accelerators_found": hardware,
        "attention": attention,
        "compile_cache": _compile_cache(config),
        "hugging_face_cache": _hub_cache(),
        "variables": {name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ},
        "problems": problems,
    }
    return redact(report)


def accelerators(root: pathlib.Path = pathlib.Path("/")) -> list[str]:
    """Signs of accelerators under `root`, without asking JAX: "nvidia: ..." and "tpu: ..."."""
    found = []
    if shutil.which("nvidia-smi"):
        found.append("nvidia: nvidia-smi")
    found += [f"nvidia: {p.name}" for p in sorted((root / "dev").glob("nvidia[0-9]*"))]
    found += [f"tpu: {p.name}" for p in sorted((root / "dev").glob("accel[0-9]*"))]
    if _has_google_pci(root):  # /dev/vfio alone may belong to any device that is passed through
        found += [f"tpu: vfio/{p.name}" for p in sorted((root / "dev/vfio").glob("[0-9]*"))]
    return found


def tpu_holder(root: pathlib.Path = pathlib.Path("/")) -> str | None:
    """ "process N (its command line)" of another process under `root` that has a TPU's device open; None where there is
    none, or where whose it is may not be seen."""
    devices = re.compile(r"/dev/(accel\d+|vfio/\d+)")
    for process in sorted((root / "proc").glob("[0-9]*")):
        try:
            if int(process.name) == os.getpid():
                continue
            if any(devices.fullmatch(os.readlink(entry)) for entry in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                return f"process {process.name} ({one_line(words.strip(), 80)})"
        except OSError:
            continue
    return None


def silent_fallback(hardware: list[str], platforms: set[str], environment: dict[str, str]) -> str | None:
    """The sentence for an accelerator that JAX leaves unused on the CPU's account; None where that was asked for."""
    if platforms != {"cpu"} or environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return None
    kinds = {sign.partition(":")[0] for sign in hardware}
    if "nvidia" in kinds and environment.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        versions = _versions()
        if "jax-cuda12-plugin" in versions or "jax-cuda13-plugin" in versions:
            fix = "the CUDA plugin is installed but did not start: JAX_PLATFORMS=cuda cz-jax doctor says why"
        else:
            fix = 'pip install -e ".[cuda13]" (or ".[cuda12]", as the driver allows)'
        return (
            f"an NVIDIA GPU is here ({hardware[0]}) and JAX uses only the CPU: {fix}; JAX_PLATFORMS=cpu if you mean it"
        )
    if "tpu" in kinds:
        fix = 'pip install -e ".[tpu]", and no other process may hold the TPU'
        return f"a TPU is here ({hardware[-1]}) and JAX uses only the CPU: {fix}; JAX_PLATFORMS=cpu if you mean it"
    return None


def compile_cache_folder(setting: str) -> pathlib.Path | None:
    """The folder that run.compile_cache stands for: "auto" is one per user, "off" (or a user without a home) None."""
    if setting == "off":
        return None
    try:
        if setting != "auto":
            return pathlib.Path(setting).expanduser()
        named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        return pathlib.Path(named) if named else _cache_home() / "cz-jax" / "xla"
    except RuntimeError:
        return None


def redact(value):
    """`value` with the home folder as `~` and the user's name in any path as `<user>`, all the way down."""
    if isinstance(value, dict):
        return {k: redact(v) for k, v in value.items()}
    if isinstance(value, list):
        return [redact(v) for v in value]
    if not isinstance(value, str):
        return value
    for home in sorted(_homes(), key=len, reverse=True):
        value = re.sub(re.escape(home) + r"(?=/|$|[^\w.-])", "~", value)
    for user in _users():
        value = re.sub(rf"(?<=/){re.escape(user)}(?=/|$|[^\w.-])", "<user>", value)
    return value


def _devices() -> tuple[list[dict], str | None]:
    """(platform, kind, usable memory in bytes or None) of each device, or why there is none."""
    import jax

    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as e:  # what JAX raises where no backend, or not the one asked for, starts
        asked = os.environ.get("JAX_PLATFORMS")
        why = one_line(str(e), 300) or "the backend did not start, or its plugin is not installed"
        return [], f"JAX finds no device{f' with JAX_PLATFORMS={asked}' if asked else ''}: {why}"
    return [{"platform": d.platform, "kind": d.device_kind, "memory_bytes": _memory(d)} for d in devices], None


def _memory(device) -> int | None:
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("bytes_limit")


def _against(config) -> list[str]:
    """What of `config` this machine cannot do."""
    from cz_jax.errors import ConfigError
    from cz_jax.parallel import make_mesh

    problems = []
    try:
        make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ConfigError as e:
        problems.append(str(e))
    folder = compile_cache_folder(config.run.compile_cache)
    if folder is not None and not os.access(_existing(folder), os.W_OK):
        problems.append(f"the compile cache {folder} cannot be written: set run.compile_cache to another folder or off")
    return problems


def _attention(config, platform: str) -> tuple[str | None, list[str]]:
    """(what computes the attention of prompts and answers, a sentence where `config` asks for a kernel that this
    platform does not have)."""
    from cz_jax.errors import ConfigError
    from cz_jax.models.attention import implementation

    try:
        return ATTENTION[implementation(config.run.attention if config is not None else "auto", platform)], []
    except ConfigError as e:
        return None, [str(e)]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _has_google_pci(root: pathlib.Path) -> bool:
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == GOOGLE_PCI_VENDOR:
                return True
        except OSError:
            continue
    return False


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_bytes() -> int | None:
    """Memory of the machine, or of the container where that is less."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _compile_cache(config) -> str:
    folder = compile_cache_folder(config.run.compile_cache if config is not None else "auto")
    return "off" if folder is None else f"{folder}{'' if folder.is_dir() else ' (not yet there)'}"


def _hub_cache() -> str:
    """Where the Hugging Face libraries keep what they download."""
    try:
        home = pathlib.Path(os.environ.get("HF_HOME") or _cache_home() / "huggingface")
        folder = pathlib.Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    except RuntimeError:
        return "no home folder: set HF_HOME"
    return f"{folder}{'' if folder.is_dir() else ' (not yet there)'}"


def _cache_home() -> pathlib.Path:
    """XDG's cache folder. RuntimeError for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache"


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """`folder`, or the nearest of its parents that is there."""
    return next((p for p in (folder, *folder.absolute().parents) if p.exists()), pathlib.Path("/"))


def _homes() -> set[str]:
    """Spellings of the home folder; never the root of all folders."""
    homes = {os.environ.get("HOME", ""), os.path.expanduser("~")}
    homes |= {os.path.realpath(h) for h in homes if h.startswith("/")}
    return {h.rstrip("/") for h in homes if h.startswith("/") and h.rstrip("/")}


def _users() -> set[str]:
    named = {os.environ.get(n, "") for n in ("USER", "LOGNAME")} | {os.path.basename(h) for h in _homes()}
    return {n for n in named if n}
