"""`lra quantize`, `lra prune`: compress the model of a trained run and compare it with the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli.common import DryRun, console, guarded
from lra.cli.models import Checkpoints, Run, load_run

if TYPE_CHECKING:
    from lra.training.trained_run import TrainedRun

NewFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the compressed model.")]


@guarded
def quantize(run: Run, folder: NewFolder, dry_run: DryRun = False, checkpoint_dir: Checkpoints = None) -> None:
    """Store the weights of linear maps, convolutions and embeddings as int8, and score the compressed model."""
    loaded = load_run(run, checkpoint_dir)
    if dry_run:
        _announce(loaded, folder)
        return
    from lra import terminal
    from lra.training import compression

    with terminal.progress_bar(console, "quantising") as progress:
        _show(compression.quantize(loaded, folder, progress))


@guarded
def prune(
    run: Run,
    folder: NewFolder,
    heads: Annotated[float, typer.Option(help="Share of the attention heads of each layer to remove.")] = 0.0,
    channels: Annotated[float, typer.Option(help="Share of the feed-forward channels of each layer to remove.")] = 0.0,
    examples: Annotated[int, typer.Option(min=1, help="Training examples that the importance is measured on.")] = 256,
    dry_run: DryRun = False,
    checkpoint_dir: Checkpoints = None,
) -> None:
    """Remove the least important attention heads and feed-forward channels, and score the compressed model."""
    loaded = load_run(run, checkpoint_dir)
    if dry_run:
        _announce(loaded, folder)
        return
    from lra import terminal
    from lra.training import compression

    with terminal.progress_bar(console, "pruning") as progress:
        _show(compression.prune(loaded, folder, progress, heads=heads, channels=channels, examples=examples))


def _announce(run: TrainedRun, folder: Path) -> None:
    from lra.training import export

    export.check(run, folder)
    console.print(f"would compress {escape(str(run))} to {escape(str(folder))}", soft_wrap=True)


def _show(run: TrainedRun) -> None:
    """The original and the compressed model, one below the other."""
    from lra.results import statistics

    about = run.record.compression or {}
    table = Table("model", title=escape(repr(run)), title_justify="left", pad_edge=False)
    for name in ("test accuracy", "parameters", "bytes", "ms per example"):
        table.add_column(name, justify="right")
    for name in ("original", "compressed"):
        row, n = about[name], run.record.test.n
        interval = statistics.of_test_set(row["accuracy"], n)
        table.add_row(
            name if name == "original" else about["method"],
            f"{100 * row['accuracy']:.2f} % ({100 * interval.low:.2f} to {100 * interval.high:.2f})",
            f"{row['parameters']:,}", f"{row['bytes']:,}", f"{1000 * row['seconds_per_example']:.3f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"wrote {escape(str(run.folder))}", soft_wrap=True)
