"""Trackers beside metrics.jsonl: TensorBoard event files, Weights & Biases, Trackio.

Only those that `report.sinks` names, each imported when it is named, none of them ever asking a question. They get
copies: what a tracker cannot take is no reason to end a run.
"""

import importlib
import math
import os
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cz_jax.errors import ConfigError, one_line

PROJECT = "cz-jax"
CLOSE_SECONDS = 30.0
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # sink -> what pip installs


class Sink(Protocol):
    """Where the numbers of a round go."""

    def write(self, number: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def flatten(metrics: Mapping, prefix: str = "") -> dict[str, float]:
    """{"a/b": number} of nested metrics; what is no finite number is left out."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            flat[name] = float(value)
    return flat


class TensorBoard:
    """Event files in <run>/tensorboard; a resumed run hides what its earlier files hold after `played`."""

    def __init__(self, module, folder: pathlib.Path, config: dict, played: int):
        self._writer = module.SummaryWriter(
            logdir=str(folder / "tensorboard"), purge_step=played + 1, filename_suffix=f".{played}"
        )

    def write(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of project cz-jax. It goes online only where WANDB_API_KEY is set, since wandb would ask for one."""

    def __init__(self, module, folder: pathlib.Path, config: dict, played: int):
        online = os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE", "online") == "online"
        mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "online" if online else "offline"
        self._run = module.init(project=PROJECT, name=folder.name, dir=str(folder), config=config, mode=mode)

    def write(self, number: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=number)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of project cz-jax in Trackio's local store."""

    def __init__(self, module, folder: pathlib.Path, config: dict, played: int):
        self._module = module
        module.init(project=PROJECT, name=folder.name, config=config, resume="allow")

    def write(self, number: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=number)

    def close(self) -> None:
        self._module.finish()


KINDS: dict[str, Callable[..., Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def load_sinks(names: Sequence[str]) -> dict[str, object]:
    """The modules behind report.sinks. ConfigError for one that is not installed."""
    return {name: _module(name) for name in names}


def _module(name: str):
    try:
        if name == "tensorboard":
            return importlib.import_module("tensorboardX")
        return importlib.import_module("wandb") if name == "wandb" else importlib.import_module("trackio")
    except ImportError as e:
        raise ConfigError(
            f"report.sinks names {name}, and {PACKAGES[name]} cannot be imported: {e}",
            "it is an optional package",
            f"pip install {PACKAGES[name]}",
        ) from None


class Sinks:
    """The open trackers of one run; `say` hears of one that breaks, and the run goes on without it."""

    def __init__(self, modules: Mapping[str, object], folder, config: dict, played: int, say: Callable):
        self._say, self._open = say, {}
        folder = pathlib.Path(folder).resolve()
        for name, module in modules.items():
            self._guard(name, lambda name=name, module=module: self._begin(name, module, folder, config, played))

    def write(self, number: int, metrics: Mapping) -> None:
        values = flatten(metrics)
        for name, sink in list(self._open.items()):
            self._guard(name, lambda sink=sink: sink.write(number, values))

    def close(self, deadline: float = CLOSE_SECONDS) -> None:
        """Ends every tracker, waiting at most `deadline` seconds for each to hand over what it still holds."""
        for name, sink in list(self._open.items()):
            closing = threading.Thread(target=self._guard, args=(name, sink.close), name=f"close {name}", daemon=True)
            closing.start()
            closing.join(deadline)
            if closing.is_alive():
                self._say("note", text=f"report.sinks: {name} did not end within {deadline:g} s and is left to itself")
        self._open.clear()

    def _begin(self, name: str, module, folder: pathlib.Path, config: dict, played: int) -> None:
        self._open[name] = KINDS[name](module, folder, config, played)

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as e:  # somebody else's code, network and disk; metrics.jsonl holds the same numbers
            self._open.pop(name, None)
            self._say("note", text=f"report.sinks: {name} is left out from here on: {one_line(repr(e), 200)}")
