"""`lra diagnose`: train an architecture on the diagnostic tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lra.cli.common import (
    DryRun,
    Settings,
    complete_architecture,
    console,
    errors,
    guarded,
    seconds_of,
    settings_of,
)
from lra.cli.train import refuse_mistakes, show_plan
from lra.config.recipe import OF_FAMILY
from lra.errors import Interrupted, UserError
from lra.registry import architectures, tasks

if TYPE_CHECKING:
    from lra.results.record import RunRecord


@guarded
def diagnose(
    architecture: Annotated[
        str,
        typer.Argument(
            metavar="[ARCH]",
            help="s4d, s4d/inv, net.py:Net; without it, all results are shown.",
            autocompletion=complete_architecture,
        ),
    ] = "",
    names: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="Comma-separated; all diagnostics by default.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    settings: Settings = None,
    time_limit: Annotated[str, typer.Option(help="Stop after 90s, 8m, 2h, ...; the next call continues.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Train an architecture, or your own layer, on the diagnostic tasks and show which of them it solves.

    Finished runs are not repeated. A task is a name, NAME:PROTOCOL, or file.py:Class."""
    if not architecture:
        _show_all()
        return
    from lra.training.request import Request, check, folder_of, read, resolve

    known = [name for name in tasks.names() if tasks.family(name) == "diagnostics"]
    architectures.declaration(architecture)
    requests = []
    for text in [name.strip() for name in names.split(",") if name.strip()] or known:
        name, protocol = _split(text)
        settled = settings_of(settings)
        request = Request(
            name, architecture, OF_FAMILY["diagnostics"], seed, protocol, settled, time_limit=seconds_of(time_limit)
        )
        check(request, read(request)[0])
        requests.append(request)
    if dry_run and len(requests) == 1:
        show_plan(requests[0], resolve(requests[0])[0])
        return
    if dry_run:
        for request in requests:
            console.print(request.command(), soft_wrap=True, markup=False, highlight=False)
        return
    from dataclasses import replace

    from lra.results import result
    from lra.training.run import run

    if ":" in architecture:
        refuse_mistakes(requests[0], read(requests[0])[0])
    records = []
    for number, request in enumerate(requests, 1):
        console.print(f"{number} of {len(requests)}: {request.task_name}", soft_wrap=True, markup=False)
        try:
            begun = folder_of(request, resolve(request)[0]).is_dir()
            records.append(result.read(run(replace(request, resume=begun), console)))
        except Interrupted:
            raise
        except UserError as error:
            # continue with the other tasks
            errors.print(f"[yellow]{escape(f'{request.task_name}: {error}')}[/]", soft_wrap=True)
    _show(records, f"Diagnostics of {architecture}")
    if len(records) < len(requests):
        raise typer.Exit(1)


def _show(records: Sequence[RunRecord], title: str) -> None:
    from lra.reports import diagnostics, table

    shown = diagnostics.table(records, title)
    console.print(table.terminal(shown), *map(escape, shown.notes), sep="\n")


def _show_all() -> None:
    """Print the table of all stored diagnostics."""
    from lra.results import result
    from lra.results.collection import Collection

    collection = Collection.read(result.folder(), "diagnostics")
    for line in collection.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    if not collection.records:
        console.print("no diagnostics yet: `lra diagnose lstm --tasks parity` makes one", soft_wrap=True)
        return
    _show(collection.records, "Diagnostics")


def _split(text: str) -> tuple[str, str]:
    """Task and protocol of `parity:final`; of a class in a file, `file.py:Class` or `file.py:Class:final`."""
    name, colon, protocol = text.rpartition(":")
    if colon and (name in tasks.names() or ":" in name):
        return name, protocol
    return text, ""
