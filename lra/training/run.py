"""One run, from a recipe to a result: the one place where registry, data, model, training and record meet."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console

from lra import files, terminal
from lra.config import match, recipe
from lra.config.recipe import Recipe
from lra.config.sections import OBJECTIVES
from lra.data import prepared_sets
from lra.data.batches import DeviceSet
from lra.data.floors import floors
from lra.data.prepared_sets import Prepared
from lra.encoder import Encoder
from lra.errors import UserError
from lra.kernels import _dispatch
from lra.model import Classifier
from lra.operators import doctor
from lra.registry import Constructor, architectures, tasks
from lra.results import environment, result
from lra.task import Protocol, Task
from lra.training import checkpoint, distributed, stages
from lra.training.callbacks import Stop
from lra.training.distributed import Placement
from lra.training.module import Interrupted
from lra.training.run_record import record
from lra.training.stages import Setting, Trained

SHAPE = ("d_model", "n_layers", "length", "dropout", "direction")


@dataclass(frozen=True)
class Request:
    """What the command line asked for. recipe "auto": quick on a CPU, matched on a GPU; source: folder of raw data.

    pretrain: "" as the recipe says, else one of OBJECTIVES; match: a budget to solve the width for (lra.config.match);
    checkpoint_dir: where checkpoints live, by default the run's own folder; search: what a search did to find these
    settings; select_only: end before the test set is opened.
    """

    task: str
    architecture: str
    recipe: str = "auto"
    seed: int = 0
    protocol: str = ""
    settings: Mapping[str, str] | None = None
    source: Path | None = None
    time_limit: float | None = None
    resume: bool = False
    pretrain: str = ""
    match: str = ""
    placement: Placement = field(default_factory=Placement)
    checkpoint_dir: Path | None = None
    loggers: tuple[str, ...] = ()
    search: Mapping[str, Any] | None = None
    select_only: bool = False


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolved(request: Request) -> tuple[Recipe, dict[str, str], Constructor]:
    """The recipe, the origin of its values and the constructor, all checked against each other. Raises UserError."""
    tasks.get(request.task)
    constructor = architectures.get(request.architecture)
    name = request.recipe
    if name == "auto":
        name = "matched" if device().type == "cuda" else "quick"
    found, origin = recipe.resolve(name, request.task, request.architecture, request.settings)
    if request.protocol:
        found = replace(found, data=replace(found.data, protocol=request.protocol))
        origin["data.protocol"] = "--protocol"
    if request.pretrain:
        if request.pretrain not in OBJECTIVES:
            raise recipe.unknown("objective", request.pretrain, OBJECTIVES, where="--pretrain")
        found = found.trained_as(request.pretrain)
        origin["pretrain.objective"] = "--pretrain"
    known = constructor.options()
    for key in found.encoder:
        if key not in known or key in SHAPE:
            own = [k for k in known if k not in SHAPE]
            raise recipe.unknown("key", f"encoder.{key}", [f"encoder.{k}" for k in own], where=found.architecture)
    found, origin = recipe.of_variant(found, origin, constructor.preset)
    if found.model.budget and not request.match:
        width, said = _within_budget(found, name, request.settings or {}, constructor)
        if width != found.model.d_model:
            found = replace(found, model=replace(found.model, d_model=width))
            origin["model.d_model"] = f"model.budget: {said}"
    if request.match:
        task, protocol = prepared_sets.resolve(found.task, found.data.protocol or None)
        width, said = match.solved(request.match, found, lambda f: build(f, constructor, task, protocol, 0), protocol)
        found = replace(found, model=replace(found.model, d_model=width))
        origin["model.d_model"] = f"--match: {said}"
    return found, origin, constructor


def _within_budget(found: Recipe, name: str, settings: Mapping[str, str], constructor: Constructor) -> tuple[int, str]:
    """The width of a recipe that limits parameters, and a line on it."""
    common = {key: value for key, value in settings.items() if not key.startswith("encoder.")}
    reference, _ = recipe.resolve(name, found.task, "transformer", common)
    transformer = architectures.get("transformer")
    return match.within_budget(
        found,
        reference,
        lambda f: encoder(f, constructor, match.LENGTH),
        lambda f: encoder(f, transformer, match.LENGTH),
    )


def build(found: Recipe, constructor: Constructor, task: Task, protocol: Protocol, seed: int) -> Classifier:
    """The classifier with the weights `seed` gives it."""
    L.seed_everything(seed, verbose=False)
    return Classifier(
        encoder(found, constructor, protocol.length), protocol, task.classes, task.towers, found.model.pooling
    )


def encoder(found: Recipe, constructor: Constructor, length: int) -> Encoder:
    """The encoder of a recipe, built for sequences of up to `length` tokens."""
    shape: dict[str, Any] = {"d_model": found.model.d_model, "n_layers": found.model.n_layers}
    extra = 1 if found.model.pooling == "cls" else 0
    if "direction" in constructor.options():
        shape["direction"] = found.model.direction
    return constructor(**shape, length=length + extra, dropout=found.model.dropout, **found.encoder)


def run(request: Request, console: Console) -> Path:
    """Train, select, test once, record. Returns the path of the result. Raises UserError, DataError, Interrupted."""
    torch.set_float32_matmul_precision("high")
    found, origin, constructor = resolved(request)
    here = device()
    placement = request.placement.checked(here, found)
    leads = distributed.share(placement).rank == 0
    console = console if leads else Console(quiet=True)
    root = result.folder()
    place = "smoke" if found.smoke else "runs"
    files.check_writable(root / place / tasks.get(request.task).cls.name / result.slug(request.architecture))
    with terminal.bar(console, f"preparing {request.task}") as progress:
        prepared = prepared_sets.prepared(request.task, found.data.protocol, source=request.source, progress=progress)
    model = build(found, constructor, prepared.task, prepared.protocol, request.seed)
    parameters = sum(p.numel() for p in model.parameters())
    devices = here.type if placement.world == 1 else f"{placement.world} x {here.type}"
    console.print(
        f"[bold]{prepared.task.name}[/] ({prepared.protocol.name}) x [bold]{request.architecture}[/], "
        f"recipe {found.name} [dim]{found.hash[:8]}[/], seed {request.seed}, {parameters:,} parameters, {devices}"
    )
    for line in (found.note, origin["model.d_model"] if request.match else ""):
        if line:
            console.print(f"[yellow]{line}[/]")
    refused = gate(model, prepared)
    started, clock = datetime.now(UTC), time.perf_counter()
    with _explained(found), _workspace(request, found, leads) as folder:
        deadline = None if request.time_limit is None else time.monotonic() + request.time_limit
        setting = Setting(
            here, folder, _checkpoints(request, folder), console, request.seed, placement, request.loggers, deadline,
            request.resume,
        )  # fmt: skip
        trained = stages.train(found, prepared, model, setting)
        measured = stages.score(found, prepared, trained, setting, test=not request.select_only)
        if not leads:
            raise SystemExit(0)
        if request.select_only:
            return _selected(folder, found, measured, prepared)
        more = _more(request, trained, refused, setting)
        content = record(
            request.architecture, request.seed, found, prepared, constructor, trained.model, measured, more, started,
            trained.meter.earlier + time.perf_counter() - clock,
        )  # fmt: skip
        path = result.write(content, measured["predictions"], root, place)
        (setting.checkpoints / "last.ckpt").unlink(missing_ok=True)
    return path


def _more(request: Request, trained: Trained, refused: list[str], setting: Setting) -> dict[str, Any]:
    where = environment.environment() | {"device": setting.device.type, "precision": trained.trainer.precision}
    if setting.placement.world > 1:
        where |= {"devices": setting.placement.world, "strategy": setting.placement.taken}
    return {
        "speed": trained.meter.speed(),
        "memory": trained.memory,
        "resumed": request.resume,
        "environment": where,
        "refused_implementations": refused,
        **({"search": dict(request.search)} if request.search else {}),
        **trained.facts,
    }


def _selected(folder: Path, found: Recipe, measured: Mapping[str, Any], prepared: Prepared) -> Path:
    """The outcome of a run that stops before the test set, for the search that asked for it."""
    path = folder / "selection.json"
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps({"recipe_hash": found.hash, **measured[prepared.protocol.selection]}) + "\n")
    return path


def restore(folder: Path) -> Classifier:
    """The trained classifier of a finished run's folder, on the CPU, in evaluation mode. Raises UserError."""
    try:
        found = recipe.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        weights = checkpoint.read(folder / "checkpoints" / "best.ckpt")["state_dict"]
    except (OSError, ValueError, KeyError, UserError) as error:
        raise UserError(f"{folder} does not hold a trained run: {error}") from None
    task, protocol = prepared_sets.resolve(found.task, found.data.protocol or None)
    model = build(found, architectures.get(found.architecture), task, protocol, seed=0)
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items() if key[:6] == "model."})
    return model.eval()


