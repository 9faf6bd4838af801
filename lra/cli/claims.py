"""`lra claims`: published claims compared with the runs on diagnostic tasks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lra.cli.common import DryRun, console, errors, guarded, process_start, seconds_of
from lra.cli.lists import show_table
from lra.errors import UserError

if TYPE_CHECKING:
    from lra.results.claims import Claim, Judgement
    from lra.sweeps.plans import Plan


@guarded
def claims(
    name: Annotated[str, typer.Argument(metavar="[ID]", help="A claim, such as C2; all by default.")] = "",
    run: Annotated[bool, typer.Option("--run", help="First train the missing runs.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="With --run: number of seeds of each cell.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="With --run: number of runs at a time.")] = 1,
    time_limit: Annotated[
        str, typer.Option(help="With --run: stop after 90s, 8m, 2h, ...; the next call continues.")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Compare published claims with the runs in results/diagnostics: agree, disagree or undecided."""
    from lra.results import claims as published
    from lra.results import result
    from lra.results.collection import Collection

    chosen = [published.read(identity) for identity in ([name] if name else published.names())]
    failed: Sequence[object] = ()
    if run or dry_run:
        from lra.sweeps import local

        seconds = seconds_of(time_limit)
        if seconds is not None:
            seconds -= time.monotonic() - process_start()
        failed = local.execute_plan(
            _plan(chosen, seeds, name or "all"), console, forecast=False, dry_run=dry_run, seconds=seconds, jobs=jobs
        )
        if dry_run:
            return
    elif time_limit:
        raise UserError("--time-limit is for --run, which trains the missing runs")
    collection = Collection.read(result.folder(), "diagnostics")
    for line in collection.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    judgements = [published.judge(claim, collection.records) for claim in chosen]
    if name:
        _show(judgements[0])
    for judgement in judgements if not name else ():
        claim = judgement.claim
        measured = sum(finding.estimate is not None for finding in judgement.findings)
        console.print(
            f"[bold]{claim.id}[/] {judgement.outcome} ({measured} of {len(claim.cells)} measured): "
            f"{escape(claim.statement)} {escape(claim.source)}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    if failed:
        raise typer.Exit(1)


def _plan(chosen: Sequence[Claim], seeds: int, name: str) -> Plan:
    """The runs that claims need, each once, the first seed of all cells before the second."""
    from lra.results import claims as published
    from lra.sweeps import plans

    needed: Iterable[plans.Cell] = (
        plans.Cell(cell.task, cell.architecture, seed, published.RECIPE, cell.settings, {}, cell.protocol)
        for seed in range(seeds)
        for claim in chosen
        for cell in claim.cells
    )
    cells = {" ".join(cell.arguments()): cell for cell in needed}
    return plans.Plan(published.folder() / f"claims-{name}", tuple(cells.values()), retries=1)


def _show(judgement: Judgement) -> None:
    claim = judgement.claim
    for line in (claim.statement, f"source: {claim.source}", f"published: {claim.published}", claim.remark):
        if line:
            console.print(escape(line), soft_wrap=True, highlight=False)
    rows = []
    for finding in judgement.findings:
        cell, estimate = finding.cell, finding.estimate
        settings = "".join(f" {key}={value}" for key, value in cell.settings.items())
        number = "-" if estimate is None else f"{100 * estimate.mean:.1f}"
        interval = "-" if estimate is None else f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
        where = f"{cell.task} ({cell.protocol})"
        rows.append([cell.architecture + settings, where, cell.expect, str(len(finding.seeds)), number, interval,
                     finding.outcome])  # fmt: skip
    console.print(
        f"{claim.measure} right on {claim.split}, in %; solved from {100 * claim.solves:g}, not solved up to "
        f"{100 * claim.fails:g}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    show_table(
        ("architecture", "task", "expected", "seeds", "%", "95 %", "outcome"), rows, right=("seeds", "%", "95 %")
    )
    for finding in judgement.findings:
        if finding.reason:
            console.print(f"{finding.cell.architecture}: {escape(finding.reason)}", soft_wrap=True, highlight=False)
    console.print(f"[bold]{judgement.outcome}[/]")
