"""`lra leaderboard`, `lra diff`, `lra report`: what the results say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli.common import console, errors, guarded
from lra.errors import UserError

Filter = Annotated[str, typer.Option(metavar="NAME")]


@guarded
def leaderboard(
    formats: Annotated[str, typer.Option("--format", help="Comma-separated: md,csv,tex,html; all by default.")] = "",
    task: Filter = "",
    protocol: Filter = "",
    recipe: Filter = "",
    regime: Filter = "",
    device: Annotated[str, typer.Option(metavar="NAME", help="A part of its name, for example h200.")] = "",
    literature: Annotated[bool, typer.Option("--reported", help="Show what the literature reports, too.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write there, filtered or not.")] = None,
) -> None:
    """Print the table of all results and write it beside them; with a filter print only, in --format where given."""
    from lra.reports import leaderboard as board
    from lra.reports import sheets, tables
    from lra.results import result
    from lra.results.collection import Collection

    chosen = [f for f in formats.split(",") if f] or list(tables.FORMATS)
    root, whole = result.folder(), Collection.read(result.folder())
    for line in whole.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    if not whole.records:
        console.print(f"no results in {root / 'runs'} yet: `make listops` makes one", soft_wrap=True)
        return
    found = whole.only(task=task, protocol=protocol, recipe=recipe, regime=regime, device=device)
    if not found.records:
        raise UserError("no result matches all of these filters")
    filtered = bool(task or protocol or recipe or regime or device)
    if filtered and formats and out is None:
        for form in chosen:
            print(tables.build(found, form), end="")
        return
    shown = board.sheets(found)
    if literature and (beside := board.beside(board.rows(found.records, found.answers), found)):
        shown.append(beside)
    for sheet in shown:
        console.print(sheets.terminal(sheet), *map(escape, sheet.notes), sep="\n")
    if out is None and filtered:
        return
    for path in tables.write(out or root, found, chosen):
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)
    readme = root.parent / "README.md"
    if not filtered and out is None and tables.update_readme(readme, found):
        console.print(f"updated the table in {escape(str(readme))}", soft_wrap=True)


@guarded
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A run: its id, the start of it, or its file.")],
    second: Annotated[str, typer.Argument(metavar="B")],
) -> None:
    """Every field in which two runs differ; exit code 1 where there is one, 0 where they are the same."""
    from lra.reports import comparison
    from lra.results import result
    from lra.results.collection import Collection

    found = Collection.read(result.folder())
    a, b = comparison.find(found, first), comparison.find(found, second)
    differences = comparison.differences(a, b)
    if not differences:
        console.print("no field differs")
        return
    table = Table(pad_edge=False)
    for column in ("field", a["id"], b["id"]):
        table.add_column(escape(column), overflow="fold")
    for field, mine, theirs in differences:
        table.add_row(escape(field), escape(mine), escape(theirs))
    console.print(table)
    if line := comparison.predictions(found, a, b):
        console.print(line)
    raise typer.Exit(1)


@guarded
def report(
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write it; results/ by default.")] = None,
) -> None:
    """Write one HTML file with every result, figure and piece of evidence; it opens from disk, without a network."""
    from lra.reports import report as page
    from lra.results import result
    from lra.results.collection import Collection

    root = result.folder()
    found = Collection.read(root)
    for line in found.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    console.print(f"wrote {escape(str(page.write(found, root, out or root)))}", soft_wrap=True)
