"""Charts as inline SVG: lines or dots on linear or logarithmic axes, coloured by the page's style sheet.

Text takes the colour of the page, series take the classes s0 .. s7, a point that belongs to a row of the table carries
its name in `data-row`. Everything that is drawn is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 330
LEFT, TOP, RIGHT, BOTTOM = 48, 10, 10, 40
COLOURS, LONGEST = 8, 19


@dataclass(frozen=True)
class Series:
    """name; points (x, y). areas: one number per point, drawn as the area of its dot; row: the table row behind it;
    colour: 0 .. 7, beyond which lines are dashed; line: whether points are joined."""

    name: str
    points: Sequence[tuple[float, float]]
    areas: Sequence[float] = ()
    row: str = ""
    colour: int = 0
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels. low, high: values at its ends; start, stop: pixels there."""

    label: str
    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    powers_of_two: bool = False

    def at(self, value: float) -> float:
        a, b, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - a) / (b - a) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.powers_of_two:
            low, high = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
            return [2.0**n for n in range(low, high + 1)]
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if len(decades) > 5 else (1, 3) if len(decades) > 3 else (1, 2, 5)
            return [s * 10.0**n for n in decades for s in steps if self.low <= s * 10.0**n <= self.high]
        raw = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False,
    lines: Sequence[tuple[str, float]] = (), labels: bool = True, powers_of_two: bool = False,
) -> str:  # fmt: skip
    """An SVG element. lines: (name, y) drawn across; labels: names beside dots, or at the ends of lines. Empty where
    there is no point to draw."""
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    right = RIGHT + (100 if labels and any(s.line for s in series) else 0)
    x = _axis(x_label, [p[0] for p in points], LEFT, WIDTH - right, log_x, powers_of_two)
    y = _axis(y_label, [*(p[1] for p in points), *(v for _, v in lines)], HEIGHT - BOTTOM, TOP, log_y, False)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', *_frame(x, y),
        *_across(lines, x, y),
    ]  # fmt: skip
    largest = max((a for s in series for a in s.areas), default=1.0) or 1.0
    for s in series:
        parts.append(_one(s, x, y, largest))
    if labels:
        parts += _end_labels(series, x, y) if any(s.line for s in series) else _dot_labels(series, x, y, largest)
    return "\n".join([*parts, "</svg>"])


def _axis(label: str, values: Sequence[float], start: float, stop: float, log: bool, powers: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        # at least a factor of 4 across, so that there is a tick
        margin = max((high / low) ** 0.06, 2 / (high / low) ** 0.5, 1.05)
        return Axis(label, low / margin, high * margin, start, stop, True, powers)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(label, low - margin if low < 0 or low > margin else 0.0, high + margin, start, stop)


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 5:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    shown = x.ticks()
    for value in shown[:: 1 + len(shown) // 9]:
        at = x.at(value)
        parts.append(f'<line class="grid" y1="{y.start:.1f}" y2="{y.stop:.1f}" x1="{at:.1f}" x2="{at:.1f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 14:.1f}" text-anchor="middle">{number(value)}</text>')
    middle = (x.start + x.stop) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    turn = f'transform="translate(11 {(y.start + y.stop) / 2:.0f}) rotate(-90)"'
    return [*parts, f'<text class="axis" {turn} text-anchor="middle">{escape(y.label)}</text>']


def _across(lines: Sequence[tuple[str, float]], x: Axis, y: Axis) -> list[str]:
    parts, taken = [], math.inf
    for name, value in sorted(lines, key=lambda line: line[1]):
        at = y.at(value)
        parts.append(f'<line class="floor" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        if taken - at > 10:
            parts.append(f'<text class="floor" x="{x.start + 4:.1f}" y="{at - 3:.1f}">{escape(name)}</text>')
            taken = at
    return parts


def _one(s: Series, x: Axis, y: Axis, largest: float) -> str:
    style = f"s{s.colour % COLOURS}" + (" dashed" if s.colour >= COLOURS else "")
    row = f' data-row="{escape(s.row)}" tabindex="0" role="button"' if s.row else ""
    places = [(x.at(a), y.at(b)) for a, b in s.points]
    parts = [f'<g class="series {style}"{row}><title>{escape(s.name)}</title>']
    if s.line and len(places) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}"/>')
    for i, (a, b) in enumerate(places):
        radius = _radius(s, i, largest)
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius:.1f}"/>')
    return "".join([*parts, "</g>"])


def _radius(s: Series, i: int, largest: float) -> float:
    return max(3.0, 16 * math.sqrt(s.areas[i] / largest)) if s.areas else 2.2


def _end_labels(series: Sequence[Series], x: Axis, y: Axis) -> list[str]:
    """Names beside the last points, moved apart where they would touch."""
    ends = sorted((y.at(s.points[-1][1]), i) for i, s in enumerate(series) if s.points)
    height = min(11.0, (y.start - y.stop) / max(len(ends), 1))
    places = [at for at, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + height)
    if places and places[-1] > y.start:
        places[-1] = y.start
        for i in reversed(range(len(places) - 1)):
            places[i] = min(places[i], places[i + 1] - height)
    parts = []
    for (at, i), place in zip(ends, places, strict=True):
        s = series[i]
        end = x.at(s.points[-1][0])
        path = f"{end + 3:.1f},{at:.1f} {x.stop + 8:.1f},{place:.1f}"
        parts.append(f'<polyline class="leader" points="{path}"/>')
        short = s.name if len(s.name) <= LONGEST else f"{s.name[: LONGEST - 1]}…"
        style = f'class="s{s.colour % COLOURS}" x="{x.stop + 10:.1f}" y="{place + 3:.1f}"'
        parts.append(f"<text {style}>{escape(short)}</text>")
    return parts


def _dot_labels(series: Sequence[Series], x: Axis, y: Axis, largest: float) -> list[str]:
    """Names beside the dots where there is room; a dot without one still tells its name when pointed at."""
    boxes: list[tuple[float, float, float, float]] = []
    for s in series:
        for i, (a, b) in enumerate(s.points):
            r = 0.7 * _radius(s, i, largest)
            boxes.append((x.at(a) - r, y.at(b) - r, x.at(a) + r, y.at(b) + r))
    parts = []
    for s in series:
        for i, (a, b) in enumerate(s.points):
            r, wide = _radius(s, i, largest) + 2, 5.6 * len(s.name)
            for dx, dy in ((r, 3.5), (-r - wide, 3.5), (-wide / 2, -r - 1), (-wide / 2, r + 9)):
                left, base = x.at(a) + dx, y.at(b) + dy
                box = (left, base - 9, left + wide, base + 2)
                inside = box[0] >= x.start and box[2] <= WIDTH and box[1] >= 0 and box[3] <= y.start
                if inside and not any(_touch(box, other) for other in boxes):
                    boxes.append(box)
                    parts.append(f'<text x="{left:.1f}" y="{base:.1f}">{escape(s.name)}</text>')
                    break
    return parts


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def number(value: float) -> str:
    """A tick's text: 1024 -> 1K, 65536 -> 64K, 0.25, 3e6 -> 3M."""
    if value >= 1024 and math.log2(value).is_integer():
        return f"{value / 1024:g}K" if value < 2**20 else f"{value / 2**20:g}M"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.4g}"
