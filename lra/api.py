"""The Python API: `lra.train`, `lra.load` and the others. Use them as attributes of `lra`.

Heavy packages are imported inside the functions that need them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra import registry
from lra.errors import UserError
from lra.registry import reference_of

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lra.data.examples import LoadedTask
    from lra.encoder import Encoder
    from lra.reports.comparison import Comparison
    from lra.reports.scaling import Study
    from lra.results.record import RunRecord
    from lra.task import Task
    from lra.training.trained_run import TrainedRun


def list_architectures(pattern: str = "*") -> list[str]:
    """Names of the registered architectures that match a pattern: "*ssm*". A pattern with a slash matches variants."""
    names = registry.architectures.names(variants="/" in pattern)
    return [name for name in names if fnmatchcase(name, pattern)]


def architectures() -> pd.DataFrame:
    """The cards of the registered architectures: name, family, title, year, url, scaling, causal, variants."""
    import pandas as pd

    columns = ["name", "family", "title", "year", "url", "scaling", "causal", "variants"]
    cards = [registry.architectures.facts(name) for name in registry.architectures.names()]
    return pd.DataFrame([card | {"variants": list(card["variants"])} for card in cards], columns=columns)


def create_encoder(architecture: str | type, **options: Any) -> Encoder:
    """An encoder by name or class: `create_encoder("s4d/inv", d_model=64, n_layers=2, length=1024)`.

    options: constructor arguments; `lra show TASK ARCH` lists them. Raises UserError for an unknown name or argument.
    """
    return registry.architectures.get(architecture)(**options)


def import_weights(
    architecture: str | type,
    file: str | Path,
    *,
    out: str | Path | None = None,
    ignore: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Encoder:
    """An encoder with published weights: `import_weights("mamba", "model.safetensors", length=1024)`.

    The map from published names to those of the encoder is `Encoder.published`, in the file of the architecture.

    file: a state dict in a .safetensors file or a file of torch.save, from which only tensors are unpickled.
    out: a new folder for config.json and model.safetensors, which `load_encoder` reads. ignore: patterns of tensors to
    leave out. dtype: of the encoder, by default float32. options: constructor arguments that do not follow from the
    tensors, such as `length`. Raises UserError for a tensor that is missing, has the wrong shape or is not used.
    """
    from lra.training import published

    if out is not None:
        published.check_folder(Path(out).expanduser())
    encoder, built = published.import_weights(architecture, file, options=options, ignore=ignore, dtype=dtype)
    if out is not None:
        published.write(encoder, out, reference_of(architecture), built, Path(file).name)
    return encoder


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder in a folder that `import_weights` or `lra import` wrote. Raises UserError."""
    from lra.training import published

    return published.load(folder)


def load_task(task: str | type | Task, protocol: str = "", *, source: str | Path | None = None) -> LoadedTask:
    """A task with its data, which are prepared if necessary: `load_task("image").train[0]`.

    protocol: by default the first of the task. source: folder with the raw files. Raises UserError.
    """
    from lra import terminal
    from lra.data import examples

    console = _console()
    name = task if isinstance(task, str) else getattr(task, "name", "the task")
    with terminal.progress_bar(console, f"preparing {name}") if console else nullcontext() as progress:
        loaded = examples.load(task, protocol, source=source, progress=progress)
    if console and loaded.prepared.replaced:
        console.print(f"{loaded.prepared.replaced}; prepared again", markup=False, soft_wrap=True)
    return loaded


