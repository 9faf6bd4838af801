"""`lra leaderboard`, `lra compare`, `lra report`: tables and comparisons of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lra import files
from lra.cli.common import console, errors, guarded
from lra.errors import UserError, unknown
from lra.registry import tasks

if TYPE_CHECKING:
    from lra.reports.ranking import Leaderboard
    from lra.results.collection import Collection

FORMATS = ("md", "csv", "tex", "html")
"""The formats of lra.reports.leaderboard, repeated here to check arguments without importing pandas."""
FIGURES = ("svg", "png", "pdf")
"""The formats of lra.reports.charts."""
Filter = Annotated[str, typer.Option(metavar="NAME", help="Only results with this value.")]


@guarded
def leaderboard(
    formats: Annotated[str, typer.Option("--format", help="Comma-separated: md,csv,tex,html; all by default.")] = "",
    task: Filter = "",
    protocol: Filter = "",
    recipe: Filter = "",
    regime: Filter = "",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Only results of devices with this in their name, for example h200.")
    ] = "",
    literature: Annotated[bool, typer.Option("--reported", help="Also show published results.")] = False,
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="Show accuracy per FLOP, tokens per MiB and tokens per second instead.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the files there.")] = None,
) -> None:
    """Print the tables of all results and write them to files. With a filter, only print them, in --format if given.

    Language tasks have tables of their own, which --task imdb_lm prints."""
    chosen = [form for form in formats.split(",") if form] or list(FORMATS)
    for form in chosen:
        if form not in FORMATS:
            raise unknown("format", form, FORMATS)
    from lra.results import result

    root = result.folder()
    if task in tasks.names() and tasks.family(task) == "language":
        if formats or out is not None or regime or literature or efficiency:
            raise UserError(
                f"the tables of {task} are printed only; leave out --format, --out, --regime, --reported, --efficiency"
            )
        _show_language(root, task=task, protocol=protocol, recipe=recipe, device=device)
        return
    if out is not None:
        files.check_writable(out, "give another --out")
    from lra.reports import leaderboard as board
    from lra.reports import readme, table
    from lra.reports.ranking import Leaderboard
    from lra.results.collection import Collection

    everything = Collection.read(root)
    for line in everything.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    if not everything.records:
        found = any((root / "diagnostics").rglob("*.json"))
        what = (
            "`lra diagnose` shows those of diagnostic tasks"
            if found
            else "`lra run listops gru --recipe standard` makes one"
        )
        console.print(f"no results in {root / 'runs'} yet: {what}", soft_wrap=True)
        return
    selected = everything.only(task=task, protocol=protocol, recipe=recipe, regime=regime, device=device)
    if not selected.records:
        raise UserError("no result matches all of these filters")
    ranked = Leaderboard.of(selected)
    if efficiency:
        _show_efficiency(ranked, selected)
        return
    filtered = bool(task or protocol or recipe or regime or device)
    if filtered and formats and out is None:
        for form in chosen:
            print(board.build(ranked, form), end="")
        return
    shown = board.all_tables(ranked)
    if literature and (beside := board.beside(ranked)):
        shown.append(beside)
    for each in shown:
        console.print(table.terminal(each), *map(escape, each.notes), sep="\n")
    if out is None and filtered:
        return
    for path in board.write(out or root, ranked, chosen):
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)
    path = root.parent / "README.md"
    if not filtered and out is None and (sections := readme.update(path, ranked)):
        console.print(f"updated {' and '.join(sections)} in {escape(str(path))}", soft_wrap=True)


def _show_efficiency(board: Leaderboard, collection: Collection) -> None:
    from lra.reports import efficiency, table

    for each in efficiency.metric_tables(efficiency.metrics(board, collection.profiles)):
        console.print(table.terminal(each), *map(escape, each.notes), sep="\n")


def _show_language(root: Path, **filters: str) -> None:
    """Print the tables of a language task, which are not part of the leaderboard."""
    from lra.reports import language, table
    from lra.results.collection import Collection

    everything = Collection.read(root, "language")
    for line in everything.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    if not everything.records:
        console.print(
            f"no results in {root / 'language'} yet: `lra run {filters['task']} gru` makes one", soft_wrap=True
        )
        return
    for each in language.tables(everything.only(**filters).records):
        console.print(table.terminal(each), *map(escape, each.notes), sep="\n")


@guarded
def compare(
    given: Annotated[
        list[str], typer.Argument(metavar="A B [C ...]", help="Runs: an id, the start of an id, or a file each.")
    ],
) -> None:
    """Show the paired difference in accuracy of two runs with its interval and p, and the settings that differ.

    More than two runs are a ladder: runs that differ only in the seed form a row, compared with the row before."""
    if len(given) < 2:
        raise UserError("give at least two runs to compare")
    from lra.reports import comparison, table

    if len(given) > 2:
        steps = comparison.ladder(given)
        console.print(table.terminal(steps), *map(escape, steps.notes), sep="\n")
        return
    runs = comparison.compare(given[0], given[1])
    console.print(escape(str(runs)))
    if runs.fields:
        console.print(table.terminal(runs.table()))
    else:
        console.print("no setting differs")


@guarded
def report(
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder of the file; results/ by default.")] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write every figure there, for a paper.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Formats of the figures, comma-separated: svg,png,pdf.")
    ] = "svg,png",
) -> None:
    """Write one HTML file with all results, figures and the records behind them. It needs no network to open."""
    suffixes = [form for form in formats.split(",") if form]
    for form in suffixes:
        if form not in FIGURES:
            raise unknown("format", form, FIGURES)
    from lra.results import result

    root = result.folder()
    files.check_writable(out or root, "give another --out" if out else "set LRA_RESULTS")
    if figures is not None:
        files.check_writable(figures, "give another --figures")
    from lra.reports import report as page
    from lra.results.collection import Collection

    collection = Collection.read(root)
    for line in collection.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    console.print(f"wrote {escape(str(page.write(collection, root, out or root)))}", soft_wrap=True)
    if figures is not None:
        from lra.reports import figures as drawn

        written = drawn.write(collection, root, figures, [f".{form}" for form in suffixes])
        console.print(f"wrote {len(written)} files to {escape(str(figures))}", soft_wrap=True)
