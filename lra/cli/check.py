"""`lra check`: conformance, how far gradients reach, whether a first token is recalled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lra.cli.common import Architecture, console, guarded
from lra.errors import UserError
from lra.registry import Constructor, architectures


@guarded
def check(
    architecture: Architecture,
    reach: Annotated[bool, typer.Option("--reach", help="How much of the last output hangs on each input.")] = False,
    recall: Annotated[bool, typer.Option("--recall", help="Train it to recall the first of 256 tokens.")] = False,
    png: Annotated[Path | None, typer.Option(help="With --reach: write the plot to this file.")] = None,
) -> None:
    """Conformance checks of one architecture or of your own layer; exit code 1 when one fails.

    --reach and --recall run instead of them."""
    constructor = architectures.get(architecture)
    if png is not None and not reach:
        raise UserError("--png is for the plot of --reach")
    if reach:
        _reach(constructor, png)
    if recall:
        _recall(constructor)
    if reach or recall:
        return
    from lra.conformance import suite

    findings = suite.check(architecture)
    console.print(suite.render(findings))
    _state(constructor)
    if any(f.status in ("fail", "stale") for f in findings):
        raise typer.Exit(1)


def _state(constructor: Constructor) -> None:
    """One line on the size of the recurrent state, where there is one."""
    options = {"direction": "causal"} if "direction" in constructor.options() else {}
    try:
        encoder = constructor(d_model=128, n_layers=4, length=1024, **options)
        start, one, two = (encoder.state_bytes(tokens) for tokens in (0, 1, 2))
    except (NotImplementedError, UserError):
        return
    grows = f", and {two - one:,} more with each token" if two > one else ""
    console.print(f"recurrent state at d_model 128, 4 layers: {max(start, one):,} bytes a sequence{grows}")


def _reach(constructor: Constructor, png: Path | None) -> None:
    from lra.conformance import reach as gradient_reach

    norms = gradient_reach.reach(constructor)
    console.print(gradient_reach.plot(norms), highlight=False, soft_wrap=True)
    console.print(f"first input {norms[0]:.1e}, last {norms[-1]:.1e}: |d last output / d input t|, untrained")
    if png is not None:
        from lra.reports import charts

        try:
            norms = norms.clamp_min(gradient_reach.FLOOR)
            charts.save(charts.gradient_reach(norms.tolist(), f"{constructor.name}, untrained"), png)
        except OSError as error:
            raise UserError(f"--png {png}: {error.strerror or error}") from None
        console.print(f"wrote {escape(str(png))}", soft_wrap=True)


def _recall(constructor: Constructor) -> None:
    from lra.conformance import recall as first_token
    from lra.profiling import memory

    memory.keep_freed()
    both = ("causal", "bidirectional") if "direction" in constructor.options() else ("",)
    for direction in both:
        try:
            with console.status("training") as status:
                found = first_token.recall(
                    constructor, direction=direction,
                    seen=lambda step, right: status.update(f"step {step}, {100 * right:.0f} %"),
                )  # fmt: skip
        except UserError as refused:  # a direction may be
            console.print(escape(str(refused)), soft_wrap=True)
            continue
        said = f"{100 * found.accuracy:.1f} % after {found.steps} steps, {found.seconds:.0f} s"
        console.print(f"{direction or 'as it is'}: {said}", highlight=False)
    name = constructor.name.partition("/")[0]
    if name in first_token.CANNOT:
        console.print(f"{name} is not expected to learn it: {first_token.CANNOT[name]}")