def train(
    task: str | type | LoadedTask,
    architecture: str | type,
    *,
    recipe: str = "auto",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    protocol: str = "",
    source: str | Path | None = None,
    time_limit: float | None = None,
    resume: bool = False,
    checkpoint_dir: str | Path | None = None,
    pretrain: str = "",
    match: str = "",
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    threads: int = 0,
    loggers: Sequence[str] = (),
    init_from: str | Path | None = None,
    teacher: str | Path | None = None,
    scorer: str | Path | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> TrainedRun:
    """Train a model, select a checkpoint on validation, test it once, and write the record, as `lra run` does.

    task, architecture: a registered name, `file.py:Class`, `package.module:Class`, or a class.
    overrides: recipe values by dotted key, {"train.steps": 500}. time_limit: seconds, after which the run stops with a
    checkpoint. teacher: folder of a run of the same task to imitate (train.distill_alpha, train.distill_temperature).
    scorer: folder of a run of the same task that measures the difficulty of examples (train.curriculum).
    progress: called as progress(step, steps, metrics); without it, a terminal shows a progress bar.
    The other arguments are those of `lra run`.

    The global random state does not change. Raises UserError, or its subclass `lra.errors.Interrupted` if the run was
    stopped and can be resumed with resume=True.
    """
    from lra.data.examples import LoadedTask
    from lra.training.placement import Placement
    from lra.training.request import Request, check, folder_of, read, resolve, setting_texts

    if isinstance(task, LoadedTask):
        protocol, task = protocol or task.protocol.name, task.reference
    request = Request(
        task, architecture, recipe, seed, protocol, setting_texts(overrides), None if source is None else Path(source),
        time_limit, resume, pretrain, match, Placement(devices, nodes, strategy),
        None if checkpoint_dir is None else Path(checkpoint_dir), tuple(loggers),
        init_from=None if init_from is None else Path(init_from), threads=threads,
        teacher=None if teacher is None else Path(teacher), scorer=None if scorer is None else Path(scorer),
    )  # fmt: skip
    check(request, read(request)[0])
    resolved, _ = resolve(request)
    from lra.training.run import run

    run(request, _console(), progress)
    return load(
        folder_of(request, resolved),
        checkpoints=checkpoint_dir,
        architecture=architecture if isinstance(architecture, type) else None,
        task=task if isinstance(task, type) else None,
    )


def load(
    folder: str | Path,
    *,
    checkpoints: str | Path | None = None,
    architecture: str | type | None = None,
    task: str | type | None = None,
) -> TrainedRun:
    """The trained model of a run's folder (below runs/) or of a folder that `lra export` wrote.

    checkpoints: the checkpoint folder, if it was moved. architecture, task: the class, if it cannot be found by the
    name in the recipe. Raises UserError.
    """
    from lra.training import trained_run

    return trained_run.load(folder, checkpoints=checkpoints, architecture=architecture, task=task)


def quantize(run: TrainedRun | str | Path, folder: str | Path) -> TrainedRun:
    """The run with int8 weights in linear maps, convolutions and embeddings, scored and exported to a new folder.

    run: a run that `train` or `load` returned, or a folder. `record.compression` holds accuracy, size and speed of both
    models. Weights are converted back when they are used, so the model is smaller, not faster. Raises UserError.
    """
    from lra.training import compression

    with _progress("quantising") as progress:
        return compression.quantize(load(run) if isinstance(run, str | Path) else run, Path(folder), progress)


def prune(
    run: TrainedRun | str | Path, folder: str | Path, *, heads: float = 0.0, channels: float = 0.0, examples: int = 256
) -> TrainedRun:
    """The run without its least important attention heads and feed-forward channels, scored and exported to a folder.

    heads, channels: the share to remove in each layer. examples: training examples on which their importance is
    measured. run, record: as in `quantize`. Raises UserError, also for an architecture that has neither.
    """
    from lra.training import compression

    original = load(run) if isinstance(run, str | Path) else run
    with _progress("pruning") as progress:
        return compression.prune(original, Path(folder), progress, heads=heads, channels=channels, examples=examples)


def results(smoke: bool = False) -> pd.DataFrame:
    """All results, one row for each run; invalid files are left out. smoke: only results of smoke tests, instead."""
    return _collection(smoke).frame()


def leaderboard(task: str, smoke: bool = False) -> pd.DataFrame:
    """The ranked rows of a task, one for each architecture; rank is within task, protocol, recipe, regime and device.

    Runs with modified settings are not ranked. smoke: as in `results`. Raises UserError for a task without results.
    """
    from lra.reports import leaderboard as board

    return board.frame(_collection(smoke).only(task=task))


def efficiency(task: str, smoke: bool = False) -> pd.DataFrame:
    """Accuracy over FLOPs per token, longest sequence over peak memory, and tokens per second of the ranked rows of a
    task (lra.reports.efficiency.metrics). smoke: as in `results`. Raises UserError for a task without results."""
    from lra.reports import efficiency as report
    from lra.reports.ranking import Leaderboard

    collection = _collection(smoke).only(task=task)
    return report.metrics(Leaderboard.of(collection), collection.profiles)


def scaling(task: str, *, protocol: str = "", recipe: str = "", regime: str = "", metric: str = "") -> list[Study]:
    """The scaling studies of a task's runs, one for each protocol, data, recipe and regime: `study.laws`,
    `study.frontier()`, `study.tables()` and `study.chart()`.

    metric: "bits" per token, validation "loss" or test "error"; by default bits where the target is the next token,
    else the loss. Raises UserError without results.
    """
    from lra.reports import scaling as report
    from lra.results import result
    from lra.results.collection import Collection

    collection = Collection.read(result.folder(), *report.PLACES)
    selected = collection.only(task=task, protocol=protocol, recipe=recipe, regime=regime)
    return report.studies(selected.records, metric)


def compare(a: TrainedRun | str | Path, b: TrainedRun | str | Path) -> Comparison:
    """Paired difference of two runs. a, b: a run that `train` or `load` returned, an id or its first characters, or the
    file of a record. The difference is None if they were not tested on the same examples. Raises UserError."""
    from lra.reports import comparison

    runs, smoke = _collection(False), _collection(True)
    both = replace(runs, records=[*runs.records, *smoke.records], predictions={**runs.predictions, **smoke.predictions})
    return comparison.compare(_record_of(a), _record_of(b), both)


def check(architecture: str | type, **options: Any) -> pd.DataFrame:
    """The conformance checks of an architecture or of your own layer: check, status, message, seconds.

    options: constructor arguments to use instead of the defaults. Raises UserError for an unknown name.
    """
    import pandas as pd

    from lra.conformance import suite

    findings = suite.check(registry.architectures.get(architecture), options=options)
    return pd.DataFrame([asdict(finding) for finding in findings])


def profile(
    architectures: Sequence[str | type],
    lengths: Sequence[int] = (512, 1024, 2048),
    *,
    batch: int = 1,
    d_model: int = 64,
    n_layers: int = 2,
    direction: str = "bidirectional",
    budget: float = 0.3,
) -> pd.DataFrame:
    """Work, speed and memory of encoders, one row for each architecture and length, measured in fresh processes.

    budget: seconds for each timing. Cells that are already in results/profile/ are not measured again. Raises
    UserError.
    """
    import pandas as pd

    from lra.profiling import profiler
    from lra.results import result

    names = [reference_of(architecture) for architecture in architectures]
    for name in names:
        if name.startswith("__main__:"):
            raise UserError(f"{name} cannot be imported by the process that measures it; put it into a file")
        registry.architectures.get(name)
    cells = [
        profiler.Cell(name, length, batch, d_model, n_layers, direction, budget)
        for length in sorted(lengths) for name in names
    ]  # fmt: skip
    frame = pd.json_normalize(profiler.profile(cells, result.folder()))
    return frame.rename(columns=lambda column: column.removeprefix("cell."))


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback, which draws a bar on a terminal."""
    from lra import terminal

    console = _console()
    with terminal.progress_bar(console, title) if console else nullcontext(lambda *_: None) as progress:
        yield progress


def _console() -> Any:
    """A rich console on a terminal, else None."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console()


def _collection(smoke: bool) -> Any:
    from lra.results import result
    from lra.results.collection import Collection

    return Collection.read(result.folder(), "smoke" if smoke else "runs")


def _record_of(run: TrainedRun | str | Path) -> RunRecord | str | Path:
    if isinstance(run, str | Path):
        return run
    return run.record
