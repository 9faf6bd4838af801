"""`lra profile`: work, speed and memory of encoders, as tables, CSV and plots."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lra.cli.common import console, guarded
from lra.errors import UserError
from lra.registry import architectures

if TYPE_CHECKING:
    from lra.profiling.profiler import Cell

PATIENCE = 450.0
"""Seconds of the quick form after which cells are not timed a third time."""
QUICK = {"lengths": "512,1024,2048", "batch": 1, "d_model": 64, "layers": 2, "budget": 0.3}
FULL = {"lengths": ",".join(str(2**n) for n in range(8, 17)), "batch": 1, "d_model": 128, "layers": 4, "budget": 3.0}
LRA = {"lengths": "1024,2048,3072,4096", "batch": 32, "d_model": 64, "layers": 2, "budget": 3.0}
Size = Annotated[int | None, typer.Option(min=1)]


@guarded
def profile(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ARCH]...", help="All by default.")] = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated; 512,1024,2048 by default.")] = "",
    batch: Size = None,
    d_model: Size = None,
    layers: Size = None,
    direction: Annotated[str, typer.Option(help="causal or bidirectional.")] = "bidirectional",
    budget: Annotated[float | None, typer.Option(min=0.01, help="Seconds for each timing.")] = None,
    full: Annotated[bool, typer.Option("--full", help="256 to 65,536 tokens, d_model 128, 4 layers: hours.")] = False,
    lra_table: Annotated[bool, typer.Option("--lra-table", help="LRA's table: bytes, 1K to 4K, batch 32.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="FLOPs of every module at the first length; no timing.")] = False,
    fit: Annotated[str, typer.Option(metavar="SIZE", help="Largest batch and length in so much memory: 2GiB.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is on file.")] = False,
) -> None:
    """Work, speed and memory of encoders, each cell in a fresh process; written to results/profile/ as it goes."""
    for name in names or []:
        architectures.get(name)
    base = FULL if full else LRA if lra_table else QUICK
    given = {"lengths": lengths, "batch": batch, "d_model": d_model, "layers": layers, "budget": budget}
    shape: dict[str, Any] = base | {key: value for key, value in given.items() if value}
    parts = str(shape["lengths"]).split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--lengths is {lengths!r}; expected whole numbers and commas, for example 1024,4096")
    if direction not in ("causal", "bidirectional"):
        raise UserError(f"--direction is {direction!r}; causal or bidirectional")
    from lra.profiling.profiler import Cell

    chosen = names or architectures.names()
    if lra_table and names and "transformer" not in names:
        chosen = ["transformer", *names]
    # all architectures at one length before the next: what is interrupted is complete up to there
    cells = [
        Cell(name, length, shape["batch"], shape["d_model"], shape["layers"], direction, shape["budget"],
             "bytes" if lra_table else "")
        for length in sorted(map(int, parts)) for name in chosen
    ]  # fmt: skip
    if tree:
        for cell in cells[: len(chosen)]:
            _tree(cell)
    elif fit:
        _fit(cells[: len(chosen)], fit)
    else:
        _measure(cells, fresh, lra_table, PATIENCE if base is QUICK else math.inf)


def _measure(cells: Sequence[Cell], fresh: bool, lra_table: bool, patience: float) -> None:
    from lra.profiling import profiler
    from lra.reports import efficiency, sheets
    from lra.reports.lra_table import sheets as lra_sheets
    from lra.results import result

    begin = time.monotonic()
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        row = progress.add_task("starting", total=len(cells))

        def seen(cell: Cell, done: int, total: int) -> None:
            said = f"{cell.architecture} at {cell.length:,}" + (", again" if done >= len(cells) else "")
            progress.update(row, description=said, completed=done, total=total)

        found = profiler.profile(cells, result.folder(), fresh=fresh, patience=patience, seen=seen)
    found.sort(key=lambda p: (p["cell"]["architecture"], p["cell"]["length"]))
    shown = lra_sheets(found, result.folder()) if lra_table else efficiency.sheets(found)
    for sheet in shown:
        console.print(sheets.terminal(sheet), *map(escape, sheet.notes), sep="\n")
    for path in _write(result.folder()):
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"{len(cells)} cells in {(time.monotonic() - begin) / 60:.1f} min")


def _write(root: Path) -> list[Path]:
    """CSV of everything that is on file, and its plots."""
    from lra import files
    from lra.reports import efficiency

    profiles, written = efficiency.load(root), [root / "profile" / "profile.csv"]
    with files.atomic(written[0]) as temporary:
        temporary.write_text(efficiency.table_csv(profiles), encoding="utf-8")
    try:
        from lra.reports import pictures
    except ImportError:  # a machine with its own packages may have no matplotlib
        console.print("no plots: matplotlib is not installed here")
        return written
    return written + pictures.write(profiles, root / "profile")


def _tree(cell: Cell) -> None:
    import torch

    from lra.profiling import flops, profiler

    subject = profiler.Subject(cell, torch.device("cpu"))
    report = flops.count(subject.model, *profiler.first_of(subject.inputs(cell.length)))
    table = Table(title=f"{cell.architecture} at {cell.length:,}: FLOPs of one forward", title_justify="left")
    table.add_column("module")
    for column in ("MFLOP", "%"):
        table.add_column(column, justify="right")
    for name, work in report.tree.items():
        # a list of modules is never called and has no row: its members hang from what is above it
        above = [other for other in report.tree if name.startswith(f"{other}.")]
        label = name.removeprefix(f"{max(above, key=len)}.") if above else "all"
        if name != "Global" and not above:
            continue
        table.add_row("  " * len(above) + label, f"{work / 1e6:,.2f}", f"{100 * work / report.forward:.1f}")
    console.print(table)
    for name, work in sorted(report.operators.items(), key=lambda item: -item[1]):
        console.print(f"{name}: {work / 1e6:,.2f} MFLOP")
    hidden = report.forward - report.algorithmic
    console.print(f"multiply-add = 2; of these, {hidden / 1e6:,.2f} MFLOP are scores a causal flag discards")
    console.print(f"not counted: {', '.join(sorted(report.uncounted)) or 'nothing'}")


def _fit(cells: Sequence[Cell], text: str) -> None:
    from lra.profiling import fit as search

    budget = search.budget_of(text)
    table = Table(title=f"largest training step in {text}", title_justify="left", pad_edge=False)
    for column in ("architecture", "batch at L", "MiB", "length at batch", "MiB"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for cell in cells:
        row = [cell.architecture]
        for vary, other in (("batch", cell.length), ("length", cell.batch)):
            with console.status(f"{cell.architecture}: {vary}"):
                found = search.fit(cell, vary, budget)
            more = "≥ " if found.capped else ""
            row += [f"{more}{found.value:,} at {other:,}" if found.value else "none", f"{found.peak / 2**20:,.0f}"]
        table.add_row(*row)
    console.print(table)
