"""One run, from a recipe to a result: the one place where registry, data, model, training and record meet."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console

from lra import doctor, flops, memory, recipe, result, statistics, store, terminal
from lra.data import Batch, DeviceSet, Sampler, Steps, Sweep, choose
from lra.errors import UserError
from lra.kernels import _dispatch
from lra.model import Classifier
from lra.recipe import Recipe
from lra.registry import Constructor, architectures, tasks
from lra.store import Prepared
from lra.task import Protocol, Task
from lra.train import Bar, Interrupted, Meter, Resume, Stop, Training, checkpoints

COLLAPSED = "not above the best blind guess"


@dataclass(frozen=True)
class Request:
    """What the command line asked for. recipe "auto": quick on a CPU, matched on a GPU; source: folder of raw data."""

    task: str
    architecture: str
    recipe: str = "auto"
    seed: int = 0
    protocol: str = ""
    settings: Mapping[str, str] | None = None
    source: Path | None = None
    time_limit: float | None = None
    resume: bool = False


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
    known = constructor.options()
    for key in found.encoder:
        if key not in known or key in ("d_model", "n_layers", "length", "dropout", "direction"):
            own = [k for k in known if k not in ("d_model", "n_layers", "length", "dropout", "direction")]
            raise recipe.unknown("key", f"encoder.{key}", [f"encoder.{k}" for k in own], where=found.architecture)
    return found, origin, constructor


def build(found: Recipe, constructor: Constructor, task: Task, protocol: Protocol, seed: int) -> Classifier:
    """The classifier with the weights `seed` gives it."""
    L.seed_everything(seed, verbose=False)
    shape: dict[str, Any] = {"d_model": found.model.d_model, "n_layers": found.model.n_layers}
    extra = 1 if found.model.pooling == "cls" else 0
    if "direction" in constructor.options():
        shape["direction"] = found.model.direction
    encoder = constructor(**shape, length=protocol.length + extra, dropout=found.model.dropout, **found.encoder)
    return Classifier(encoder, protocol, task.classes, task.towers, found.model.pooling)


def run(request: Request, console: Console) -> Path:
    """Train, select, test once, record. Returns the path of the result. Raises UserError, DataError, Interrupted."""
    torch.set_float32_matmul_precision("high")
    found, _, constructor = resolved(request)
    root = result.folder()
    result.check_writable(root / "runs" / tasks.get(request.task).cls.name / result.slug(request.architecture))
    with terminal.bar(console, f"preparing {request.task}") as progress:
        prepared = store.prepared(request.task, found.data.protocol, source=request.source, progress=progress)
    model = build(found, constructor, prepared.task, prepared.protocol, request.seed)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]{prepared.task.name}[/] ({prepared.protocol.name}) x [bold]{request.architecture}[/], "
        f"recipe {found.name} [dim]{found.hash[:8]}[/], seed {request.seed}, {parameters:,} parameters, {device().type}"
    )
    if found.note:
        console.print(f"[yellow]{found.note}[/]")
    refused = _gate(model, prepared)
    started, clock = datetime.now(UTC), time.perf_counter()
    with _workspace(request, found) as folder:
        trained = _train(request, found, prepared, model, folder, console)
        measured = _test(found, prepared, trained, folder, console)
        record = _record(request, found, prepared, constructor, trained, measured, started, clock)
        record["refused_implementations"] = refused
        path = result.write(record, measured["predictions"], root)
        (folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    return path


def restore(folder: Path) -> Classifier:
    """The trained classifier of a finished run's folder, on the CPU, in evaluation mode. Raises UserError."""
    checkpoint = folder / "checkpoints" / "best.ckpt"
    try:
        found = recipe.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        weights = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    except (OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder} does not hold a trained run: {error}") from None
    task, protocol = store.resolve(found.task, found.data.protocol or None)
    model = build(found, architectures.get(found.architecture), task, protocol, seed=0)
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items() if key[:6] == "model."})
    return model.eval()


