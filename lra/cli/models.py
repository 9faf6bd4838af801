"""`lra predict`, `generate`, `evaluate`, `export`: uses of a trained run; `lra import`: published weights."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lra.cli.common import DryRun, announce_loading, console, errors, guarded, settings_of
from lra.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np

    from lra.training.trained_run import TrainedRun

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder below runs/, or one that `lra export` wrote.")]
Checkpoints = Annotated[Path | None, typer.Option("--checkpoint-dir", help="Folder of checkpoints outside runs/.")]
SUFFIXES = (".txt", ".jsonl", ".npy")


@guarded
def predict(
    run: Run,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The name of a split, or a .txt, .jsonl or .npy.")],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probability of every class instead of the class.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a CSV file instead of printing.")] = None,
    dry_run: DryRun = False,
    checkpoint_dir: Checkpoints = None,
) -> None:
    """Classify every line of a text file, every value of a JSON Lines file, every row of an array, or a split."""
    inputs = _inputs(file)
    loaded = load_run(run, checkpoint_dir)
    if isinstance(inputs, str) and inputs not in loaded.protocol.splits:
        raise unknown("split", inputs, loaded.protocol.splits)
    if dry_run:
        what = f"the {inputs} split" if isinstance(inputs, str) else f"{len(inputs):,} inputs"
        console.print(f"would classify {what} with {escape(str(loaded))}", soft_wrap=True)
        return
    predicted = loaded.predict(inputs, probabilities=probabilities)
    # one entry for each example; with a class for each position, one array for each example
    places, answers = _numbered(predicted)
    header = (
        [f"class {n}" for n in range(answers.shape[1])]
        if probabilities
        else ["value" if loaded.task.target == "value" else "class"]
    )
    rows = [
        [*(("example", "position") if isinstance(predicted, list) else ("example",)), *header],
        *([*place, *(row if probabilities else [row])] for place, row in zip(places, answers.tolist(), strict=True)),
    ]
    if out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    with _writing(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as target:
        csv.writer(target).writerows(rows)
    console.print(f"wrote {escape(str(out))}", soft_wrap=True)


@guarded
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to draw.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="Divides the logits; 0: the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens with this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    checkpoint_dir: Checkpoints = None,
) -> None:
    """Continue a text with a model of the next token. Speed and size of its state are printed to standard error."""
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; above 0, at most 1")
    loaded = load_run(run, checkpoint_dir)
    drawn = loaded.generate(prompt, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    print(prompt + drawn.text)
    errors.print(
        f"{drawn.tokens:,} tokens, {drawn.tokens_per_second:,.0f} a second, {drawn.state_bytes:,} bytes of state",
        highlight=False,
    )


def _numbered(predicted: Any) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The number of the example of each prediction, with the position if each has one, and all predictions."""
    import numpy as np

    if not isinstance(predicted, list):
        return [(n,) for n in range(len(predicted))], predicted
    places: list[tuple[int, ...]] = [(n, position) for n, row in enumerate(predicted) for position in range(len(row))]
    return places, np.concatenate(predicted)


@guarded
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="train, validation, test, or another of the protocol.")] = "test",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the scores as JSON.")] = None,
    dry_run: DryRun = False,
    checkpoint_dir: Checkpoints = None,
) -> None:
    """Score a trained run on a split again, and show the accuracy of its record."""
    loaded = load_run(run, checkpoint_dir)
    if split not in loaded.protocol.splits:
        raise unknown("split", split, loaded.protocol.splits)
    if dry_run:
        console.print(f"would score {escape(str(loaded))} on the {split} split", soft_wrap=True)
        return
    scores = loaded.evaluate(split)
    console.print(
        f"{split} accuracy [bold]{100 * scores.accuracy:.2f} %[/] of {scores.n:,} examples "
        f"({100 * scores.low:.2f} to {100 * scores.high:.2f} %, 95 % interval)",
        soft_wrap=True,
    )
    for name, value in scores.more.items():
        parts = (
            {f"{name} {part}": number for part, number in value.items()} if isinstance(value, dict) else {name: value}
        )
        for label, number in parts.items():
            console.print(f"{label} {number:.4f}", highlight=False)
    if split == "test" and loaded.finished:
        console.print(f"accuracy in the record: {100 * loaded.accuracy:.2f} %")
    if out is not None:
        with _writing(out) as temporary:
            temporary.write_text(json.dumps(asdict(scores), indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {escape(str(out))}", soft_wrap=True)


@guarded
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    dry_run: DryRun = False,
    checkpoint_dir: Checkpoints = None,
) -> None:
    """Write a trained model as config.json, model.safetensors and a model card (README.md)."""
    from lra.training import export as exporting

    loaded = load_run(run, checkpoint_dir)
    if dry_run:
        exporting.check(loaded, folder)
        console.print(f"would write {escape(str(loaded))} to {escape(str(folder))}", soft_wrap=True)
        return
    console.print(f"wrote {escape(str(exporting.write(loaded, folder)))}", soft_wrap=True)


@guarded
def import_(
    architecture: Annotated[str, typer.Argument(metavar="ARCH", help="A name, file.py:Class or module:Class.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A state dict: .safetensors, .pt, .pth, .bin, .ckpt.")],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the encoder to a new folder.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A constructor argument, such as n_heads=12.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to leave out, such as 'head.*'.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Load published weights into an encoder. Names, shapes and the number of tensors must match."""
    from lra.config.recipe import parse_setting
    from lra.training import published

    if out is not None:
        published.check_folder(out)
    options = {key: parse_setting(text) for key, text in settings_of(settings).items()}
    encoder, built = published.import_weights(architecture, file, options=options, ignore=ignore or ())
    count = sum(parameter.numel() for parameter in encoder.parameters())
    shown = ", ".join(f"{key} {value}" for key, value in built.items())
    console.print(
        f"{escape(architecture)}: {count:,} parameters of {escape(str(file))} ({escape(shown)})", soft_wrap=True
    )
    if out is not None and dry_run:
        console.print(f"would write {escape(str(out))}", soft_wrap=True)
    elif out is not None:
        written = published.write(encoder, out, architecture, built, file.name)
        console.print(f"wrote {escape(str(written))}", soft_wrap=True)


def load_run(run: Path, checkpoints: Path | None) -> TrainedRun:
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give a folder below runs/ or one that `lra export` wrote")
    announce_loading()
    from lra.training import trained_run

    return trained_run.load(run, checkpoints=checkpoints)


def _inputs(file: str) -> Any:
    """The inputs in a file, or the text itself if it can be the name of a split. Raises UserError."""
    path = Path(file)
    if not path.suffix and not path.is_file():
        return file
    if path.suffix not in SUFFIXES:
        raise UserError(f"{file} is neither a split, such as test, nor a file ending in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".npy":
            import numpy as np

            return list(np.load(path, allow_pickle=False))
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if path.suffix == ".txt":
        return lines
    inputs = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON: {error}") from None
        # a list of two texts or lists is a pair, for tasks with two towers
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str | list) for part in value)
        inputs.append(tuple(value) if pair else value)
    return inputs


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path`. Raises UserError if it cannot be written."""
    from lra import files

    try:
        with files.atomic(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
