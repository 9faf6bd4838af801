"""Charts: functions that take pandas frames and return Altair charts. `save` writes PNG, SVG or PDF without a browser.

A panel shows at most `LINES` names, each with its own colour and its own marker. Colours and markers come from the
theme (`theme`), so that one chart serves a light page, a dark page and paper. A theme is a Vega-Lite configuration.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from lra import files
from lra.errors import UserError

Layers = alt.LayerChart | alt.FacetChart
"""The type that Altair declares for a changed layered chart."""
LINES = 8
"""Names in one panel at most; there are as many colours and markers."""
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")
# Paul Tol's colour-blind safe schemes: "muted" (without its palest colours) for light pages, "light" for dark ones
COLOURS = {
    "light": ("#332288", "#cc6677", "#117733", "#999933", "#882255", "#44aa99", "#aa4499", "#3f8fc4"),
    "dark": ("#77aadd", "#ee8866", "#44bb99", "#eedd88", "#ffaabb", "#99ddff", "#bbcc33", "#cccccc"),
}
INK = {"light": ("#1c2024", "#5b636b", "#dfe3e7"), "dark": ("#e6e9ec", "#a0a9b2", "#333a41")}
"""Colours of text, of axis labels and of grid lines."""
GREY = "#8a9199"
"""Colour of what is at chance and of baselines; visible on both pages."""
FORMATS = (".png", ".svg", ".pdf")
WRAP = 62
ACCURACY = "test accuracy %"
PLOT = (300, 240)
"""Width and height in pixels of the narrowest page, for which labels are placed."""


PAPER = 320
"""Width in pixels of a plot that is saved: with its labels, text has at least 6 points in a column of 3.25 inches."""


def theme(name: str, font: float = 11) -> dict[str, Any]:
    """Vega-Lite configuration of a "light" or "dark" page. font: size of text in pixels."""
    ink, dim, line = INK[name]
    text = {"labelColor": dim, "titleColor": dim, "labelFontSize": font, "titleFontSize": font, "titleFontWeight": 400}
    axis = text | {"gridColor": line, "domainColor": line, "tickColor": line}
    title = {"color": ink, "fontSize": font + 1, "anchor": "start", "subtitleColor": dim, "subtitleFontSize": font - 1}
    return {
        "background": "transparent" if name == "dark" else "white", "font": "system-ui, Liberation Sans, sans-serif",
        "view": {"stroke": None}, "axis": axis, "title": title,
        "legend": text | {"symbolSize": 60, "labelLimit": 140, "offset": 6},
        "text": {"color": ink, "fontSize": font - 1}, "rule": {"color": dim},
        "range": {"category": list(COLOURS[name]), "symbol": list(MARKERS)},
    }  # fmt: skip


def panels(frame: pd.DataFrame, name: str = "architecture") -> list[tuple[str, pd.DataFrame]]:
    """Split a frame by `family`, and a family of more than `LINES` names into equal parts: (title, part)."""
    parts = []
    for family, rows in frame.groupby("family", sort=True):
        names = sorted(rows[name].unique())
        chunks = np.array_split(np.array(names, dtype=object), -(-len(names) // LINES))
        for number, chunk in enumerate(chunks, 1):
            of = f" ({number} of {len(chunks)})" if len(chunks) > 1 else ""
            parts.append((f"{str(family).replace('_', ' ')}{of}", rows[rows[name].isin(list(chunk))]))
    return parts


def limits(low: float, high: float, lowest: float = 0.0, highest: float = 100.0) -> tuple[float, float]:
    """Ends of an axis that holds [low, high] with a margin and stays within [lowest, highest]."""
    margin = 0.06 * (high - low) or 1.0
    return round(max(low - margin, lowest), 2), round(min(high + margin, highest), 2)


def baseline_notes(baselines: Mapping[str, float], axis: tuple[float, float]) -> list[str]:
    """Baselines in words, lowest first: those drawn, and those below or above the axis."""
    parts: dict[str, list[str]] = {"dashed: ": [], "below the axis: ": [], "above the axis: ": []}
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        key = "below the axis: " if value < axis[0] else "above the axis: " if value > axis[1] else "dashed: "
        parts[key].append(f"{name} {value:.1f}")
    # a name and its number stay on one line
    whole = [
        (key + ", ".join(texts)).replace(" ", "\u00a0").replace(",\u00a0", ", ")
        for key, texts in parts.items()
        if texts
    ]
    return [line for text in whole for line in wrapped(text)]


def _baselines(
    baselines: Mapping[str, float], axis: tuple[float, float], channel: str, title: str = ACCURACY
) -> alt.Chart:
    """Dashed lines across the plot at the baselines within the axis. channel: "x" or "y"; title: of that axis."""
    inside = [{"baseline": name, "accuracy": v} for name, v in baselines.items() if axis[0] <= v <= axis[1]]
    lines = alt.Chart(pd.DataFrame(inside, columns=["baseline", "accuracy"])).mark_rule(strokeDash=[4, 3], color=GREY)
    tip = [alt.Tooltip("baseline:N"), alt.Tooltip("accuracy:Q", format=".2f", title="accuracy %")]
    return lines.encode(**{channel: (alt.X if channel == "x" else alt.Y)("accuracy:Q", title=title)}, tooltip=tip)


TIPS = {
    "label": ("architecture", "N", ""), "family": ("family", "N", ""), "shown": ("accuracy %, 95 % interval", "N", ""),
    "status": ("status", "N", ""), "seeds": ("seeds", "Q", ""), "minutes": ("minutes", "Q", ".3~g"),
    "hardware": ("machine of the run", "N", ""),
    "speed": ("tokens/s", "Q", ","), "seen": ("training examples", "Q", ","),
    "parameters": ("parameters", "Q", ","), "gflop": ("GFLOP forward", "Q", ".3~g"), "memory": ("memory", "N", ""),
}  # fmt: skip


def _tips() -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{field}:{kind}", title=title, format=form or alt.Undefined)
        for field, (title, kind, form) in TIPS.items()
    ]


def pareto(frame: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """Rows that no other row beats in both: none costs less and reaches more. Cheapest first."""
    ordered = frame.sort_values([cost, value], ascending=[True, False])
    before = ordered[value].cummax().shift(fill_value=-np.inf)
    return ordered[ordered[value] > before]


def tradeoff(frame: pd.DataFrame, baselines: Mapping[str, float], families: Sequence[str]) -> Layers:
    """Accuracy against training time, the Pareto front as a line, memory as area where it is known.

    frame: one row per table row, with the columns of `TIPS`, `accuracy`, `low` and `high` in percent, `chance`,
    `memory_bytes` (NaN where unknown) and `row`. baselines: name -> accuracy in percent. families: the families of the
    whole report, at most `LINES`, so that each keeps its colour in every chart.
    """
    axis = limits(frame["low"].min(), frame["high"].max())
    times = _log_limits(frame["minutes"])
    base = alt.Chart(frame)
    x = alt.X(
        "minutes:Q",
        title="training time, minutes",
        scale=alt.Scale(type="log", domain=times, nice=False),
        axis=alt.Axis(tickCount=4, grid=False),
    )
    y = alt.Y("accuracy:Q", title=ACCURACY, scale=alt.Scale(domain=axis, zero=False, nice=False))
    identity = _identity("family", families, sorted(frame["family"].unique()))
    colour = alt.condition("datum.chance", alt.value(GREY), identity["color"])
    front = pareto(frame[~frame["chance"]], "minutes", "accuracy")
    size: Any = alt.value(50)
    if frame["memory_bytes"].notna().any():
        scale = alt.Scale(type="linear", domainMin=0, rangeMin=0, rangeMax=600)
        size = alt.condition(
            "isValid(datum.memory_bytes)", alt.Size("memory_bytes:Q", scale=scale, legend=None), alt.value(45)
        )
    dots = base.mark_point(filled=True, opacity=0.75, cursor="pointer", invalid="show").encode(
        x=x, y=y, color=colour, shape=identity["shape"], size=size, tooltip=_tips()
    )
    bars = base.mark_rule(opacity=0.6, clip=True).encode(
        x=x, y=alt.Y("low:Q", title=ACCURACY), y2="high:Q", color=colour
    )
    steps = alt.Chart(front).mark_line(interpolate="step-after", color=GREY, strokeWidth=1).encode(x=x, y=y)
    names = alt.Chart(_labels(frame, front, times, axis)).mark_text(
        align=alt.expr("datum.align"), dx=alt.expr("datum.dx"), dy=alt.expr("datum.dy"), baseline="middle"
    )  # fmt: skip
    machines = sorted(frame["hardware"].unique())
    notes = wrapped("on more than one machine: " + "; ".join(machines)) if len(machines) > 1 else []
    title = alt.TitleParams("Accuracy against training time", subtitle=[*baseline_notes(baselines, axis), *notes])
    layers = alt.layer(
        _baselines(baselines, axis, "y"), steps, bars, dots, names.encode(x=x, y=y, text="label:N")
    )  # fmt: skip
    return layers.properties(width="container", height=PLOT[1], title=title)


def _log_limits(values: pd.Series) -> tuple[float, float]:
    """Ends of a logarithmic axis: at least a factor of four apart, with room for labels at the right."""
    low, high = float(values.min()), float(values.max())
    spread = max(high / low, 2.0)
    return low / spread**0.08 / 1.2, high * spread**0.25 * 1.2


def _labels(
    frame: pd.DataFrame, front: pd.DataFrame, times: tuple[float, float], axis: tuple[float, float]
) -> pd.DataFrame:
    """Names beside the dots that have room for one, the Pareto front first; tooltips name the others."""
    width, height = PLOT
    order = pd.concat([front, frame.drop(front.index)])
    x = width * np.log(order["minutes"] / times[0]) / np.log(times[1] / times[0])
    y = height * (axis[1] - order["accuracy"]) / (axis[1] - axis[0])
    # left, top, right and bottom of what must not be covered
    boxes = [(a - 6, b - 6, a + 6, b + 6) for a, b in zip(x, y, strict=True)]
    placed = []
    for (a, b), row in zip(zip(x, y, strict=True), order.itertuples(), strict=True):
        wide = 6.0 * len(row.label)
        for align, dx, dy, left in (("left", 9, 0, 9), ("right", -9, 0, -9 - wide), ("center", 0, -12, -wide / 2)):
            box = (a + left, b + dy - 6, a + left + wide, b + dy + 6)
            inside = box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height
            if inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                placed.append(
                    {"label": row.label, "minutes": row.minutes, "accuracy": row.accuracy, "align": align,
                     "dx": dx, "dy": dy, "row": row.row}
                )  # fmt: skip
                break
    return pd.DataFrame(placed, columns=["label", "minutes", "accuracy", "align", "dx", "dy", "row"])


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _identity(field: str, domain: Sequence[str], shown: Sequence[str] = (), narrow: bool = False) -> dict[str, Any]:
    """Colour and marker of the names in `domain`; the legend holds those in `shown`, or all. narrow: for a panel of a
    paper. Raises ValueError for more names than there are colours."""
    if len(domain) > LINES:
        raise ValueError(f"{len(domain)} names in one panel; at most {LINES} are distinguishable")
    scale = alt.Scale(domain=list(domain))
    # a column holds about 20 characters of the narrowest page
    columns = (2 if max(map(len, shown or domain), default=0) > 12 else 3) - narrow
    words = "replace(datum.label, /_/g, ' ')" if field == "family" else alt.Undefined
    legend = alt.Legend(
        title=None, orient="bottom", columns=columns, symbolOpacity=1, labelExpr=words,
        values=list(shown) if shown else alt.Undefined,
    )  # fmt: skip
    return {
        "color": alt.Color(f"{field}:N", scale=scale, legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=scale, legend=legend),
    }


def dots(frame: pd.DataFrame, baselines: Mapping[str, float]) -> Layers:
    """Accuracy of each row with its interval, best first. The axis follows the rows; baselines beyond it are named in
    the subtitle. frame and baselines: as for `tradeoff`."""
    axis = limits(frame["low"].min(), frame["high"].max())
    order = list(frame.sort_values(["accuracy", "label"], ascending=[False, True])["label"])
    base = alt.Chart(frame)
    scale = alt.Scale(domain=axis, zero=False, nice=False)
    x = alt.X("accuracy:Q", title=ACCURACY, scale=scale, axis=alt.Axis(tickCount=6))
    y = alt.Y("label:N", title=None, sort=order, axis=alt.Axis(labelLimit=130, grid=True, ticks=False, domain=False))
    colour = alt.condition("datum.chance", alt.value(GREY), alt.value(COLOURS["light"][7]))
    bars = base.mark_rule(strokeWidth=2, opacity=0.6).encode(
        x=alt.X("low:Q", title=ACCURACY), x2="high:Q", y=y, color=colour
    )
    points = base.mark_point(filled=True, size=55, opacity=1, cursor="pointer").encode(
        x=x, y=y, color=colour, tooltip=_tips()
    )
    title = alt.TitleParams("Accuracy, 95 % intervals", subtitle=baseline_notes(baselines, axis))
    layers = alt.layer(_baselines(baselines, axis, "x"), bars, points)
    return layers.properties(width="container", height=17 * len(frame), title=title)


def curves(frame: pd.DataFrame, value: str, label: str, name: str = "label", interactive: bool = True) -> Layers:
    """`value` against training step, one line per `name`, at most `LINES` of them.

    frame: one row per run, with `name`, `row` and the lists `step` and `value`, so that a point takes few characters.
    """
    base = alt.Chart(frame[[name, "row", "step", value]]).transform_flatten(["step", value])
    x = alt.X("step:Q", title="training step", axis=alt.Axis(tickCount=5))
    y = alt.Y(f"{value}:Q", title=label, scale=alt.Scale(zero=False))
    tip = [alt.Tooltip(f"{name}:N"), alt.Tooltip("step:Q"), alt.Tooltip(f"{value}:Q", format=".4~g", title=label)]
    lines = _lines(base, x, y, name, sorted(frame[name].unique()), tip, interactive)
    return lines.properties(width="container", height=180)


def by_length(
    frame: pd.DataFrame,
    value: str,
    title: str,
    label: str,
    axis: tuple[float, float] | None = None,
    interactive: bool = True,
) -> Layers:
    """`value` against sequence length on logarithmic axes, one line per architecture, at most `LINES` of them.

    frame: one row per profiled cell, as `efficiency.frame` makes it. axis: ends of the y axis, to be the same in all
    panels of a figure.
    """
    x = _length_axis(frame["length"], "length")
    low, high = axis or (float(frame[value].min()), float(frame[value].max()))
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    y = alt.Y(f"{value}:Q", title=label, scale=scale, axis=alt.Axis(values=_log_ticks(low, high), format="~g"))
    tip = [
        alt.Tooltip("architecture:N"), alt.Tooltip("length:Q", format=","),
        alt.Tooltip("train_ms:Q", format=",.3~f", title="training step, ms"),
        alt.Tooltip("forward_ms:Q", format=",.3~f", title="forward, ms"),
        alt.Tooltip("peak_mib:Q", format=",.0f", title="peak memory, MiB"),
        alt.Tooltip("tokens_per_second:Q", format=",.0f", title="tokens/s"),
        alt.Tooltip("gflop:Q", format=".3~g", title="GFLOP forward"), alt.Tooltip("rounds:N", title="rounds"),
    ]  # fmt: skip
    chart = _lines(alt.Chart(frame), x, y, "architecture", sorted(frame["architecture"].unique()), tip, interactive)
    return chart.properties(width="container", height=200, title=title)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the limits; powers alone over more than three decades."""
    steps = (1.0, 2.0, 5.0) if high / low <= 1e3 else (1.0,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]


