"""`lra check`: conformance checks of architectures and tasks, gradient reach and first-token recall."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lra.cli.common import (
    announce_loading,
    complete_architecture,
    complete_task,
    console,
    guarded,
    settings_of,
)
from lra.config import recipe as recipes
from lra.errors import UserError, unknown
from lra.registry import Constructor, architectures, tasks

Checked = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="s4d, s4d/inv, net.py:Net; a task: parity, task.py:Task",
        autocompletion=lambda incomplete: [*complete_architecture(incomplete), *complete_task(incomplete)],
    ),
]


@guarded
def check(
    architecture: Checked,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An argument: encoder.layer.n_heads=4.")
    ] = None,
    reach: Annotated[
        bool, typer.Option("--reach", help="Plot the gradient of the last output over the inputs.")
    ] = False,
    recall: Annotated[bool, typer.Option("--recall", help="Train it to recall the first of 256 tokens.")] = False,
    png: Annotated[Path | None, typer.Option(help="With --reach: write the plot to this file.")] = None,
) -> None:
    """Run the conformance checks of an architecture, a layer of your own, or a task. Exit code 1 if one fails.

    --reach and --recall run instead of the checks."""
    options = recipes.encoder_options(settings_of(settings))
    if options and (reach or recall):
        raise UserError("--set is for the conformance checks; leave out --reach and --recall")
    if png is not None and not reach:
        raise UserError("--png writes the plot of --reach; add --reach")
    if _is_task(architecture):
        if options or reach or recall:
            raise UserError(f"{architecture} is a task; --set, --reach and --recall are for architectures")
        _check_task(architecture)
        return
    architectures.declaration(architecture)
    announce_loading()
    constructor = architectures.get(architecture)
    for key in options:
        if key not in constructor.options():
            raise unknown("argument", f"encoder.{key}", [f"encoder.{k}" for k in constructor.options()], architecture)
    if reach:
        _show_reach(constructor, png)
    if recall:
        _test_recall(constructor)
    if reach or recall:
        return
    from lra.conformance import suite

    findings = suite.check(architecture, options=options)
    console.print(suite.render(findings))
    # a single failure gives the reason why the other checks were not run
    if len(findings) != 1:
        _print_state_size(constructor, options)
    if any(f.failed for f in findings):
        raise typer.Exit(1)


def _is_task(reference: str) -> bool:
    if ":" not in reference:
        return reference in tasks.names()
    with suppress(UserError):
        tasks.get(reference)
        return True
    return False


def _check_task(reference: str) -> None:
    announce_loading()
    from lra.conformance import suite
    from lra.conformance import tasks as conformance

    findings = conformance.check(tasks.get(reference)())
    console.print(suite.render(findings))
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)


def _print_state_size(constructor: Constructor, options: Mapping[str, Any]) -> None:
    """Print the size of the recurrent state, if there is one."""
    causal = {"direction": "causal"} if "direction" in constructor.options() else {}
    try:
        encoder = constructor(**{"d_model": 128, "n_layers": 4, "length": 1024, **causal, **options})
        start, one, two = (encoder.state_bytes(tokens) for tokens in (0, 1, 2))
    except Exception:  # noqa: BLE001  (a user's layer may raise anything, which the checks report)
        return
    growth = f", plus {two - one:,} per token" if two > one else ""
    console.print(f"recurrent state at d_model 128, 4 layers: {max(start, one):,} bytes per sequence{growth}")


def _show_reach(constructor: Constructor, png: Path | None) -> None:
    from lra.conformance import reach as gradient_reach

    norms = gradient_reach.reach(constructor)
    console.print(gradient_reach.plot(norms), highlight=False, soft_wrap=True)
    console.print(f"|d last output / d input t|, untrained: first input {norms[0]:.1e}, last {norms[-1]:.1e}")
    if png is not None:
        from lra.reports import charts

        try:
            norms = norms.clamp_min(gradient_reach.FLOOR)
            charts.save(charts.gradient_reach(norms.tolist(), f"{constructor.name}, untrained"), png)
        except OSError as error:
            raise UserError(f"--png {png}: {error.strerror or error}") from None
        console.print(f"wrote {escape(str(png))}", soft_wrap=True)


def _test_recall(constructor: Constructor) -> None:
    from lra.conformance import recall as first_token
    from lra.encoder import Card
    from lra.profiling import memory

    memory.keep_freed()
    directions = ("causal", "bidirectional") if "direction" in constructor.options() else ("",)
    for direction in directions:
        try:
            with console.status("training") as status:
                outcome = first_token.recall(
                    constructor, direction=direction,
                    on_step=lambda step, accuracy: status.update(f"step {step}, {100 * accuracy:.0f} %"),
                )  # fmt: skip
        except UserError as error:  # the architecture may not support this direction
            console.print(escape(str(error)), soft_wrap=True)
            continue
        summary = f"{100 * outcome.accuracy:.1f} % after {outcome.steps} steps, {outcome.seconds:.0f} s"
        console.print(f"{direction or 'own direction'}: {summary}", highlight=False)
    card = getattr(constructor.cls, "card", None)
    if isinstance(card, Card) and card.no_recall and not constructor.preset:
        console.print(f"{constructor.name} is not expected to learn it: {card.no_recall}")
