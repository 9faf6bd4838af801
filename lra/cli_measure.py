"""`lra doctor`, `lra bench`, `lra profile`: is it right on this machine, and how fast."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli_common import console, guarded
from lra.errors import UserError
from lra.registry import architectures


@guarded
def doctor(
    op: Annotated[str, typer.Argument(help="One operator; all by default.")] = "",
    fresh: Annotated[bool, typer.Option(help="Check again what is known already.")] = False,
) -> None:
    """Which implementations of each operator are here, and whether each is right on this machine."""
    from lra import doctor as kit
    from lra import parity
    from lra.errors import unknown
    from lra.run import device

    if op and op not in parity.operators():
        raise unknown("operator", op, parity.operators())
    table = Table(pad_edge=False)
    for column in ("operator", "implementation", "status", "error", "detail"):
        table.add_column(column, overflow="fold")
    with console.status("checking") as status:
        ops = [op] if op else parity.operators()
        found = kit.examine(ops, device(), fresh=fresh, seen=lambda name: status.update(f"checking {name}"))
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
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
) -> None:
    """Time of each operator beside what this machine could do; written to results/bench/ when all are measured."""
    from lra import bench as kit
    from lra import parity, result
    from lra.run import device

    here = device()
    with console.status("measuring the machine") as status:
        machine, measured = kit.bench(
            [op] if op else parity.operators(), here, budget=budget, seen=lambda name: status.update(f"timing {name}")
        )
        lines = list(measured)
    table = Table(
        title=f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s, {here.type}",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("operator", "case", "by", "pass", "ms", "GB/s", "GFLOP/s", "x floor"):
        table.add_column(column, justify="left" if column in ("operator", "case", "by", "pass") else "right")
    for x in lines:
        s = x.timing.median
        table.add_row(
            x.op, x.case, x.implementation, x.passes, f"{1e3 * s:.2f}", f"{x.bytes / s / 1e9:.1f}",
            f"{x.flops / s / 1e9:.1f}", f"{s / x.floor:.1f}",
        )  # fmt: skip
    console.print(table)
    if not op:
        console.print(f"wrote {kit.write(lines, here, result.folder())}", soft_wrap=True)


@guarded
def profile(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ARCH]...", help="All by default.")] = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated.")] = "1024,4096",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    d_model: Annotated[int, typer.Option(min=1)] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    direction: Annotated[str, typer.Option(help="causal or bidirectional.")] = "bidirectional",
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds for each timing.")] = 3.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is on file.")] = False,
) -> None:
    """Work, speed and memory of encoders, each cell in a fresh process; written to results/profile/ as it goes."""
    if not all(part.isdigit() and int(part) > 0 for part in lengths.split(",")):
        raise UserError(f"--lengths is {lengths!r}; expected whole numbers and commas, for example 1024,4096")
    for name in names or []:
        architectures.get(name)
    from lra import profiler, result

    chosen = [
        profiler.Cell(name, int(length), batch, d_model, layers, direction, budget)
        for name in names or architectures.names()
        for length in lengths.split(",")
    ]
    shape = f"batch {batch}, d_model {d_model}, {layers} layers, {direction}"
    table = Table(title=f"training step at {shape}", title_justify="left", pad_edge=False)
    for column in (
        "architecture",
        "L",
        "params",
        "GFLOP",
        "by formula",
        "forward ms",
        "step ms",
        "tokens/s",
        "peak MiB",
    ):
        table.add_column(column, justify="left" if column == "architecture" else "right", no_wrap=True)
    with console.status("starting") as status:
        for number, record in enumerate(
            profiler.profile(
                chosen, result.folder(), fresh=fresh,
                seen=lambda cell: status.update(f"{cell.architecture} at {cell.length:,}"),
            )
        ):  # fmt: skip
            cell = chosen[number]
            if "failed" in record:
                table.add_row(cell.architecture, str(cell.length), escape(record["failed"]))
                continue
            work, seconds = record["flops"], record["seconds"]
            formula = work["matmul_by_formula"]
            table.add_row(
                cell.architecture, str(cell.length), f"{record['parameters']:,}", f"{work['forward'] / 1e9:.3g}",
                "not declared" if formula is None else f"{100 * formula / max(work['matmul'], 1):.1f} %",
                f"{1e3 * seconds['forward']['median']:.1f}", f"{1e3 * seconds['train']['median']:.1f}",
                f"{record['tokens_per_second']:,.0f}", f"{record['memory']['peak_bytes'] / 2**20:,.0f}",
            )  # fmt: skip
    console.print(table)
    console.print("GFLOP: forward, one sequence, multiply-add = 2; by formula: analytic over counted matrix work")
