"""Charts as SVG without script: text keeps its size at every width, colours are CSS variables, hovering tells values.

An <svg> here is as wide as its place and as high as given. Places along x are percentages; curves stand in a nested
<svg> of 1000 units that is stretched to the width, with strokes that are not. `s1`..`s8`, `v1`..`v4` and `l1`..`l5` are
colour classes of the style sheet.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cz_jax.report.markup import inline, number

Values = Sequence[float | None]
WIDTH = 1000.0
FEW = 12  # up to here every point gets a dot
MOST_BINS = 120


@dataclass(frozen=True)
class Bins:
    """Rounds put together so that a chart has at most `most` places along x; `numbers` are the rounds' numbers."""

    numbers: tuple[int, ...]
    most: int = MOST_BINS

    @property
    def size(self) -> int:
        """Rounds in a bin."""
        return max(1, math.ceil(len(self.numbers) / self.most))

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / self.size)

    def of(self, values: Sequence) -> list[list]:
        return [[v for v in values[i : i + self.size] if v is not None] for i in range(0, len(values), self.size)]

    def mean(self, values: Values) -> list[float | None]:
        return [math.fsum(v) / len(v) if v else None for v in self.of(values)]

    def last(self, values: Values) -> list[float | None]:
        return [v[-1] if v else None for v in self.of(values)]

    def names(self) -> list[str]:
        groups = self.of(self.numbers)
        return [f"round {g[0]}" if len(g) == 1 else f"rounds {g[0]}\N{EN DASH}{g[-1]}, means" for g in groups]

    def ticks(self) -> list[tuple[float, str]]:
        """(place 0..1, text) of the first and the last round and of round numbers well between them."""
        count, lasts = len(self), [g[-1] for g in self.of(self.numbers)]
        first, last = self.numbers[0], self.numbers[-1]
        if count == 1:
            return [(0.5, f"round {last:,}")]
        step = max(1, round(nice_step((last - first) / 4))) if last - first >= 4 else 1
        found = [(0.5 / count, f"round {first:,}")]
        for wanted in range(first - first % step + step, last, step):
            place = (bisect.bisect_left(lasts, wanted) + 0.5) / count
            if place - found[-1][0] > (0.2 if len(found) == 1 else 0.1) and place < 0.88:
                found.append((place, f"{wanted:,}"))
        return [*found, ((count - 0.5) / count, f"{last:,}")]


def moving_average(values: Values, window: int) -> list[float | None]:
    """The mean of the last `window` values that are there, at each place; None until there is one."""
    out = []
    for i in range(len(values)):
        there = [v for v in values[max(0, i + 1 - window) : i + 1] if v is not None]
        out.append(math.fsum(there) / len(there) if there else None)
    return out


@dataclass(frozen=True)
class Series:
    """A named curve. `values` one a bin; `smooth` is drawn bold over it where given."""

    name: str
    values: Values
    colour: str
    smooth: Values | None = None


@dataclass(frozen=True)
class Scale:
    """low..high on `height` pixels, high on top."""

    low: float
    high: float
    height: float

    def y(self, value: float) -> float:
        return self.height * (1 - (value - self.low) / (self.high - self.low))

    def ticks(self, wanted: int) -> list[float]:
        step = nice_step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 x 10^n that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((f * power for f in (1, 2, 2.5, 5) if f * power >= rough * (1 - 1e-9)), 10 * power)


def scale_for(values: Sequence[float], height: float, zero: bool = False) -> Scale:
    """A scale with round ends that holds all values, and zero where it is asked for or near."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero or 0 < low < 0.4 * high:
        low = min(low, 0.0)
    if zero or 0.4 * low < high < 0:
        high = max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        around = abs(high) * 0.1 or 1.0
        low, high = (low if low == 0 else low - around), high + around
    step = nice_step((high - low) / 4)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, height)


def line_chart(
    bins: Bins,
    series: Sequence[Series],
    about: str,
    height: int = 200,
    scale: Scale | None = None,
    text: Callable = number,
    legend: bool = True,
) -> str:
    """Curves over rounds. `about` is the chart's name for who cannot see it."""
    every = [v for s in series for v in (*s.values, *(s.smooth or ())) if v is not None]
    scale = scale or scale_for(every, height)
    curves = []
    for s in series:
        if s.smooth is not None and len(bins) > FEW:
            curves.append(_curve(s.values, scale, f"{s.colour} raw"))
            curves.append(_curve(s.smooth, scale, s.colour))
        else:
            curves.append(_curve(s.values, scale, s.colour, dots=len(bins) <= FEW))
    told = [_told(name, i, series, text) for i, name in enumerate(bins.names())]
    key = _legend([(s.colour, s.name, text(_last(s.smooth or s.values))) for s in series]) if legend else ""
    return key + _svg(height, about, _y_axis(scale, text), _x_axis(bins, height), curves, told)