@contextmanager
def _workspace(request: Request, found: Recipe) -> Iterator[Path]:
    """The folder of a run in progress: recipe, log, checkpoints; held by one process at a time."""
    task, recipe_name = tasks.get(request.task).cls.name, found.name.replace("/", "-")
    name = f"{task}-{result.slug(request.architecture)}-{recipe_name}-{found.hash[:8]}-s{request.seed}"
    folder = Path(os.environ.get("LRA_RUNS", "runs")) / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is on this very run ({folder}); wait for it or change the seed") from None
        if not request.resume:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / "metrics.csv").unlink(missing_ok=True)
        with result.atomic(folder / "recipe.json") as temporary:
            temporary.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
        yield folder


@dataclass
class Trained:
    module: Training
    trainer: L.Trainer
    meter: Meter
    memory: dict[str, int | str]
    resumed: bool


def _train(
    request: Request, found: Recipe, prepared: Prepared, model: Classifier, folder: Path, console: Console
) -> Trained:
    train, selection = prepared.split("train"), prepared.split(prepared.protocol.selection)
    here = device()
    peak = memory.Peak(here)
    data = DeviceSet.of(train, prepared.protocol, here, choose(len(train), found.data.train_examples))
    held = DeviceSet.of(selection, prepared.protocol, here, choose(len(selection), found.data.validation_examples))
    steps = Steps(data, Sampler(data.lengths, found.data.batch_size, request.seed), found.train.steps)
    module = Training(model, found, prepared.task.classes)
    every = min(found.train.evaluate_every, found.train.steps)
    meter = Meter(every=min(20, every))
    deadline = None if request.time_limit is None else time.monotonic() + request.time_limit
    last = folder / "checkpoints" / "last.ckpt"
    if request.resume and not last.is_file():
        raise UserError(f"nothing to resume in {folder}; run it without --resume")
    trainer = _trainer(
        found, here, folder, console,
        max_steps=found.train.steps, max_epochs=-1, val_check_interval=every, check_val_every_n_epoch=None,
        gradient_clip_val=found.optim.clip or None,
        callbacks=[
            meter, Resume(steps, found.hash), Stop(last, deadline), *checkpoints(folder / "checkpoints"),
        ],
    )  # fmt: skip
    with _quiet():
        trainer.fit(
            module, steps, Sweep(held, found.data.evaluation_batch_size),
            ckpt_path=last if request.resume else None, weights_only=True,
        )  # fmt: skip
    return Trained(module, trainer, meter, peak.read(), request.resume)


def _trainer(found: Recipe, here: torch.device, folder: Path, console: Console, **more: Any) -> L.Trainer:
    precision: Any = "bf16-mixed" if _bf16(found, here) else "32-true"
    callbacks = [*more.pop("callbacks", []), *([Bar(leave=False)] if console.is_terminal else [])]
    logger = L.pytorch.loggers.CSVLogger(folder, name="", version="log") if "max_steps" in more else False
    with _quiet():
        return L.Trainer(
        accelerator="gpu" if here.type == "cuda" else "cpu", devices=1, precision=precision, callbacks=callbacks,
        logger=logger, default_root_dir=folder, log_every_n_steps=20, num_sanity_val_steps=0,
        enable_progress_bar=console.is_terminal, enable_model_summary=False,
        enable_checkpointing="max_steps" in more, **more,
    )  # fmt: skip


def _bf16(found: Recipe, here: torch.device) -> bool:
    return found.train.precision == "bf16" or (found.train.precision == "auto" and here.type == "cuda")


def _test(found: Recipe, prepared: Prepared, trained: Trained, folder: Path, console: Console) -> dict[str, Any]:
    """Score the selection split and, once, the test split with the best checkpoint."""
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True, map_location="cpu")
    trained.module.load_state_dict(best["state_dict"])
    scores: dict[str, Any] = {"best_step": int(best["global_step"])}
    here = device()
    for name, wanted in (
        (prepared.protocol.selection, found.data.validation_examples),
        ("test", found.data.test_examples),
    ):
        split = prepared.split(name)
        kept = choose(len(split), wanted)
        data = DeviceSet.of(split, prepared.protocol, here, kept)
        trainer = _trainer(found, here, folder, console)
        clock = time.perf_counter()
        with _quiet():
            parts = trainer.predict(trained.module, Sweep(data, found.data.evaluation_batch_size))
        seconds = time.perf_counter() - clock
        index, predicted = (torch.cat(column).numpy() for column in zip(*(parts or []), strict=True))
        order = np.argsort(index)
        predicted, labels = predicted[order].astype(np.uint8), data.labels.cpu().numpy()
        right = int((predicted == labels).sum())
        scores[name] = {
            "accuracy": right / len(labels), "correct": right, "n": len(labels), "seconds": round(seconds, 3),
        }  # fmt: skip
        scores["predictions"] = {
            "prediction": predicted, "label": labels.astype(np.uint8),
            "example": (np.arange(len(split)) if kept is None else kept).astype(np.int32),
        }  # fmt: skip
    return scores