def growth(frame: pd.DataFrame, column: str, label: str, interactive: bool = True) -> list[Layers]:
    """Small multiples of `by_length`, by family, with one y axis for all."""
    low, high = float(frame[column].min()), float(frame[column].max())
    axis = (low / 1.3, high * 1.3)
    return [by_length(part, column, title, label, axis, interactive) for title, part in panels(frame)]


def _lines(
    base: alt.Chart,
    x: alt.X,
    y: alt.Y,
    name: str,
    names: Sequence[str],
    tip: Sequence[alt.Tooltip],
    interactive: bool = True,
) -> Layers:
    """Lines with markers. If interactive, a click in the legend selects one, and pointing at one highlights it."""
    identity = _identity(name, names, narrow=not interactive)
    if not interactive:
        lines = base.mark_line().encode(x=x, y=y, color=identity["color"])
        return alt.layer(lines, base.mark_point(filled=True, size=45).encode(x=x, y=y, **identity))
    picked = alt.selection_point("picked", fields=[name], bind="legend")
    pointed = alt.selection_point("pointed", fields=[name], on="pointerover", clear="pointerout", empty=False)
    opacity = alt.condition(picked, alt.value(0.95), alt.value(0.12))
    width = alt.condition(pointed, alt.value(3.5), alt.value(1.6))
    lines = base.mark_line().encode(x=x, y=y, color=identity["color"], opacity=opacity, strokeWidth=width)
    points = base.mark_point(filled=True, size=45, cursor="pointer").encode(
        x=x, y=y, **identity, opacity=opacity, tooltip=list(tip)
    )
    return alt.layer(lines, points.add_params(picked, pointed))