def stacked_chart(
    bins: Bins, series: Sequence[Series], about: str, height: int = 180, text: Callable = number, share: bool = False
) -> str:
    """Bars that add up, the first series at the bottom; `share` scales to 0..1."""
    tops = [math.fsum(s.values[i] or 0.0 for s in series) for i in range(len(bins))]
    scale = Scale(0.0, 1.0, height) if share else scale_for([*tops, 0.0], height, zero=True)
    slot = WIDTH / max(1, len(bins))
    gap = slot * (0.1 if len(bins) > 40 else 0.2)
    base, paths = [0.0] * len(bins), []
    for s in series:
        d = []
        for i, value in enumerate(s.values):
            if not value:
                continue
            top, bottom = scale.y(base[i] + value), scale.y(base[i])
            base[i] += value
            d.append(f"M{i * slot + gap / 2:.1f} {top:.1f}h{slot - gap:.1f}V{bottom:.1f}h{gap - slot:.1f}z")
        if d:
            paths.append(f'<path class="bar {s.colour}" d="{"".join(d)}"/>')
    told = [_told(name, i, series, text) for i, name in enumerate(bins.names())]
    whole = math.fsum(tops)
    key = _legend(
        [
            (s.colour, s.name, f"{math.fsum(v or 0.0 for v in s.values) / whole:.0%}" if whole else "")
            for s in series
        ]
    )  # fmt: skip
    return key + _svg(height, about, _y_axis(scale, text), _x_axis(bins, height), paths, told)


def step_chart(bins: Bins, values: Values, names: dict[int, str], about: str, height: int = 110) -> str:
    """A path over whole-numbered steps that have names."""
    scale = Scale(min(names) - 0.4, max(names) + 0.4, height)
    slot, d, before = WIDTH / max(1, len(bins)), [], None
    for i, value in enumerate(values):
        if value is None:
            before = None
            continue
        y = f"{scale.y(value):.1f}"
        d.append(f"M{i * slot:.1f} {y}" if before is None else f"V{y}")
        d.append(f"H{(i + 1) * slot:.1f}")
        before = value
    axis = "".join(_grid(scale.y(n), str(n)) for n in names)
    told = [
        f"{name}\nlevel {values[i]:.0f}, {names.get(round(values[i]), '')}" if values[i] is not None else name
        for i, name in enumerate(bins.names())
    ]
    curve = f'<path class="line step s4" d="{"".join(d)}"/>'
    return _svg(height, about, axis, _x_axis(bins, height), [curve], told)


@dataclass(frozen=True)
class Interval:
    """An estimate 0..1 with its bounds."""

    value: float
    low: float
    high: float


def interval_chart(rows: Sequence[tuple[str, Interval | None, Interval | None]], about: str, text: Callable) -> str:
    """Before and after on one line each, with their intervals, over 0..100%."""
    row_height, parts = 46, []
    height = row_height * len(rows)
    for i in range(5):
        kind = "grid" if i else "grid base"
        parts.append(f'<line class="{kind}" x1="{25 * i}%" x2="{25 * i}%" y1="0" y2="{height}"/>')
        parts.append(f'<text class="tick x" x="{25 * i}%" y="{height + 17}">{25 * i}%</text>')
    for i, (name, before, after) in enumerate(rows):
        y = row_height * (i + 0.5)
        parts.append(f'<text class="tick y row" x="-10" y="{y + 4}">{inline(name, 24)}</text>')
        told = [f"{when} {text(e)}" for when, e in (("before", before), ("after", after)) if e]
        parts.append("<g>")
        for estimate, dy, colour in ((before, -7, "s7"), (after, 7, "s1")):
            if estimate is not None:
                x1, x2, cx = (f"{100 * v:.2f}%" for v in (estimate.low, estimate.high, estimate.value))
                parts.append(f'<line class="whisker {colour}" x1="{x1}" x2="{x2}" y1="{y + dy}" y2="{y + dy}"/>')
                parts.append(f'<circle class="dot {colour}" cx="{cx}" cy="{y + dy}" r="5"/>')
        parts.append(_hit(0, 100, i * row_height, row_height, "\n".join([name, *told])) + "</g>")
    key = _legend([("s7", "before", ""), ("s1", "after", "")])
    return key + _rows_svg(height, about, parts)


@dataclass(frozen=True)
class Span:
    """What a part of a timeline was: places 0..1 on it, a colour class, and what hovering tells."""

    name: str
    begin: float
    end: float
    colour: str
    told: str