def folder_of(request: Request, found: Recipe) -> Path:
    """Where a run keeps recipe, log and checkpoints."""
    task, recipe_name = tasks.get(request.task).cls.name, files.safe(found.name.replace("/", "-"), 60)
    name = f"{task}-{result.slug(request.architecture)}-{recipe_name}-{found.hash[:8]}-s{request.seed}"
    return result.unfinished() / name


def _checkpoints(request: Request, folder: Path) -> Path:
    return request.checkpoint_dir / folder.name if request.checkpoint_dir else folder / "checkpoints"


@contextmanager
def _workspace(request: Request, found: Recipe, leads: bool) -> Iterator[Path]:
    """The folder of a run in progress: recipe, log, checkpoints; held by one run at a time."""
    folder = folder_of(request, found)
    if not leads:
        yield folder
        return
    checkpoints = _checkpoints(request, folder)
    # one killed before its first checkpoint starts from its first step again
    if request.resume and not (folder / "recipe.json").is_file() and not checkpoints.is_dir():
        raise UserError(f"nothing to resume in {folder}; run it without --resume")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is on this very run ({folder}); wait for it or change the seed") from None
        if not request.resume:
            for place in (checkpoints, folder / "log"):
                shutil.rmtree(place, ignore_errors=True)
        with files.atomic(folder / "recipe.json") as temporary:
            temporary.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
        yield folder


