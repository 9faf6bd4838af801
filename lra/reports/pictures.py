"""Plots of profiles as PNG files, for where no browser is at hand; the report draws the same curves itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lra import files
from lra.reports.efficiency import Profile, by_shape, curves, shape_of, title


def write(profiles: Sequence[Profile], folder: Path) -> list[Path]:
    """One PNG for each shape and curve: <folder>/<device>-d<D>-n<layers>-b<B>-<direction>-<what>.png."""
    written = []
    for shape, cells in by_shape(profiles).items():
        for what, label, lines in curves(cells):
            device, task, batch, width, depth, direction = shape_of(cells[0])
            stem = f"{device}-{task or 'encoder'}-d{width}-n{depth}-b{batch}-{direction}-{what.split()[0]}"
            path = folder / f"{''.join(c if c.isalnum() else '-' for c in stem).lower()}.png"
            with files.atomic(path) as temporary:
                _draw(f"{what}: {title(shape)}", label, lines).savefig(temporary, format="png", dpi=120)
            written.append(path)
    return written


def _draw(heading: str, label: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Figure:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = mpl.color_sequences["tab20"]
    for (name, points), colour, marker in zip(lines, cycle(colours), cycle("osv^D"), strict=False):
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=4, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({n for _, points in lines for n, _ in points})
    axes.set_xticks(lengths, [f"{n:g}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length")
    axes.set_ylabel(label)
    axes.set_title(heading, fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=7, ncols=1 + len(lines) // 40)
    return figure