def timeline_chart(spans: Sequence[Span], rows: Sequence[tuple[str, Values]], length: float, about: str) -> str:
    """`length` seconds: what they were spent on, and under it a row for each of `rows`, a share 0..1 of equal parts."""
    band, row_height = 28, 44
    height = band + row_height * len(rows)
    step = nice_step(length / 5)
    ticks = [i * step for i in range(int(length / step + 1e-9) + 1)]
    parts = [
        f'<line class="grid" x1="{100 * t / length:.2f}%" x2="{100 * t / length:.2f}%" y1="0" y2="{height}"/>'
        f'<text class="tick x" x="{100 * t / length:.2f}%" y="{height + 17}">{number(t)} s</text>'
        for t in ticks
    ]
    for s in spans:
        x, width = 100 * s.begin, 100 * (s.end - s.begin)
        parts.append(f'<rect class="bar {s.colour}" x="{x:.2f}%" width="{width:.2f}%" y="0" height="{band - 8}"/>')
    for i, (name, values) in enumerate(rows):
        top, tall = band + row_height * i, row_height - 8
        slot = WIDTH / max(1, len(values))
        d = "".join(
            f"M{j * slot:.1f} {tall}v{-tall * min(1.0, v):.1f}h{slot:.1f}V{tall}z"
            for j, v in enumerate(values)
            if v is not None and v > 0
        )
        parts.append(f'<text class="tick y row" x="-10" y="{top + tall / 2 + 4}">{inline(name, 24)}</text>')
        parts.append(
            f'<svg y="{top}" width="100%" height="{tall}" viewBox="0 0 {WIDTH:.0f} {tall}" preserveAspectRatio="none">'
            f'<path class="bar s1" d="{d}"/></svg>'
        )
    parts += [_hit(100 * s.begin, 100 * (s.end - s.begin), 0, height, s.told) for s in spans]
    named = {s.name: s.colour for s in spans}
    key = _legend([(colour, name, "") for name, colour in named.items()])
    return key + _rows_svg(height, about, parts)


def _curve(values: Values, scale: Scale, kind: str, dots: bool = False) -> str:
    """A line that is broken where values are missing; what has no neighbour is a dot."""
    slot, d, points = WIDTH / max(1, len(values)), [], []
    for i, value in enumerate(values):
        if value is None:
            continue
        place = f"{(i + 0.5) * slot:.1f} {scale.y(value):.1f}"
        starts = i == 0 or values[i - 1] is None
        alone = starts and (i + 1 == len(values) or values[i + 1] is None)
        d.append(f"{'M' if starts else 'L'}{place}")
        if alone or dots:
            points.append(f"M{place}h0")
    line = f'<path class="line {kind}" d="{"".join(d)}"/>' if d else ""
    return line + (f'<path class="line points {kind}" d="{"".join(points)}"/>' if points else "")


def _y_axis(scale: Scale, text: Callable) -> str:
    return "".join(_grid(scale.y(t), text(t), t == 0) for t in scale.ticks(4))


def _grid(y: float, text: str, base: bool = False) -> str:
    kind = "grid base" if base else "grid"
    return (
        f'<line class="{kind}" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick y" x="-8" y="{y + 4:.1f}">{inline(text, 12)}</text>'
    )


def _x_axis(bins: Bins, height: float) -> str:
    ticks, parts = bins.ticks() if len(bins) else [], []
    for i, (place, text) in enumerate(ticks):
        anchor = "start" if i == 0 and len(ticks) > 1 else "end" if i == len(ticks) - 1 and i else "middle"
        at = 0 if anchor == "start" else 100 if anchor == "end" else 100 * place
        parts.append(f'<text class="tick {anchor}" x="{at:.2f}%" y="{height + 17:.0f}">{text}</text>')
    return "".join(parts)


def _svg(height: int, about: str, y_axis: str, x_axis: str, curves: Sequence[str], told: Sequence[str]) -> str:
    slot = 100 / max(1, len(told))
    hits = "".join(_hit(i * slot, slot, 0, height, text) for i, text in enumerate(told))
    inner = (
        f'<svg width="100%" height="{height}" viewBox="0 0 {WIDTH:.0f} {height}" preserveAspectRatio="none">'
        f"{''.join(curves)}</svg>"
    )
    return (
        f'<svg class="plot" height="{height}" role="img" aria-label="{inline(about, 200)}">'
        f"{y_axis}{x_axis}{inner}{hits}</svg>"
    )


def _rows_svg(height: int, about: str, parts: Sequence[str]) -> str:
    """A plot whose rows have names beside them."""
    opening = f'<svg class="plot rows" height="{height}" role="img" aria-label="{inline(about, 200)}">'
    return f"{opening}{''.join(parts)}</svg>"


def _hit(x: float, width: float, y: float, height: float, told: str) -> str:
    """A place that lights up under the pointer and tells `told`, a line each."""
    lines = "&#10;".join(inline(line, 120) for line in told.split("\n"))
    return (
        f'<rect class="hit" x="{x:.2f}%" width="{width:.2f}%" y="{y:.0f}" height="{height:.0f}">'
        f"<title>{lines}</title></rect>"
    )


def _told(name: str, i: int, series: Sequence[Series], text: Callable) -> str:
    lines = [name]
    for s in series:
        if s.values[i] is not None:
            smooth = f" (moving average {text(s.smooth[i])})" if s.smooth is not None else ""
            lines.append(f"{s.name.replace(chr(10), ' ')}: {text(s.values[i])}{smooth}")
    return "\n".join(lines)


def _last(values: Values) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def _legend(entries: Sequence[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<li><i class="{colour}"></i>{inline(name, 40)}{f" <b>{inline(value)}</b>" if value else ""}</li>'
        for colour, name, value in entries
    )
    return f'<ul class="legend">{items}</ul>'
