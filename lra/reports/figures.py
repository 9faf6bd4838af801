"""The figures of the report as files for a paper: one column wide, without interaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lra.reports import charts, diagnostics, efficiency, evidence, leaderboard, report
from lra.reports.ranking import Leaderboard
from lra.results.collection import Collection


def write(collection: Collection, root: Path, folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Write every figure below `folder`, in each of `suffixes` (charts.FORMATS). Raises UserError for another one."""
    return [
        charts.save(chart, folder / f"{stem}{suffix}") for stem, chart in drawn(collection, root) for suffix in suffixes
    ]


def drawn(collection: Collection, root: Path) -> Iterator[tuple[str, Any]]:
    """(file name without its ending, chart) of each figure."""
    yield from _results(collection)
    yield from _diagnostics(root)
    yield from efficiency.figures(efficiency.load(root))


def _results(collection: Collection) -> Iterator[tuple[str, Any]]:
    groups = Leaderboard.of(collection).groups
    families = report.families()
    table = report.result_frame(groups, {id(row): row.label for rows in groups.values() for row in rows})
    for number, (group, rows) in enumerate(groups.items()):
        frame, baselines = table[table["group"] == number], report.baselines_of(rows)
        stem = charts.stem(leaderboard.title(group))
        yield f"{stem}-time", charts.tradeoff(frame, baselines, families)
        yield f"{stem}-accuracy", charts.dots(frame, baselines)
        runs = [run for row in rows for run in evidence.curves(row.label, row.runs, row.label)[:1]]
        families_of = dict(zip(frame["label"], frame["family"], strict=True))
        for kind, (title, label) in report.CURVES.items():
            known = pd.DataFrame([run | {"family": families_of[run["label"]]} for run in runs if kind in run])
            if len(known):
                panels = [
                    charts.curves(part, kind, label, interactive=False).properties(title=name)
                    for name, part in charts.panels(known, "label")
                ]
                yield f"{stem}-{charts.stem(title)}", charts.figure(panels, f"{title}, first seed")


def _diagnostics(root: Path) -> Iterator[tuple[str, Any]]:
    cells = diagnostics.cells(Collection.read(root, "diagnostics").records)
    if not cells:
        return
    frame, lengths = diagnostics.frame(cells), diagnostics.lengths(cells)
    tasks = sorted(frame["task"].unique())
    for family, part in frame.groupby("family"):
        chart = charts.heatmap(part, tasks, str(family).replace("_", " "))
        yield f"diagnostics-{charts.stem(str(family))}", chart.properties(width=charts.COLUMN[0] * len(tasks))
    guesses = diagnostics.guesses(cells)
    for task, rows in lengths.groupby("task"):
        panels = [
            charts.by_test_length(part, name, guesses.get(task), interactive=False)
            for name, part in charts.panels(rows, "label")
        ]
        yield f"diagnostics-{charts.stem(task)}-length", charts.figure(panels, f"{task}: right answers by test length")
