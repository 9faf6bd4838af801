"""`lra doctor`, `lra bench`: are the operators right on this machine, and how fast."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli.common import console, guarded


@guarded
def doctor(
    op: Annotated[str, typer.Argument(help="One operator; all by default.")] = "",
    fresh: Annotated[bool, typer.Option(help="Check again what is known already.")] = False,
) -> None:
    """Which implementations of each operator are here, and whether each is right on this machine."""
    from lra.errors import unknown
    from lra.operators import doctor as diagnosis
    from lra.operators import parity
    from lra.training.device import device

    if op and op not in parity.operators():
        raise unknown("operator", op, parity.operators())
    table = Table(pad_edge=False)
    for column in ("operator", "implementation", "status", "error", "detail"):
        table.add_column(column, overflow="fold")
    with console.status("checking") as status:
        ops = [op] if op else parity.operators()
        found = diagnosis.examine(ops, device(), fresh=fresh, seen=lambda name: status.update(f"checking {name}"))
    for d in found:
        colour = {"right": "green", "wrong": "red"}.get(d.status, "dim")
        error = "" if d.status == "absent" else f"{d.error:.1e}"
        table.add_row(d.op, d.implementation, f"[{colour}]{d.status}[/]", error, escape(d.detail))
    console.print(table)
    if any(d.status == "wrong" for d in found):
        raise typer.Exit(1)


@guarded
def bench(
    op: Annotated[str, typer.Argument(help="One operator or, with --models, architecture; all by default.")] = "",
    models: Annotated[
        bool, typer.Option("--models", help="Training steps of encoders beside other packages'.")
    ] = False,
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 1.5,
) -> None:
    """Time of each operator beside what this machine could do; written to results/bench/ when all are measured."""
    from lra.operators import bench as benchmark
    from lra.operators import parity
    from lra.results import result
    from lra.training.device import device

    here = device()
    if models:
        _models(op, budget)
        return
    with console.status("starting") as status:
        measured = benchmark.bench(
            [op] if op else parity.operators(), here, budget=budget, seen=lambda name: status.update(f"timing {name}")
        )
        lines = list(measured)
    bandwidth, rate = (max(getattr(x.machine, name) for x in lines) for name in ("bandwidth", "rate"))
    table = Table(
        title=f"at best {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s, {here.type}; floors beside each case",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("operator", "case", "by", "pass", "ms", "GB/s", "GFLOP/s", "x floor"):
        table.add_column(column, justify="left" if column in ("operator", "case", "by", "pass") else "right")
    for x in lines:
        s = x.timing.median
        by = x.implementation if here.type == "cpu" else f"{x.implementation}, {x.dtype}"
        table.add_row(
            x.op, x.case, by, x.passes, f"{1e3 * s:.2f}", f"{x.bytes / s / 1e9:.1f}",
            f"{x.flops / s / 1e9:.1f}", f"{s / x.floor:.1f}",
        )  # fmt: skip
    console.print(table)
    if not op:
        console.print(f"wrote {benchmark.write(lines, here, result.folder())}", soft_wrap=True)


def _models(name: str, budget: float) -> None:
    from lra.operators import bench as benchmark
    from lra.results import result
    from lra.training.device import device

    with console.status("starting") as status:
        found = benchmark.bench_models(
            [name] if name else [], device(), budget=budget, seen=lambda now: status.update(f"timing {now}")
        )
        steps = list(found)
    ours = {x.architecture: x.timing.median for x in steps if x.by == "lra"}
    table = Table(title="training step: forward, backward, AdamW", title_justify="left", pad_edge=False)
    for column in ("architecture", "by", "batch x L", "params", "ms", "IQR ms", "x ours"):
        table.add_column(column, justify="left" if column in ("architecture", "by") else "right")
    for x in steps:
        s = x.timing
        table.add_row(
            x.architecture, x.by, f"{x.shape.batch} x {x.shape.length:,}", f"{x.parameters / 1e3:,.0f}k",
            f"{1e3 * s.median:,.0f}", f"{1e3 * (s.high - s.low):,.0f}", f"{s.median / ours[x.architecture]:.2f}",
        )  # fmt: skip
    console.print(table)
    if not name:
        console.print(f"wrote {benchmark.write(steps, device(), result.folder())}", soft_wrap=True)