HEAT_TIPS = {
    "label": "architecture", "task": "task", "verdict": "verdict", "accuracy": "right %", "whole": "whole examples %",
    "last": "last position %", "guess": "floor %", "reach": "reach, tokens", "seeds": "seeds", "steps": "steps",
}  # fmt: skip
NAMES = 130
"""Width in pixels of the names at the left of a heat map."""
COLUMN = (26, 110)
"""Smallest and largest width in pixels of a column of a heat map."""


def heatmap(frame: pd.DataFrame, tasks: Sequence[str], title: str) -> Layers:
    """Right answers in % of architectures (rows) on tasks (columns); grey: at chance.

    frame: one row per cell, as `diagnostics.frame` makes it. tasks: the columns of all heat maps of a page, so that
    they stand below each other.
    """
    tips = [alt.Tooltip(f"{field}:N", title=name) for field, name in HEAT_TIPS.items()]
    base = alt.Chart(frame).encode(tooltip=tips)
    x = alt.X("task:N", title=None, scale=alt.Scale(domain=list(tasks)), axis=alt.Axis(orient="top", labelAngle=-35))
    names = alt.Axis(labelLimit=NAMES - 5, minExtent=NAMES, maxExtent=NAMES)
    y = alt.Y("label:N", title=None, axis=names)
    share = alt.Color("accuracy:Q", scale=alt.Scale(domain=[0, 100], scheme="viridis"), legend=None)
    squares = base.mark_rect(cursor="pointer", stroke="#8884").encode(
        x=x, y=y, color=alt.condition("datum.chance", alt.value(GREY), share)
    )  # fmt: skip
    # viridis is dark at its lower end on every page
    ink = alt.condition("datum.accuracy > 60 || datum.chance", alt.value("#1c2024"), alt.value("#ffffff"))
    numbers = base.mark_text(cursor="pointer").encode(x=x, y=y, text=alt.Text("accuracy:Q", format=".0f"), color=ink)
    height = 20 * frame["label"].nunique()
    return alt.layer(squares, numbers).properties(width="container", height=height, title=title)