def floors(prepared: Prepared) -> dict[str, float]:
    """The task's floors on this prepared set, computed once and kept beside it."""
    place = prepared.folder.with_name(f"{prepared.folder.name}.floors.json")
    if place.is_file():
        known = json.loads(place.read_text())
        if known.get("checksum") == prepared.checksum:
            return known["floors"]
    found = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    with result.atomic(place) as temporary:
        temporary.write_text(json.dumps({"checksum": prepared.checksum, "floors": found}))
    return found


def _record(
    request: Request, found: Recipe, prepared: Prepared, constructor: Constructor, trained: Trained,
    measured: dict[str, Any], started: datetime, clock: float,
) -> dict[str, Any]:  # fmt: skip
    model, meter, protocol = trained.module.model, trained.meter, prepared.protocol
    baseline = floors(prepared)
    blind = max(v for k, v in baseline.items() if k == "majority class")
    test = measured["test"]
    identity = f"{found.name.replace('/', '-')}-{found.hash[:8]}-s{request.seed}-{started:%Y%m%dT%H%M%S}"
    return {
        "schema": result.SCHEMA,
        "id": identity,
        "task": prepared.task.name,
        "architecture": request.architecture,
        "protocol": {"name": protocol.name, "length": protocol.length, "encoding": protocol.encoding},
        "recipe": found.as_dict(),
        "recipe_hash": found.hash,
        "seed": request.seed,
        "regime": found.regime,
        "direction": model.encoder.direction if constructor.declared else "not declared",
        "test": test,
        "validation": measured[protocol.selection] | {"split": protocol.selection, "best_step": measured["best_step"]},
        "collapsed": COLLAPSED if statistics.at_chance(test["accuracy"], test["n"], blind) else "",
        "floors": baseline,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": _flops(model, protocol),
        "speed": meter.speed(),
        "memory": trained.memory,
        "wall_seconds": round(time.perf_counter() - clock, 2),
        "resumed": trained.resumed,
        "implementations": _dispatch.used(),
        "data": {"checksum": prepared.checksum, "counts": prepared.manifest["counts"]},
        "environment": result.environment() | {"device": device().type, "precision": trained.trainer.precision},
        "command": result.command_line(),
        "started": started.isoformat(timespec="seconds"),
        "predictions": {},
    }


def _flops(model: Classifier, protocol: Protocol) -> dict[str, Any]:
    """Work for one example whose towers are as long as the protocol allows, counted and by formula."""
    shape = (1, model.towers, protocol.length)
    values = torch.zeros(shape if protocol.vocabulary else (*shape, protocol.channels), dtype=torch.uint8)
    one = torch.zeros(1, dtype=torch.int64)
    like = next(model.parameters())
    batch = Batch(*(t.to(like.device) for t in (values, torch.ones(shape, dtype=torch.bool), one, one)))
    report = flops.model_flops(model, batch)
    try:
        analytic: float | None = model.cost(protocol.length).matmul
    except NotImplementedError:
        analytic = None
    return {
        "length": protocol.length,
        "forward": report.forward,
        "forward_backward": report.forward_backward,
        "matmul": report.matmul,
        "matmul_by_formula": analytic,
        "uncounted": sorted(report.uncounted),
        "convention": "multiply-add = 2; one example",
    }


def _gate(model: Classifier, prepared: Prepared) -> list[str]:
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on loaders and devices, none of which concern data that already are on the device."""
    import logging

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


__all__ = ["Interrupted", "Request", "build", "floors", "resolved", "restore", "run"]
