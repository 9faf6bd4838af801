"""`lra doctor` and `lra bench`: correctness and speed of the operators on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli.common import announce_loading, console, guarded
from lra.errors import unknown
from lra.operators import operators

if TYPE_CHECKING:
    from lra.operators.bench import Peers


@guarded
def doctor(
    op: Annotated[str, typer.Argument(help="Operator to check; default: all.")] = "",
    fresh: Annotated[bool, typer.Option(help="Check again instead of reading the cache.")] = False,
) -> None:
    """Check which implementations of each operator run on this machine and whether they match the reference."""
    _check_operator(op)
    announce_loading()
    from lra.operators import doctor as diagnosis
    from lra.training.device import device

    table = Table(pad_edge=False)
    for column in ("operator", "implementation", "status", "error", "detail"):
        table.add_column(column, overflow="fold")
    with console.status("checking") as status:
        ops = [op] if op else operators()
        diagnoses = diagnosis.examine(
            ops, device(), fresh=fresh, on_operator=lambda name: status.update(f"checking {name}")
        )
    for d in diagnoses:
        colour = {"right": "green", "wrong": "red"}.get(d.status, "dim")
        error = "" if d.status == "absent" else f"{d.error:.1e}"
        table.add_row(d.op, d.implementation, f"[{colour}]{d.status}[/]", error, escape(d.detail))
    console.print(table)
    if any(d.status == "wrong" for d in diagnoses):
        raise typer.Exit(1)


def _check_operator(op: str) -> None:
    if op and op not in operators():
        raise unknown("operator", op, operators())


@guarded
def bench(
    op: Annotated[str, typer.Argument(help="Operator to time; default: all.")] = "",
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds per measurement.")] = 1.5,
) -> None:
    """Time the operators and compare them with the limits of this machine. Without OP, also write results/bench/."""
    _check_operator(op)
    announce_loading()
    from lra.operators.bench import no_peers

    time_operators(op, budget, no_peers)


def time_operators(op: str, budget: float, peers: Peers) -> None:
    """Time one operator, or all if `op` is empty, and its peers. Prints a table, and writes it if all were timed."""
    from lra.operators import bench as benchmark
    from lra.results import result
    from lra.training.device import device

    target = device()
    with console.status("starting") as status:
        ops = [op] if op else operators()
        measurements = list(
            benchmark.bench(
                ops, target, budget=budget, peers=peers, on_case=lambda name: status.update(f"timing {name}")
            )
        )
    bandwidth, rate = (max(getattr(m.machine, name) for m in measurements) for name in ("bandwidth", "rate"))
    table = Table(
        title=f"{target.type}: up to {bandwidth / 1e9:.1f} GB/s and {rate / 1e9:.0f} GFLOP/s",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("operator", "case", "by", "pass", "ms", "GB/s", "GFLOP/s", "x floor"):
        table.add_column(column, justify="left" if column in ("operator", "case", "by", "pass") else "right")
    for m in measurements:
        seconds = m.timing.median
        by = m.implementation if target.type == "cpu" else f"{m.implementation}, {m.dtype}"
        table.add_row(
            m.op, m.case, by, m.passes, f"{1e3 * seconds:.2f}", f"{m.bytes / seconds / 1e9:.1f}",
            f"{m.flops / seconds / 1e9:.1f}", f"{seconds / m.floor:.1f}",
        )  # fmt: skip
    console.print(table)
    if not op:
        path = benchmark.write_csv(benchmark.to_frame(measurements, target), target.type, result.folder())
        console.print(f"wrote {path}", soft_wrap=True)
