"""`lra doctor`, `lra bench`: are the operators right on this machine, and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli.common import console, guarded

if TYPE_CHECKING:
    from lra.operators.bench import Peers


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
    op: Annotated[str, typer.Argument(help="One operator; all by default.")] = "",
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 1.5,
) -> None:
    """Time each operator beside what this machine can do; written to results/bench/ when all are measured."""
    from lra.operators.bench import no_peers

    time_operators(op, budget, no_peers)


def time_operators(op: str, budget: float, peers: Peers) -> None:
    """Time one operator or all, beside the peers, print the table and write it where all were timed."""
    from lra.operators import bench as benchmark
    from lra.operators import parity
    from lra.results import result
    from lra.training.device import device

    here = device()
    with console.status("starting") as status:
        ops = [op] if op else parity.operators()
        lines = list(
            benchmark.bench(ops, here, budget=budget, peers=peers, seen=lambda name: status.update(f"timing {name}"))
        )
    bandwidth, rate = (max(getattr(line.machine, name) for line in lines) for name in ("bandwidth", "rate"))
    table = Table(
        title=f"at best {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s, {here.type}; floors beside each case",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("operator", "case", "by", "pass", "ms", "GB/s", "GFLOP/s", "x floor"):
        table.add_column(column, justify="left" if column in ("operator", "case", "by", "pass") else "right")
    for line in lines:
        seconds = line.timing.median
        by = line.implementation if here.type == "cpu" else f"{line.implementation}, {line.dtype}"
        table.add_row(
            line.op, line.case, by, line.passes, f"{1e3 * seconds:.2f}", f"{line.bytes / seconds / 1e9:.1f}",
            f"{line.flops / seconds / 1e9:.1f}", f"{seconds / line.floor:.1f}",
        )  # fmt: skip
    console.print(table)
    if not op:
        path = benchmark.write(benchmark.frame(lines, here), here.type, result.folder())
        console.print(f"wrote {path}", soft_wrap=True)
