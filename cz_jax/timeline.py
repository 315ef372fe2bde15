"""One round as a timeline: recorded with jax.profiler, and read from its trace as when each device was busy.

The trace is for XProf, TensorBoard and Perfetto; `TIMELINE` beside it holds what the report draws.
"""

import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from cz_jax.files import write_atomic

FOLDER, TIMELINE = "trace", "timeline.json"
FIRST = "propose"  # the phase that a round begins with
BINS = 400
PREFIX = "phase "  # of the annotations that stand for phases in the trace


class Recorder:
    """A progress callback that hands every event on to `say`, and records round number `which` of those that it hears
    of (1: the first, in which programs are compiled) into `out`/trace. A context manager: leaving it ends a recording
    that is under way."""

    def __init__(self, say: Callable, out: pathlib.Path, which: int):
        self._say, self._folder, self._which = say, pathlib.Path(out) / FOLDER, which
        self._played, self._on, self._phase = 0, False, None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, error, *_) -> None:
        if self._on:
            jax.profiler.stop_trace()
        if error is None and self._played < self._which:
            self._say("note", text=f"no timeline: {self._played} rounds were played, not {self._which}")

    def __call__(self, event: str, **fields) -> None:
        if event == "phase":
            if fields.get("name") == FIRST and self._played + 1 == self._which:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # a million calls, which say nothing about devices
                jax.profiler.start_trace(self._folder, profiler_options=options)
                self._on = True
            self._enter(fields.get("name"))
        elif event == "round":
            self._enter(None)
            self._played += 1
            if self._on:
                self._on = False
                jax.profiler.stop_trace()
                self._tell(fields["number"])
        self._say(event, **fields)

    def _enter(self, name: str | None) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
        self._phase = jax.profiler.TraceAnnotation(PREFIX + name) if self._on and name else None
        if self._phase is not None:
            self._phase.__enter__()

    def _tell(self, number: int) -> None:
        timeline = {"round": number} | read_timeline(self._folder)
        write_atomic(self._folder / TIMELINE, json.dumps(timeline).encode())
        shares = ", ".join(f"{device['name']} {device['busy']:.0%}" for device in timeline["devices"])
        self._say(
            "note",
            text=f"round {number}: busy for {shares} of its {timeline['seconds']:.1f} s; the timeline is in the "
            f"report, the trace for XProf or ui.perfetto.dev in {self._folder}",
        )


def read_timeline(folder: pathlib.Path) -> dict:
    """What the newest trace under `folder` says: "seconds", "phases" (name, begin, end in seconds, and the share of it
    that the devices were busy), and "devices" (name, busy share, and that of each of BINS equal parts)."""
    newest = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    phases = [
        (event.name.removeprefix(PREFIX), *_span(event))
        for plane in planes for line in plane.lines for event in line.events if event.name.startswith(PREFIX)
    ]  # fmt: skip
    phases.sort(key=lambda phase: phase[1])
    begin, end = phases[0][1], phases[-1][2]
    busy = {name: _busy_until(spans) for name, spans in _spans(planes).items()}

    def share(until, low, high):
        return float((until(high) - until(low)) / (high - low))

    edges = np.linspace(begin, end, BINS + 1)
    return {
        "seconds": (end - begin) / 1e9,
        "phases": [
            {
                "name": name,
                "begin": (low - begin) / 1e9,
                "end": (high - begin) / 1e9,
                "busy": float(np.mean([share(until, low, high) for until in busy.values()])),
            }
            for name, low, high in phases
        ],
        "devices": [
            {
                "name": name,
                "busy": share(until, begin, end),
                "bins": [round(float(x), 3) for x in np.diff(until(edges)) / np.diff(edges)],
            }
            for name, until in sorted(busy.items())
        ],
    }


def _spans(planes) -> dict[str, list]:
    """(start, end) in ns of what each device ran. A CPU's work is in the threads of the host, by operation of the
    compiled program."""
    devices = {}
    for plane in planes:
        if plane.name.startswith("/device:") and "CUSTOM" not in plane.name:
            lines = list(plane.lines)
            streams = [line for line in lines if line.name.startswith("Stream")]  # a GPU's, kernel by kernel
            used = streams or [line for line in lines if line.name == "XLA Ops"] or lines
            spans = [_span(event) for line in used for event in line.events]
            if spans:
                devices[plane.name.removeprefix("/device:")] = spans
    if not devices:
        devices["CPU"] = [
            _span(event)
            for plane in planes if plane.name == "/host:CPU" for line in plane.lines for event in line.events
            if any(name == "hlo_op" for name, _ in event.stats)
        ]  # fmt: skip
    return devices


def _span(event) -> tuple[float, float]:
    """(start, end) in ns."""
    return event.start_ns, event.start_ns + event.duration_ns


def _busy_until(spans: list) -> Callable:
    """A function of time: how long before it any of the spans ran."""
    if not spans:
        return lambda time: np.zeros_like(np.asarray(time, float))
    starts, ends = np.array(sorted(spans), float).T
    reached = np.maximum.accumulate(ends)
    first = np.flatnonzero(np.concatenate([[True], starts[1:] > reached[:-1]]))
    starts, ends = starts[first], reached[np.append(first[1:] - 1, len(reached) - 1)]
    run = np.concatenate([[0.0], np.cumsum(ends - starts)])
    times = np.stack([starts, ends], axis=1).ravel()
    sums = np.stack([run[:-1], run[1:]], axis=1).ravel()
    return lambda time: np.interp(time, times, sums)