def by_test_length(frame: pd.DataFrame, title: str, guess: float | None, interactive: bool = True) -> Layers:
    """Right answers in % against test length, one line per architecture, at most `LINES` of them.

    frame: one row per architecture and length, as `diagnostics.lengths` makes it. guess: share of right answers of a
    guess in %, drawn dashed.
    """
    x = _length_axis(frame["length"], "test length")
    y = alt.Y("accuracy:Q", title="right %", scale=alt.Scale(domain=[0, 100]))
    tip = [
        alt.Tooltip("label:N", title="architecture"), alt.Tooltip("length:Q", format=","),
        alt.Tooltip("accuracy:Q", format=".1f", title="right %"), alt.Tooltip("seeds:Q"),
    ]  # fmt: skip
    lines = _lines(alt.Chart(frame), x, y, "label", sorted(frame["label"].unique()), tip, interactive)
    chance = _baselines({} if guess is None else {"chance": guess}, (0, 100), "y", "right %")
    return alt.layer(chance, lines).properties(width="container", height=180, title=title)


def frontier(runs: pd.DataFrame, lines: pd.DataFrame, label: str, title: str) -> alt.ConcatChart:
    """Loss of runs against FLOPs of training as dots, and the compute-optimal loss as a line with its interval; a panel
    for each `LINES` architectures. runs, lines: as of `lra.reports.scaling.Study`; label: what the loss is."""
    # a logarithmic axis has no place for 0
    runs = runs[runs["loss"] > 0]
    low, high = (runs["loss"].min(), runs["loss"].max()) if len(runs) else (0.1, 1.0)
    domain = [float(low) / 1.05, float(high) * 1.05]
    x = alt.X(
        "flops:Q", title="FLOPs of training", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e", tickCount=5)
    )
    scale = alt.Scale(type="log", domain=domain, nice=False)
    y = alt.Y("loss:Q", title=label, scale=scale, axis=alt.Axis(format="~g", tickCount=6))
    tip = [
        alt.Tooltip("architecture:N"), alt.Tooltip("parameters:Q", format=".3~s"),
        alt.Tooltip("tokens:Q", format=".3~s"), alt.Tooltip("flops:Q", format=".3~s", title="FLOPs"),
        alt.Tooltip("loss:Q", format=".4~g"),
    ]  # fmt: skip
    layered = []
    names = sorted(runs["architecture"].unique())
    for chunk in (names[i : i + LINES] for i in range(0, len(names), LINES)):
        identity = _identity("architecture", chunk, narrow=True)
        of_runs, of_lines = (alt.Chart(part[part["architecture"].isin(chunk)]) for part in (runs, lines))
        ends = alt.Y("low:Q", title=label, scale=scale)
        bands = of_lines.mark_area(opacity=0.15, clip=True).encode(x=x, y=ends, y2="high:Q", color=identity["color"])
        best = of_lines.mark_line(clip=True).encode(x=x, y=y, color=identity["color"], tooltip=tip)
        dots = of_runs.mark_point(filled=True, size=40, opacity=0.8).encode(x=x, y=y, tooltip=tip, **identity)
        layered.append(alt.layer(bands, best, dots))
    return figure(layered, title, width=PAPER)


