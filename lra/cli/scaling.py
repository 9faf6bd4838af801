"""`lra scaling`: laws of the loss in compute, parameters and tokens, and the compute-optimal frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lra import files
from lra.cli.common import TaskName, console, errors, guarded
from lra.cli.report import FIGURES, Filter
from lra.errors import unknown

METRICS = ("bits", "loss", "error")
"""The metrics of lra.reports.scaling, repeated here to check arguments without importing pandas."""


@guarded
def scaling(
    task: TaskName,
    protocol: Filter = "",
    recipe: Filter = "",
    regime: Filter = "",
    metric: Annotated[str, typer.Option(help="bits, loss or error; by default bits for language, else loss.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write runs, frontier and figure there.")] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Formats of the figure, comma-separated: svg,png,pdf.")
    ] = "svg",
) -> None:
    """Fit scaling laws with intervals to the runs of a task, or give the reason why the runs do not determine them."""
    chosen = [form for form in formats.split(",") if form]
    for form in chosen:
        if form not in FIGURES:
            raise unknown("format", form, FIGURES)
    if metric and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if out is not None:
        files.check_writable(out, "give another --out")
    from lra.reports import scaling as report
    from lra.reports import table
    from lra.results import result
    from lra.results.collection import Collection

    everything = Collection.read(result.folder(), *report.PLACES)
    for line in everything.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    selected = everything.only(task=task, protocol=protocol, recipe=recipe, regime=regime)
    for study in report.studies(selected.records, metric):
        for shown in study.tables():
            console.print(table.terminal(shown), *map(escape, shown.notes), sep="\n")
        for path in study.write(out, chosen) if out is not None else ():
            console.print(f"wrote {escape(str(path))}", soft_wrap=True)
