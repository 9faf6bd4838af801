"""One run, from a request to a result: the place where registry, data, model, training and record meet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from lra import files, terminal
from lra.config.recipe import Recipe
from lra.data import prepared_sets
from lra.data.batches import DeviceSet
from lra.data.floors import floor_bits, floors
from lra.data.prepared_sets import Prepared
from lra.errors import Interrupted, UserError, describe
from lra.kernels import _dispatch
from lra.model import Batch, Classifier
from lra.operators import doctor
from lra.registry import Constructor, architectures, tasks
from lra.results import environment, result
from lra.source import digest
from lra.training import construction, distributed, run_folder, stages, trained_run, warm_start
from lra.training.callbacks import StepProgress
from lra.training.curriculum import FILE, Scorer
from lra.training.device import device
from lra.training.request import Request, check, checkpoint_folder, folder_of, resolve, result_folder
from lra.training.run_record import record
from lra.training.stages import RunContext, TrainingResult
from lra.training.trained_run import TrainedRun


def run(request: Request, console: Console | None = None, progress: StepProgress | None = None) -> Path:
    """Train, select on validation, test once, and write the record.

    console: for messages and progress bars; nothing is shown without one. progress: called during training instead.
    Returns the path of the record; on every process but the first, the folder of the run. Leaves the global random
    state, matmul precision and number of threads as they were. Raises UserError, Interrupted among them.
    """
    recipe, origin = resolve(request)
    check(request, recipe)
    files.check_writable(result_folder(request, recipe))
    console = console or Console(quiet=True)
    matmul_precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(request.threads or threads)
    try:
        with construction.kept_random_state():
            return _run(request, recipe, origin, console, progress)
    except Interrupted as error:
        raise Interrupted(str(error), request.command("--resume")) from error
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
        torch.set_num_threads(threads)


def _run(
    request: Request, recipe: Recipe, origin: Mapping[str, str], console: Console, progress: StepProgress | None
) -> Path:
    leads, folder = distributed.shard(request.placement).rank == 0, folder_of(request, recipe)
    if not leads:
        console, progress = Console(quiet=True), None
    if request.resume and (finished := run_folder.finished_record(folder)):
        console.print(f"this run is finished: {finished}", soft_wrap=True)
        return finished
    constructor = architectures.get(request.architecture)
    task = tasks.get(request.task)()
    _, protocol = prepared_sets.resolve(task, recipe.data.protocol or None)
    construction.check_memory(recipe, constructor, protocol.length, device().type)
    with terminal.progress_bar(console, f"preparing {task.name}") as report:
        prepared = prepared_sets.load_prepared(task, recipe.data.protocol, source=request.source, progress=report)
    # the command of the record repeats the run on another machine
    request = replace(request, protocol=prepared.protocol.name, threads=torch.get_num_threads())
    if prepared.replaced:
        console.print(f"[yellow]{escape(prepared.replaced)}; prepared again[/]", soft_wrap=True)
    with _explain_failures(recipe):
        model = construction.build(recipe, constructor, prepared.task, prepared.protocol, request.seed)
        _announce(request, recipe, origin, prepared, model, console)
        initial = warm_start.load(model, request.init_from) if request.init_from else None
        if initial is not None:
            console.print(escape(warm_start.summary(initial)), soft_wrap=True)
        teacher, taught = load_teacher(request, recipe, prepared)
        scorer = load_scorer(request, recipe, prepared)
        refused = check_operators(model, prepared, constructor)
    started, clock = datetime.now(UTC), time.perf_counter()
    with _explain_failures(recipe), run_folder.opened(request, recipe, folder, leads, digest(constructor.source)):
        context = RunContext(
            device(), folder, checkpoint_folder(request, folder), console, request.seed, request.placement,
            request.loggers, request.deadline, request.resume, progress, teacher, scorer,
        )  # fmt: skip
        trained = stages.train(recipe, prepared, model, context)
        build = partial(construction.build_encoder, recipe, constructor)
        scores = stages.score(recipe, prepared, trained, context, build, test=not request.select_only)
        if not leads:
            return folder
        if request.select_only:
            return _write_selection(folder, recipe, scores[prepared.protocol.selection])
        with console.status("computing the baselines of the data, once"):
            floors(prepared), floor_bits(prepared)
        content = record(
            request.architecture_name, request.seed, recipe, prepared, constructor, trained.model, scores,
            _own_fields(request, trained, refused, context) | ({"init_from": initial} if initial else {}) | taught,
            started,
            trained.meter.earlier + time.perf_counter() - clock,
        )  # fmt: skip
        path = result.write(content, scores["predictions"], result.folder(), result.place_of(recipe))
        run_folder.finish(folder, path)
        for name in ("last.ckpt", FILE):
            (context.checkpoints / name).unlink(missing_ok=True)
    return path


def load_teacher(request: Request, recipe: Recipe, prepared: Prepared) -> tuple[Classifier | None, dict[str, Any]]:
    """The model to imitate, and the field of the record that describes it. Raises UserError for one of other data."""
    if request.teacher is None:
        return None, {}
    teacher = _load_run("--teacher", request.teacher, prepared)
    record = teacher.record
    about = {
        "teacher": str(request.teacher), "id": record.id, "architecture": record.architecture,
        "accuracy": record.test.accuracy, "parameters": record.parameters, "alpha": recipe.train.distill_alpha,
        "temperature": recipe.train.distill_temperature,
    }  # fmt: skip
    return teacher.model.to(device()).eval(), {"distillation": about}


def load_scorer(request: Request, recipe: Recipe, prepared: Prepared) -> Scorer | None:
    """The run that measures the difficulty of the training examples. Raises UserError if its data are others."""
    if request.scorer is None:
        return None
    run = _load_run("--scorer", request.scorer, prepared)
    record = run.record
    about = {
        "kind": recipe.train.curriculum, "scorer": str(request.scorer), "id": record.id,
        "architecture": record.architecture, "accuracy": record.test.accuracy, "parameters": record.parameters,
    }  # fmt: skip
    return Scorer(run.model.to(device()).eval(), about)


def _load_run(option: str, folder: Path, prepared: Prepared) -> TrainedRun:
    """The run of an option. Raises UserError where its task or protocol is not that of the prepared set."""
    run = trained_run.load(folder)
    its, own = (run.task.name, run.protocol.name), (prepared.task.name, prepared.protocol.name)
    if its != own:
        raise UserError(
            f"{option} {folder} was trained on {its[0]} ({its[1]}), and this run is on {own[0]} ({own[1]}); "
            "give a run of the same task and protocol"
        )
    return run


def _announce(
    request: Request, recipe: Recipe, origin: Mapping[str, str], prepared: Prepared, model: Classifier, console: Console
) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    count, kind = request.placement.world_size, device().type
    console.print(
        f"[bold]{prepared.task.name}[/] ({prepared.protocol.name}) x [bold]{request.architecture_name}[/], "
        f"recipe {recipe.name} [dim]{recipe.hash[:8]}[/], seed {request.seed}, {parameters:,} parameters, "
        f"{kind if count == 1 else f'{count} x {kind}'}"
    )
    for line in (recipe.note, origin["model.d_model"] if request.match else "", origin.get("width", "")):
        if line:
            console.print(f"[yellow]{line}[/]")


def _own_fields(request: Request, trained: TrainingResult, refused: list[str], context: RunContext) -> dict[str, Any]:
    """The fields of the record that describe the run."""
    here = environment.environment() | {"device": context.device.type, "precision": trained.trainer.precision}
    if context.placement.world_size > 1:
        here |= {"devices": context.placement.world_size, "strategy": context.placement.resolved}
    return {
        "speed": trained.meter.speed(),
        "memory": trained.memory,
        "resumed": request.resume,
        "environment": here,
        "refused_implementations": refused,
        "command": request.command(),
        **({"search": dict(request.search)} if request.search else {}),
        **trained.facts,
    }


def _write_selection(folder: Path, recipe: Recipe, scores: Mapping[str, Any]) -> Path:
    """The validation scores of a run that stops before the test set, for the search that started it."""
    path = folder / "selection.json"
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps({"recipe_hash": recipe.hash, **scores}) + "\n")
    return path


def check_operators(model: Classifier, prepared: Prepared, constructor: Constructor) -> list[str]:
    """Check the operators that this model uses on this machine, in a forward pass of two examples.

    Returns one line for each implementation that is refused. Raises UserError where a user's own layer fails, and
    where it sees later positions on a task that rules this out.
    """
    split = prepared.split("train")
    examples = np.arange(min(2, len(split)))
    data = DeviceSet.of(split, prepared.protocol, next(model.parameters()).device, examples)
    _dispatch.forget_used()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            batch = data.batch(np.arange(len(data)))
            model.eval()(batch)
            if not constructor.declared and construction.needs_causal(prepared.task):
                _check_causal(model, batch, prepared)
    except Exception as error:
        if (constructor.declared and ":" not in constructor.name) or isinstance(error, UserError):
            raise
        raise UserError(f"{constructor.name}: its first batch {describe(error)}") from error
    model.train()
    lines = doctor.require_parity(_dispatch.used(), device())
    _dispatch.forget_used()
    return lines


def _check_causal(model: Classifier, batch: Batch, prepared: Prepared) -> None:
    """Raise UserError if the second half of the input changes outputs for the first half."""
    values, half = batch.values[:, 0], batch.values.shape[2] // 2
    changed = values.clone()
    changed[:, half:] = (values[:, half:] + 1) % prepared.protocol.vocabulary if prepared.protocol.vocabulary else 0
    mask = torch.ones_like(batch.mask[:, 0])
    before, after = (model.encode(given, mask)[0][:, :half] for given in (values, changed))
    if (before - after).abs().max() > 1e-3 * before.abs().max():
        raise UserError(
            f"{prepared.task.name} needs a causal layer, but outputs of this one depend on later positions, although "
            "it declares `causal = True`"
        )


@contextmanager
def _explain_failures(recipe: Recipe) -> Iterator[None]:
    """Turn running out of memory or disk space into a UserError with advice."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the log or a checkpoint of this run'}: {error.strerror or error}; make "
            "room or set LRA_RUNS to a folder you can write to; the same command with --resume continues from the last "
            "checkpoint"
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(recipe) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise _out_of_memory(recipe) from error


def _out_of_memory(recipe: Recipe) -> UserError:
    return UserError(
        f"out of memory with {recipe.data.batch_size // recipe.train.accumulate} examples at once: raise "
        f"train.accumulate (now {recipe.train.accumulate}; the result stays the same) or set train.checkpointing=true, "
        f"else lower data.batch_size (now {recipe.data.batch_size}), or data.evaluation_batch_size "
        f"(now {recipe.data.evaluation_batch_size}) if it happened while scoring"
    )
