"""`lra claims`: published claims beside what the runs on diagnostic tasks say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lra.cli.common import console, errors, guarded
from lra.cli.lists import show_table

if TYPE_CHECKING:
    from lra.results.claims import Judgement


@guarded
def claims(
    name: Annotated[str, typer.Argument(metavar="[ID]", help="A claim, such as C2; all by default.")] = "",
) -> None:
    """Published claims about architectures: agree, disagree or undecided, by the runs in results/diagnostics."""
    from lra.results import claims as published
    from lra.results import result
    from lra.results.collection import Collection

    chosen = [published.read(identity) for identity in ([name] if name else published.names())]
    collection = Collection.read(result.folder(), "diagnostics")
    for line in collection.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    judgements = [published.judge(claim, collection.records) for claim in chosen]
    if name:
        _show(judgements[0])
        return
    for judgement in judgements:
        claim = judgement.claim
        measured = sum(finding.estimate is not None for finding in judgement.findings)
        console.print(
            f"[bold]{claim.id}[/] {judgement.outcome} ({measured} of {len(claim.cells)} measured): "
            f"{escape(claim.statement)} {escape(claim.source)}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


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
