"""What the terminal sees: results on stdout, progress on stderr."""

import contextlib
import dataclasses
import json
import math
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cz_jax.nouns import to_json

SILENCE_SECONDS = 5.0  # after which a plain terminal is told what is going on
LONG_SILENCE_SECONDS = 30.0  # and how often, once a phase has lasted a minute

_ROUND_FIELDS = (("level", "level"), ("success", "success"), ("tokens_per_second", "tok/s"), ("seconds", "s"))


class Progress:
    """What a running command says: `say(event, **fields)`, as a context manager.

    Events: "phase" (name, "" for none; expected: seconds), "round" (number, of, metrics), "evaluated" (when, n_tasks,
    average_at_k, pass_at_k), "note" (text), "done" (summary); another event is printed as it comes. Plain lines, or on
    a terminal that can, a live status line under them. Thread-safe.
    """

    def __init__(self, stream=None, live: bool | None = None, now=time.monotonic):
        self._stream = stream if stream is not None else sys.stderr
        self._now, self._begun, self._spoken = now, now(), now()
        self._phase, self._phase_begun, self._expected = "", now(), None
        self._rounds_seen = False
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._live = self._status() if (can_animate(self._stream) if live is None else live) else None

    def __enter__(self):
        if self._live is not None:
            self._live.start()
        threading.Thread(target=self._watch, name="progress", daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._ended.set()
        with self._lock:
            if self._live is not None:
                self._live.stop()

    def __call__(self, event: str, **fields) -> None:
        with self._lock:
            if event == "phase":
                self._begin(str(fields.pop("name", "")), fields.pop("expected", None))
            elif event == "round":
                self._rounds_seen = True
                self._print(round_line(fields.get("number"), fields.get("of"), fields.get("metrics") or {}))
                self._phase = ""
            elif event == "evaluated":
                self._print(evaluation_line(fields))
            elif event == "note":
                self._print(str(fields.get("text", "")))
            elif event == "done":
                self._phase = ""
                self._print(f"done in {duration(self._now() - self._begun)}")
            else:
                self._print(" ".join([event, *(f"{k}={brief(v)}" for k, v in fields.items())]))

    def tick(self) -> None:
        """Break a silence, or bring the live line up to date. Called by an own thread about twice a second."""
        with self._lock:
            if not self._phase:
                return
            lasted = self._now() - self._phase_begun
            if self._live is not None:
                self._live.update(self._phase_text(lasted))
            elif self._now() - self._spoken >= (SILENCE_SECONDS if lasted < 60 else LONG_SILENCE_SECONDS):
                self._print(self._phase_text(lasted))

    def _begin(self, name: str, expected) -> None:
        self._phase, self._phase_begun, self._expected = name, self._now(), expected
        if self._live is not None:
            self._live.update(self._phase_text(0))
        elif (
            name and not self._rounds_seen
        ):  # the phases of later rounds come every few seconds: only their silences are broken
            about = f" (about {duration(expected)})" if expected else ""
            self._print(f"{name}{about} ...")

    def _phase_text(self, lasted: float) -> str:
        about = f", about {duration(self._expected)} expected" if self._expected else ""
        return f"{self._phase}: {duration(lasted)} so far{about}"

    def _print(self, text: str) -> None:
        self._spoken = self._now()
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _status(self):
        from rich.console import Console
        from rich.status import Status

        return Status("", console=Console(file=self._stream))

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            try:
                self.tick()
            except (BrokenPipeError, ValueError):  # the reader left: the command's own next line will notice
                return


@contextlib.contextmanager
def progress(kind: type[Progress] = Progress) -> Iterator[Progress]:
    """A Progress on stderr; until it ends, whatever a library prints to stdout goes to stderr too."""
    with contextlib.redirect_stdout(sys.stderr), kind() as say:
        yield say


def can_animate(stream) -> bool:
    """Whether `stream` is a terminal that can rewrite a line."""
    return bool(getattr(stream, "isatty", bool)()) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def result(value: dict, as_json: bool) -> None:
    """The result of a command on stdout: one JSON object on one line, or aligned `name  value` lines, where a list of
    commands under "next" comes last, a line each. A number that is not finite is null."""
    plain = plain_json(value)
    if as_json:
        return write_stdout(json.dumps(plain, allow_nan=False) + "\n")
    following = plain.pop("next", None) or []
    rows = list(_rows(plain))
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["", "Next:", *(f"  {command}" for command in following)] if following else []
    write_stdout("\n".join(lines) + "\n")


def write_stdout(text: str) -> None:
    """`text` on stdout. A reader that left early (`| head`) is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)


def complain(text: str) -> None:
    """One line `cz-jax: text` on stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(f"cz-jax: {text}", file=sys.stderr, flush=True)


def drop(stream) -> None:
    """Send what is left in a broken stream to nowhere, so that closing it at exit is quiet."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def reader_left(stream) -> bool:
    """Whether `stream` is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def plain_json(value):
    """`value` (nouns, paths, NumPy scalars, nested) as JSON types; NaN and infinities become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_json(value)
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (str, bytes)) and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def round_line(number, of, metrics: dict) -> str:
    """One round on one line: reward and its parts, level, success, speed, seconds, each where the metrics have it."""
    parts = [f"round {number}/{of}" if of else f"round {number}"]
    if "reward" in metrics:
        named = {k.removeprefix("reward_"): v for k, v in metrics.items() if k.startswith("reward_")}
        inner = " ".join(f"{k} {brief(v)}" for k, v in named.items())
        parts.append(f"reward {brief(metrics['reward'])}" + (f" ({inner})" if inner else ""))
    for key, label in _ROUND_FIELDS:
        if key in metrics:
            value = brief(metrics[key])
            parts.append(f"{value} {label}" if label in ("tok/s", "s") else f"{label} {value}")
    return "  ".join(parts)


def evaluation_line(fields: dict) -> str:
    """average@k and pass@k of one evaluation on one line, with their intervals."""
    said = [f"{fields['when']} ({fields['n_tasks']} held-out tasks):"]
    for key, label in (("average_at_k", "average"), ("pass_at_k", "pass")):
        if fields.get(key):
            e = fields[key]
            said.append(f"{label}@{e['k']} {e['value']:.1%} ({e['low']:.1%} to {e['high']:.1%})")
    return "  ".join(said)


def brief(value) -> str:
    """`value` in few characters: three significant digits, whole numbers whole."""
    if callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _rows(value: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _rows(item, f"{prefix}{key}.")
        elif isinstance(item, list) and any(isinstance(v, dict) for v in item):
            yield from _rows({str(i): v for i, v in enumerate(item)}, f"{prefix}{key}.")
        elif isinstance(item, list):
            yield f"{prefix}{key}", ", ".join(brief(v) for v in item)
        else:
            yield f"{prefix}{key}", brief(item)
