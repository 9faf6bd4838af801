"""`python -m benchmarks`: compare operators and encoders with other packages; run all measurements of a GPU machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from benchmarks.gpu import gpu
from lra.cli.common import console, guarded
from lra.cli.operators import time_operators
from lra.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Budget = Annotated[float, typer.Option(min=0.1, help="Seconds per measurement.")]


@app.command()
@guarded
def operators(
    op: Annotated[str, typer.Argument(help="Operator to time; default: all.")] = "", budget: Budget = 1.5
) -> None:
    """Time the operators and compare them with the limits of this machine and with other packages."""
    from benchmarks.peers import peers

    time_operators(op, budget, peers)


@app.command()
@guarded
def models(
    architecture: Annotated[str, typer.Argument(help="Architecture to time; default: all that have peers.")] = "",
    budget: Budget = 1.5,
) -> None:
    """Time training steps of encoders and compare them with other packages."""
    from benchmarks import models as encoders
    from lra.operators.bench import write_csv
    from lra.results import result
    from lra.training.device import device

    with console.status("starting") as status:
        names = [architecture] if architecture else []
        steps = list(
            encoders.bench(names, device(), budget=budget, on_architecture=lambda name: status.update(f"timing {name}"))
        )
    ours = {step.architecture: step.timing.median for step in steps if step.by == "lra"}
    table = Table(title="training step: forward, backward, AdamW", title_justify="left", pad_edge=False)
    for column in ("architecture", "by", "batch x L", "params", "ms", "IQR ms", "x ours"):
        table.add_column(column, justify="left" if column in ("architecture", "by") else "right")
    for step in steps:
        timing, shape = step.timing, step.shape
        table.add_row(
            step.architecture, step.by, f"{shape.batch} x {shape.length:,}", f"{step.parameters / 1e3:,.0f}k",
            f"{1e3 * timing.median:,.0f}", f"{1e3 * (timing.high - timing.low):,.0f}",
            f"{timing.median / ours[step.architecture]:.2f}",
        )  # fmt: skip
    console.print(table)
    if not architecture:
        path = write_csv(encoders.to_frame(steps, device()), f"models-{device().type}", result.folder())
        console.print(f"wrote {path}", soft_wrap=True)


@app.command()
@guarded
def precision(
    architecture: Annotated[
        list[str] | None, typer.Argument(help="Architectures; default: those of the standard comparison.")
    ] = None,
    task: Annotated[str, typer.Option(help="Task of the recipe.")] = "image",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 5,
) -> None:
    """Compare training steps of recipe `standard` in float32 and under bfloat16 autocast, by CPU time."""
    from benchmarks import precision as steps
    from lra.results import result

    table = Table(title="training step of recipe standard, CPU time", title_justify="left", pad_edge=False)
    for column in ("architecture", "d_model", "float32 ms", "bf16 ms", "float32 / bf16"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    done = []
    for step in steps.bench(architecture or steps.names(), task, rounds):
        done.append(step)
        table.add_row(
            step.architecture, str(step.d_model), f"{1e3 * step.float32:,.0f}", f"{1e3 * step.bfloat16:,.0f}",
            f"{step.ratio:.2f}",
        )  # fmt: skip
    console.print(table)
    if not architecture:
        console.print(f"wrote {steps.write(done, task, result.folder())}", soft_wrap=True)


@app.command()
@guarded
def families(
    architecture: Annotated[list[str] | None, typer.Argument(help="Architectures; default: all.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is on file.")] = False,
) -> None:
    """Time a training step of every architecture beside the median of its family; written after each."""
    from benchmarks import families as steps
    from lra.registry import architectures
    from lra.results import result

    root = result.folder()
    known = steps.read(root)
    names = architecture or architectures.names()
    waiting = [name for name in names if fresh or name not in set(known["architecture"])]
    rows = known
    with console.status("starting") as status:
        for done, rows in enumerate(steps.bench(waiting, known), 1):
            path = steps.write(rows, root)
            status.update(f"{done} of {len(waiting)} done")
    table = Table(title="training step, (8, 1,024, 128), two layers, float32", title_justify="left", pad_edge=False)
    for column in ("architecture", "family", "params", "ms", "MiB", "x median"):
        table.add_column(column, justify="left" if column in ("architecture", "family") else "right")
    for row in steps.beside_median(rows).itertuples():
        if row.architecture in names and isinstance(getattr(row, "failed", None), str):
            table.add_row(row.architecture, row.family, "-", row.failed, "-", "-")
        elif row.architecture in names:
            table.add_row(
                row.architecture, row.family, f"{row.parameters / 1e3:,.0f}k", f"{row.ms:,.0f}", f"{row.mib:,.0f}",
                f"{row.over_median:.2f}",
            )  # fmt: skip
    console.print(table)
    if waiting:
        console.print(f"wrote {path}", soft_wrap=True)


@app.command()
@guarded
def recall(
    architecture: Annotated[list[str] | None, typer.Argument(help="Architectures; default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Most training steps.")] = 3000,
    seconds: Annotated[float, typer.Option(min=1, help="Most seconds of training.")] = 300.0,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Instead of causal, if both exist.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is on file.")] = False,
) -> None:
    """Train encoders to recall the first of 256 tokens, as `lra check --recall` does; written after each."""
    from lra.conformance import recall as first_token
    from lra.profiling import memory
    from lra.registry import architectures
    from lra.results import environment, result
    from lra.results import recall as records

    memory.keep_freed()
    root, seed = result.folder(), 0
    for name in architecture or architectures.names():
        if not fresh and records.path_of(name, root).exists():
            console.print(f"{name}: on file", highlight=False)
            continue
        constructor = architectures.get(name)
        direction = "bidirectional" if bidirectional or constructor.cls.refuses_causal else "causal"
        direction = direction if "direction" in constructor.options() else ""
        with console.status(f"training {name}"):
            outcome = first_token.recall(name, direction=direction, steps=steps, seconds=seconds, seed=seed)
        record = records.RecallRecord(
            name, direction, first_token.LENGTH, outcome.accuracy, outcome.learned, outcome.steps, outcome.seconds,
            seed, environment.environment(),
        )  # fmt: skip
        records.write(record, root)
        summary = f"{100 * outcome.accuracy:.1f} % after {outcome.steps} steps, {outcome.seconds:.0f} s"
        console.print(f"{name}: {summary}", highlight=False, soft_wrap=True)


@app.command()
@guarded
def steps(part: Annotated[str, typer.Argument(help="Part of `gpu` to run: one of its names.")]) -> None:
    """Run the steps of one part of `gpu` that are not done yet, and write the results after each."""
    from benchmarks.gpu import PARTS
    from benchmarks.steps import run
    from lra.errors import unknown
    from lra.results import result
    from lra.training.device import device

    if part not in PARTS:
        raise unknown("part", part, list(PARTS))
    if device().type != "cuda":
        raise UserError("the parts of gpu need a CUDA device; this machine has none")
    if not run(part, device(), result.folder() / "measure" / "gpu.json", lambda line: print(line, flush=True)):
        raise typer.Exit(1)


app.command()(gpu)

if __name__ == "__main__":
    app()