@contextmanager
def _explained(found: Recipe) -> Iterator[None]:
    """Out of memory becomes what to lower, a disk that is full or read-only where to look."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the log or a checkpoint of this run'}: {error.strerror or error}; make "
            "room or set LRA_RUNS to a folder you can write to; the same command with --resume goes on from the last "
            "checkpoint"
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(found) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise _out_of_memory(found) from error


def _out_of_memory(found: Recipe) -> UserError:
    return UserError(
        f"out of memory with {found.data.batch_size // found.train.accumulate} examples at once: raise "
        f"train.accumulate (now {found.train.accumulate}; the result stays the same) or set train.checkpointing=true, "
        f"else lower data.batch_size (now {found.data.batch_size}), or data.evaluation_batch_size "
        f"(now {found.data.evaluation_batch_size}) if it happened while scoring"
    )


def gate(model: Classifier, prepared: Prepared) -> list[str]:
    """Check the operators this model uses on this machine before a run counts; one line for each that is refused."""
    split = prepared.split("train")
    two = DeviceSet.of(split, prepared.protocol, next(model.parameters()).device, np.arange(min(2, len(split))))
    _dispatch.forget_used()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()(two.batch(np.arange(len(two))))
    model.train()
    lines = doctor.gate(_dispatch.used(), device())
    _dispatch.forget_used()
    return lines


__all__ = ["Interrupted", "Request", "Stop", "build", "floors", "resolved", "restore", "run"]