def _length_axis(lengths: pd.Series, title: str) -> alt.X:
    """A logarithmic axis with a tick at each length."""
    values = sorted(int(n) for n in lengths.unique())
    ticks = alt.Axis(values=values, labelExpr="datum.value >= 1024 ? datum.value / 1024 + 'K' : datum.value")
    return alt.X("length:Q", title=title, axis=ticks, scale=alt.Scale(type="log", base=2, nice=False))


def gradient_reach(norms: Sequence[float], title: str) -> alt.Chart:
    """Norm of the derivative of the last output with respect to each input, on a logarithmic axis. norms: above 0."""
    frame = pd.DataFrame({"input": range(1, len(norms) + 1), "norm": list(norms)})
    scale = alt.Scale(type="log", domain=[min(norms) / 2, max(norms) * 2], nice=False)
    y = alt.Y("norm:Q", title="|d last output / d input t|", scale=scale, axis=alt.Axis(format=".0e", tickCount=6))
    chart = alt.Chart(frame).mark_line().encode(x=alt.X("input:Q", title="input t"), y=y)
    return chart.properties(width=420, height=240, title=title)


def figure(charts: Sequence[Layers], title: str = "", columns: int = 2, width: int = 160) -> alt.ConcatChart:
    """Panels side by side, each with a legend of its own, `width` pixels wide each."""
    sized = [chart.properties(width=width, height=round(0.75 * width)) for chart in charts]
    chart = alt.concat(*sized, columns=columns).resolve_scale(color="independent", shape="independent")
    return chart.properties(title=alt.TitleParams(wrapped(title))) if title else chart


