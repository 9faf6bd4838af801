"""`lra profile`: work, speed and memory of encoders, as tables, CSV and figures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lra.cli.common import announce_loading, console, guarded
from lra.errors import UserError, unknown
from lra.profiling.budget import budget_of
from lra.registry import architectures

if TYPE_CHECKING:
    from lra.results.profile import Cell

PATIENCE = 450.0
"""Seconds of the quick form after which cells are not timed a third time."""
QUICK = {"lengths": "1024,2048,4096,8192,16384", "batch": 1, "d_model": 64, "layers": 2, "budget": 0.3}
FULL = {"lengths": ",".join(str(2**n) for n in range(8, 17)), "batch": 1, "d_model": 128, "layers": 4, "budget": 3.0}
LRA = {"lengths": "1024,2048,3072,4096", "batch": 32, "d_model": 64, "layers": 2, "budget": 3.0}
Size = Annotated[int | None, typer.Option(min=1, help="By default that of the form: quick, --full or --lra-table.")]


@guarded
def profile(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ARCH]...", help="All by default.")] = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated; 1024 to 16384 by default.")] = "",
    batch: Size = None,
    d_model: Size = None,
    layers: Size = None,
    direction: Annotated[str, typer.Option(help="causal or bidirectional.")] = "bidirectional",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    budget: Annotated[float | None, typer.Option(min=0.01, help="Seconds for each timing.")] = None,
    full: Annotated[bool, typer.Option("--full", help="256 to 65,536 tokens, d_model 128, 4 layers: hours.")] = False,
    lra_table: Annotated[
        bool, typer.Option("--lra-table", help="The table of the LRA paper: bytes, 1K to 4K tokens, batch 32.")
    ] = False,
    tree: Annotated[bool, typer.Option("--tree", help="FLOPs of every module at the first length; no timing.")] = False,
    fit: Annotated[str, typer.Option(metavar="SIZE", help="Largest batch and length within a memory of 2GiB.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure stored cells again.")] = False,
) -> None:
    """Measure work, speed and memory of encoders, each cell in a fresh process, and write them to results/profile/."""
    base = FULL if full else LRA if lra_table else QUICK
    given = {"lengths": lengths, "batch": batch, "d_model": d_model, "layers": layers, "budget": budget}
    shape: dict[str, Any] = base | {key: value for key, value in given.items() if value}
    parts = str(shape["lengths"]).split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--lengths is {lengths!r}; expected whole numbers and commas, for example 1024,4096")
    if direction not in ("causal", "bidirectional"):
        raise UserError(f"--direction is {direction!r}; causal or bidirectional")
    from lra.results.profile import DTYPES, Cell

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES, where="--dtype")
    if fit:
        budget_of(fit)
    _check_size(shape, max(map(int, parts)))
    for name in names or []:
        architectures.declaration(name)
    announce_loading()
    chosen = names or architectures.names()
    if lra_table and names and "transformer" not in names:
        chosen = ["transformer", *names]
    # all architectures at one length before the next: an interrupted profile is complete up to a length
    cells = [
        Cell(name, length, shape["batch"], shape["d_model"], shape["layers"], direction, shape["budget"],
             "bytes" if lra_table else "", dtype)
        for length in sorted(map(int, parts)) for name in chosen
    ]  # fmt: skip
    if tree:
        for cell in cells[: len(chosen)]:
            _tree(cell)
    elif fit:
        _fit(cells[: len(chosen)], fit)
    else:
        _measure(cells, fresh, lra_table, PATIENCE if base is QUICK else math.inf)


def _check_size(shape: Mapping[str, Any], length: int) -> None:
    """Raise UserError if not even the input of the longest cell fits into memory."""
    from lra.training import device, sizes

    row, memory = 4 * shape["batch"] * shape["d_model"], sizes.total_memory(device.device_type())
    if memory and row * length > memory:
        fits = f"--lengths {memory // row}" if row < memory else f"--batch {memory // (4 * shape['d_model'] * length)}"
        raise UserError(
            f"{length:,} tokens with --batch {shape['batch']} and --d-model {shape['d_model']} need more than "
            f"{row * length / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}: at most {fits} "
            "can fit"
        )


def _measure(cells: Sequence[Cell], fresh: bool, lra_table: bool, patience: float) -> None:
    from lra.profiling import profiler
    from lra.reports import efficiency, table
    from lra.reports.lra_table import tables as lra_tables
    from lra.results import result

    begin = time.monotonic()
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        row = progress.add_task("starting", total=len(cells))

        def on_cell(cell: Cell, done: int, total: int) -> None:
            text = f"{cell.architecture} at {cell.length:,}" + (", again" if done >= len(cells) else "")
            progress.update(row, description=text, completed=done, total=total)

        records = profiler.profile(cells, result.folder(), fresh=fresh, patience=patience, on_cell=on_cell)
    records.sort(key=lambda p: (p.cell.architecture, p.cell.length))
    for shown in lra_tables(records, result.folder()) if lra_table else efficiency.tables(records):
        console.print(table.terminal(shown), *map(escape, shown.notes), sep="\n")
    for path in _write(result.folder()):
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"{len(cells)} cells in {(time.monotonic() - begin) / 60:.1f} min")


def _write(root: Path) -> list[Path]:
    """Write a CSV of all stored profiles, and their figures."""
    from lra import files
    from lra.reports import efficiency

    profiles, table = efficiency.load(root), root / "profile" / "profile.csv"
    with files.atomic(table) as temporary:
        temporary.write_text(efficiency.table_csv(profiles), encoding="utf-8")
    try:
        return [table, *efficiency.write_figures(profiles, root / "profile")]
    except ImportError:  # a machine with its own packages may lack Altair
        console.print("no figures: altair and vl-convert-python are not installed here")
        return [table]


def _tree(cell: Cell) -> None:
    import torch

    from lra.profiling import flops, profiler

    workload = profiler.Workload(cell, torch.device("cpu"))
    report = flops.count(workload.model, *profiler.first_of(workload.inputs(cell.length)))
    table = Table(title=f"{cell.architecture} at {cell.length:,}: FLOPs of one forward", title_justify="left")
    table.add_column("module")
    for column in ("MFLOP", "%"):
        table.add_column(column, justify="right")
    for name, work in report.tree.items():
        # a ModuleList is never called and has no row: its members are listed under the module above it
        above = [other for other in report.tree if name.startswith(f"{other}.")]
        label = name.removeprefix(f"{max(above, key=len)}.") if above else "all"
        if name != "Global" and not above:
            continue
        table.add_row("  " * len(above) + label, f"{work / 1e6:,.2f}", f"{100 * work / report.forward:.1f}")
    console.print(table)
    for name, work in sorted(report.operators.items(), key=lambda item: -item[1]):
        console.print(f"{name}: {work / 1e6:,.2f} MFLOP")
    hidden = report.forward - report.algorithmic
    console.print(f"multiply-add = 2; {hidden / 1e6:,.2f} MFLOP of these are attention scores that a causal mask drops")
    console.print(f"not counted: {', '.join(sorted(report.uncounted)) or 'nothing'}")


def _fit(cells: Sequence[Cell], text: str) -> None:
    from lra.profiling import fit as search

    budget = budget_of(text)
    table = Table(title=f"largest training step in {text}", title_justify="left", pad_edge=False)
    for column in ("architecture", "batch at L", "MiB", "length at batch", "MiB"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for cell in cells:
        row = [cell.architecture]
        for vary, other in (("batch", cell.length), ("length", cell.batch)):
            with console.status(f"{cell.architecture}: {vary}"):
                largest = search.fit(cell, vary, budget)
            more = "≥ " if largest.capped else ""
            row += [
                f"{more}{largest.value:,} at {other:,}" if largest.value else "none",
                f"{largest.peak / 2**20:,.0f}",
            ]
        table.add_row(*row)
    console.print(table)
