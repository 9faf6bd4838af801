"""`lra data` and `lra audit`: prepare, verify, pack and inspect the data of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli import lists
from lra.cli.common import ProtocolName, Source, TaskName, console, errors, guarded
from lra.cli.lists import AsJson
from lra.errors import UserError
from lra.registry import tasks

if TYPE_CHECKING:
    from lra.data.prepared_sets import Prepared

data = typer.Typer(no_args_is_help=True, help="Prepare, verify, pack and inspect the data of a task.")


@data.command("list")
@guarded
def data_list(
    pattern: Annotated[str, typer.Argument(help="Pattern of task names, such as 'path*'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List tasks and protocols with the size of prepared data on this machine; with a pattern also notes."""
    from lra.data import prepared_sets
    from lra.task import DataError

    rows = []
    for name in lists.match_tasks(pattern):
        task = tasks.get(name)()
        for protocol in task.protocols.values():
            folder, damaged = None, False
            try:
                folder = prepared_sets.find_prepared(task, protocol)
            except DataError:
                damaged = True
            size = sum(f.stat().st_size for f in folder.folder.rglob("*") if f.is_file()) if folder else None
            rows.append({
                "task": name, "protocol": protocol.name, "length": protocol.length, "classes": task.classes,
                "input": protocol.encoding, "chance": task.chance(protocol), "bytes": size, "damaged": damaged,
                "counts": dict(protocol.counts), "budget": dict(protocol.budget), "amounts": protocol.amounts,
                "note": protocol.note, "raw": protocol.raw,
            })  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        [
            str(row["task"]), str(row["protocol"]), f"{row['length']:,}", str(row["classes"]),
            "tokens" if row["input"] == "tokens" else "values",
            "-" if row["chance"] is None else f"{100 * row['chance']:.0f} %",
            "damaged" if row["damaged"] else lists.size_text(row["bytes"]),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ("task", "protocol", "length", "classes", "input", "chance", "on disk")
    lists.show_table(columns, cells, right=("length", "classes", "chance", "on disk"))
    if pattern == "*":
        console.print("for notes and numbers of examples: `lra data list TASK`", soft_wrap=True)
        return
    for row in rows:
        console.print(f"{row['task']} {row['protocol']}: {row['note']}; {row['amounts']}", soft_wrap=True, markup=False)


@data.command()
@guarded
def prepare(
    task: TaskName,
    protocol: ProtocolName = "",
    source: Source = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes or threads; all CPUs by default.")] = None,
) -> None:
    """Prepare the data of a task if they are not prepared yet."""
    prepared = _load(task, protocol, source, workers)
    for split, count in prepared.manifest["counts"].items():
        console.print(f"{split:<11} {count:>9,}  {prepared.manifest['sha256'][split]}", soft_wrap=True)
    console.print(f"in {escape(str(prepared.folder))}", soft_wrap=True)


@data.command()
@guarded
def verify(task: TaskName, protocol: ProtocolName = "") -> None:
    """Read the prepared data again and compare them with their checksums. Exit code 2 if they differ."""
    from lra import terminal
    from lra.data import prepared_sets

    with terminal.progress_bar(console, f"verifying {task}") as progress:
        problems = prepared_sets.verify(task, protocol or None, progress=progress)
    if problems:
        for problem in problems:
            errors.print(f"[red]error:[/] {escape(problem)}", soft_wrap=True)
        raise typer.Exit(2)
    console.print(f"{task}: the data match their manifest and their protocol")


@data.command()
@guarded
def pack(
    task: TaskName,
    protocol: ProtocolName = "",
    to: Annotated[Path | None, typer.Option(help="File to write; default: TASK-PROTOCOL.tar.xz.")] = None,
    source: Source = None,
) -> None:
    """Write prepared data to one compressed file, for a machine without network."""
    from lra import terminal
    from lra.data import pack as packs

    prepared = _load(task, protocol, source)
    with terminal.progress_bar(console, f"packing {task}") as progress:
        path = to or Path(f"{prepared.task.name}-{prepared.protocol.name}.tar.xz")
        size = packs.pack(prepared, path, progress)
    console.print(f"wrote {escape(str(path))}, {size / 2**20:.1f} MiB", soft_wrap=True)


@data.command()
@guarded
def unpack(file: Annotated[Path, typer.Argument(help="File that `lra data pack` wrote.")]) -> None:
    """Compare packed data with their checksums and add them to the cache."""
    from lra import terminal
    from lra.data import pack as packs

    with terminal.progress_bar(console, f"unpacking {file.name}") as progress:
        prepared = packs.unpack(file, progress)
    console.print(f"{prepared.task.name} ({prepared.protocol.name}) in {prepared.folder}", soft_wrap=True)


@data.command("show")
@guarded
def show_examples(
    task: TaskName,
    protocol: ProtocolName = "",
    split: Annotated[str, typer.Option(help="train, validation, test, or another of the protocol.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=64, help="Number of examples.")] = 4,
    png: Annotated[Path | None, typer.Option(help="Write the examples of an image task to this file.")] = None,
    source: Source = None,
) -> None:
    """Show a few examples of a task."""
    from lra import terminal
    from lra.data import prepared_sets
    from lra.errors import unknown

    splits = prepared_sets.resolve(task, protocol or None)[1].splits
    if split not in splits:
        raise unknown("split", split, splits)
    prepared = _load(task, protocol, source)
    examples = prepared.split(split)
    numbers = range(min(count, len(examples)))
    for number in numbers:
        console.print(escape(prepared.task.describe(examples, number)), soft_wrap=True)
    if png is not None:
        if not hasattr(prepared.task, "picture"):
            raise UserError(f"--png: the examples of {task} are not images")
        terminal.contact_sheet([prepared.task.picture(examples, number) for number in numbers], png)
        console.print(f"wrote {escape(str(png))}", soft_wrap=True)


@guarded
def audit(task: TaskName, protocol: ProtocolName = "", source: Source = None) -> None:
    """Show label balance, lengths, repeated examples and overlap between splits."""
    from lra.data import audit as audits

    prepared = _load(task, protocol, source)
    with console.status("reading every example"):
        statistics = audits.audit(prepared)
    table = Table(title=f"{task} ({prepared.protocol.name})", title_justify="left", pad_edge=False)
    for column in ("split", "examples", "min", "median", "mean", "max", "repeated", "labels %"):
        table.add_column(column, justify="left" if column in ("split", "labels %") else "right")
    for s in statistics.splits:
        low, median, mean, high = s.lengths
        shares = " ".join(f"{100 * share:.1f}" for share in s.labels)
        table.add_row(
            s.split, f"{s.count:,}", f"{low:,}", f"{median:,.0f}", f"{mean:,.0f}", f"{high:,}", str(s.repeated), shares
        )
    console.print(table)
    for (first, second), count in statistics.overlap.items():
        console.print(f"{count:,} examples of {second} also occur in {first}, byte for byte")
    for key, value in prepared.notes.items():
        if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            _print_rows(key, value)
            continue
        text = f"{len(value):,}" if isinstance(value, list) else str(value)
        console.print(f"{escape(key)}: {escape(text)}", soft_wrap=True)


def _load(task: str, protocol: str, source: Path | None, workers: int | None = None) -> Prepared:
    """The prepared set of a task, prepared now if necessary. Prints a line if it replaces an earlier one."""
    from lra import terminal
    from lra.data import prepared_sets

    with terminal.progress_bar(console, f"preparing {task}") as progress:
        prepared = prepared_sets.load_prepared(
            task, protocol or None, source=source, workers=workers, progress=progress
        )
    if prepared.replaced:
        console.print(f"[yellow]{escape(prepared.replaced)}; prepared again[/]", soft_wrap=True)
    return prepared


def _print_rows(title: str, rows: dict[str, dict[str, object]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(title=escape(title), title_justify="left", pad_edge=False)
    for column in ("", *columns):
        table.add_column(escape(column), justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(escape(name), *(escape(str(row.get(column, ""))) for column in columns))
    console.print(table)