def wrapped(text: str) -> list[str]:
    """Lines of a title or subtitle."""
    return textwrap.wrap(text, WRAP)


def stem(title: str) -> str:
    """A title as the name of a file: small letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def specification(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, with its data under `datasets`, and without the configuration that a theme gives."""
    with alt.data_transformers.enable("default", max_rows=None):
        spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)
    spec.pop("$schema", None)
    return spec


def save(chart: Any, path: Path, *, scale: float = 2.0) -> Path:
    """Write a chart as PNG, SVG or PDF, for paper: text stays legible in one column. scale: pixels of a PNG per
    pixel of the chart. Raises UserError for another ending."""
    import vl_convert

    if path.suffix not in FORMATS:
        raise UserError(f"cannot write {path}: a chart ends in {', '.join(FORMATS)}")
    spec = specification(chart)
    if spec.get("width") == "container":
        spec["width"] = PAPER
    spec["config"] = theme("light", font=13)
    text = json.dumps(spec)
    if path.suffix == ".png":
        content = vl_convert.vegalite_to_png(text, scale=scale)
    elif path.suffix == ".pdf":
        content = vl_convert.vegalite_to_pdf(text)
    else:
        content = vl_convert.vegalite_to_svg(text).encode()
    with files.atomic(path) as temporary:
        temporary.write_bytes(content)
    return path


@cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed as one script that fetches nothing and defines `vegaEmbed`: gzip in base64."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()
