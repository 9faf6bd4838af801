"""The stages of a run under Lightning's trainer: self-pretraining, training, scoring."""

from __future__ import annotations

import copy
import importlib
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console

from lra.config.recipe import Recipe
from lra.data.batches import DeviceSet, Sampler, Steps, Sweep, choose
from lra.data.prepared_sets import Prepared
from lra.errors import UserError, unknown
from lra.model import Classifier
from lra.profiling import memory
from lra.training import checkpoint, distributed, execution, precision, rate_search
from lra.training.callbacks import Band, Bar, Meter, Resume, Stop, check_checkpoint, checkpoints
from lra.training.distributed import Placement
from lra.training.module import Trainable, Training
from lra.training.pretraining import Pretraining

LOGGERS = {
    "tensorboard": ("lightning.pytorch.loggers", "TensorBoardLogger", "tensorboard"),
    "wandb": ("lightning.pytorch.loggers", "WandbLogger", "wandb"),
    "mlflow": ("lightning.pytorch.loggers", "MLFlowLogger", "mlflow"),
}


@dataclass(frozen=True)
class Setting:
    """Where and how a run is trained, none of which is part of its recipe."""

    device: torch.device
    folder: Path
    checkpoints: Path
    console: Console
    seed: int
    placement: Placement = field(default_factory=Placement)
    loggers: tuple[str, ...] = ()
    deadline: float | None = None
    resume: bool = False


@dataclass
class Trained:
    """module: as it was trained, in shards perhaps; model: whole, with the last weights or, in shards, the first."""

    module: Training
    model: Classifier
    trainer: L.Trainer
    meter: Meter
    memory: dict[str, int | str]
    facts: dict[str, Any]
    """What the record says of the way it was trained."""


def train(found: Recipe, prepared: Prepared, model: Classifier, setting: Setting) -> Trained:
    """Pretrain if the recipe says so, then train with validation. Raises UserError, Interrupted."""
    here = setting.device
    peak = memory.Peak(here)
    memory.keep_freed()
    split = prepared.split("train")
    data = DeviceSet.of(split, prepared.protocol, here, choose(len(split), found.data.train_examples))
    arranged(found, model)
    facts = efficient(data, model.to(here)) if found.train.compile else {}
    if found.pretrain.objective != "none":
        facts["pretraining"] = _pretrain(found, prepared, data, model, setting)
    selection = prepared.split(prepared.protocol.selection)
    held = DeviceSet.of(selection, prepared.protocol, here, choose(len(selection), found.data.validation_examples))
    if found.search.rates:
        found, facts["rate_search"] = _search_rate(found, prepared, data, held, model, setting)
    sampler = sampled(found, data, setting.seed)
    whole = copy.deepcopy(model) if setting.placement.sharded else model
    module = Training(model, found, prepared.task.classes)
    every = min(found.train.evaluate_every, found.train.steps)
    meter, band = Meter(min(20, every), every), Band(found.expected, sampler.per_epoch, setting.console)
    averaged = [EMAWeightAveraging(decay=found.optim.ema)] if found.optim.ema else []
    trainer = _fit(
        module, found, setting, sampler, data, setting.checkpoints, meter, [*averaged, band],
        validation=Sweep(held, found.data.evaluation_batch_size, distributed.share(setting.placement)),
        val_check_interval=every * found.train.accumulate, check_val_every_n_epoch=None,
    )  # fmt: skip
    facts |= {"curve": module.curve} | ({"diagnostics": module.diagnostics} if module.diagnostics else {})
    facts |= {"off_course": band.below} if band.below else {}
    return Trained(module, whole, trainer, meter, peak.read(), facts)


def _search_rate(
    found: Recipe, prepared: Prepared, data: DeviceSet, held: DeviceSet, model: Classifier, setting: Setting
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the rate that did best in short runs, and what the search cost."""

    def run_trial(trial: Recipe) -> rate_search.Trial:
        rate, steps = trial.optim.lr, trial.train.steps
        setting.console.print(f"learning rate {rate:g}: {steps:,} steps")
        module, meter = Training(model, trial, prepared.task.classes), Meter(min(20, steps), steps)
        folder = setting.checkpoints / f"rate-{rate:g}"
        _fit(
            module, trial, setting, sampled(trial, data, setting.seed), data, folder, meter, [], name=f"rate-{rate:g}",
            validation=Sweep(held, trial.data.evaluation_batch_size, distributed.share(setting.placement)),
            val_check_interval=steps * trial.train.accumulate, check_val_every_n_epoch=None,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        last, speed = module.curve[-1], meter.speed()
        return {
            "lr": rate, "steps": steps, "accuracy": last["validation_accuracy"], "loss": last["validation_loss"],
            "examples": speed["examples"], "seconds": round(meter.elapsed, 3),
        }  # fmt: skip

    leads = distributed.rank() == 0
    return rate_search.search(found, model, setting.checkpoints / "rates.json", run_trial, leads)


def sampled(found: Recipe, data: DeviceSet, seed: int) -> Sampler:
    """The batches of training proper."""
    growth = {"grow_from": found.train.curriculum_length, "grow_steps": found.train.curriculum_steps}
    return Sampler(data.lengths, found.data.batch_size, seed, **growth)


def arranged(found: Recipe, model: Classifier) -> None:
    if found.train.checkpointing:
        execution.recompute(model.encoder)
    if found.train.tbptt:
        execution.truncate(model.encoder, found.train.tbptt)


def efficient(data: DeviceSet, model: Classifier) -> dict[str, Any]:
    """Compile, tried on two examples without touching the generators a run is seeded with."""
    batch = data.batch(np.arange(min(2, len(data))))
    with torch.random.fork_rng(devices=[data.device] if data.device.type == "cuda" else []):
        said = execution.compiled(model.encoder, lambda: model(batch))
    return {"compile": said}


def _pretrain(
    found: Recipe, prepared: Prepared, data: DeviceSet, model: Classifier, setting: Setting
) -> dict[str, Any]:
    """Leave the model with pretrained weights; what it cost. A finished stage is not repeated when a run goes on."""
    folder = setting.checkpoints / "pretraining"
    done = folder / "done.ckpt"
    module = Pretraining(model, found, prepared.protocol)
    if not (setting.resume and done.is_file()):
        sampler = Sampler(data.lengths, module.batch_size, setting.seed)
        meter = Meter(min(20, found.pretrain.steps))
        _fit(module, found, setting, sampler, data, folder, meter, [], name="pretraining")
        if distributed.rank() == 0:
            state = {k: v.cpu() for k, v in model.state_dict().items()}
            checkpoint.write({"model": state, "speed": meter.speed(), "random": torch.get_rng_state()}, done)
            (folder / "last.ckpt").unlink(missing_ok=True)
        if distributed.world() > 1:
            torch.distributed.barrier()
    kept = checkpoint.read(done)
    model.load_state_dict(kept["model"])
    torch.set_rng_state(kept["random"])
    return {"objective": found.pretrain.objective, **kept["speed"]}


def _fit(
    module: Trainable, found: Recipe, setting: Setting, sampler: Sampler, data: DeviceSet, folder: Path, meter: Meter,
    callbacks: list[Any], validation: Sweep | None = None, name: str = "", **more: Any,
) -> L.Trainer:  # fmt: skip
    parts, last = found.train.accumulate, folder / "last.ckpt"
    steps = Steps(data, sampler, module.steps, parts, distributed.share(setting.placement))
    goes_on = setting.resume and last.is_file()
    if goes_on:
        check_checkpoint(last, found.hash)
        _keep_log(setting.folder / "log" / name / "metrics.csv")
    block = next((type(b) for b in execution.blocks(module.model.encoder)), None)
    trainer = _trainer(
        found, setting, name=name,
        callbacks=[
            meter, Resume(steps, found.hash), Stop(last, setting.deadline, meter.validate_every), *callbacks,
            *checkpoints(folder, meter.validate_every),
        ],
        max_steps=module.steps, max_epochs=-1, log_every_n_steps=meter.every, accumulate_grad_batches=parts,
        gradient_clip_val=found.optim.clip or None, plugins=[checkpoint.Whole()], **more,
        **setting.placement.for_trainer(block),
    )  # fmt: skip
    with quiet():
        trainer.fit(module, steps, validation, ckpt_path=last if goes_on else None, weights_only=True)
    return trainer


def _keep_log(file: Path) -> None:
    """The logger starts its file anew; what was logged before the interruption stays beside it."""
    if file.is_file():
        number = len(list(file.parent.glob("metrics-*.csv")))
        file.rename(file.with_name(f"metrics-{number}.csv"))


def _trainer(found: Recipe, setting: Setting, *, name: str = "", **more: Any) -> L.Trainer:
    kind: Any = "bf16-mixed" if precision.uses_bf16(found, setting.device) else "32-true"
    terminal = setting.console.is_terminal
    callbacks = [*more.pop("callbacks", []), *([Bar(leave=False)] if terminal else [])]
    training = "max_steps" in more
    with quiet():
        return L.Trainer(
            accelerator="gpu" if setting.device.type == "cuda" else "cpu", precision=kind, callbacks=callbacks,
            logger=_loggers(setting, name) if training else False, default_root_dir=setting.folder,
            num_sanity_val_steps=0, enable_progress_bar=terminal, enable_model_summary=False,
            enable_checkpointing=training, **({"devices": 1} | more),
        )  # fmt: skip


def _loggers(setting: Setting, name: str) -> list[Any]:
    """CSV always, and the named ones beside it. Raises UserError for a package that is missing."""
    found: list[Any] = [L.pytorch.loggers.CSVLogger(setting.folder / "log", name="", version=name)]
    for wanted in setting.loggers if distributed.rank() == 0 else ():
        if wanted == "csv":
            continue
        if wanted not in LOGGERS:
            raise unknown("logger", wanted, ("csv", *LOGGERS))
        module, kind, package = LOGGERS[wanted]
        try:
            make = getattr(importlib.import_module(module), kind)
            folder = (setting.folder / "log").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            # MLflow takes a database and gives up plain files
            place = {"tracking_uri": f"sqlite:///{folder / 'mlflow.db'}", "artifact_location": folder.as_uri()}
            found.append(make(**(place if wanted == "mlflow" else {"save_dir": folder})))
        except (ImportError, ModuleNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--logger {wanted} needs the package {package}: `pip install {package}` ({reason})"
            ) from None
    return found


def score(found: Recipe, prepared: Prepared, trained: Trained, setting: Setting, test: bool = True) -> dict[str, Any]:
    """Score the selection split and, once, the test split with the best checkpoint; every example exactly once."""
    best = checkpoint.read(setting.checkpoints / "best.ckpt")
    model = trained.model
    model.load_state_dict({k.removeprefix("model."): v for k, v in best["state_dict"].items() if k[:6] == "model."})
    scores: dict[str, Any] = {"best_step": int(best["global_step"])}
    splits = [(prepared.protocol.selection, found.data.validation_examples)]
    for name, wanted in [*splits, ("test", found.data.test_examples)] if test else splits:
        split = prepared.split(name)
        kept = choose(len(split), wanted)
        data = DeviceSet.of(split, prepared.protocol, setting.device, kept)
        clock = time.perf_counter()
        index, predicted = _predicted(found, trained, data, setting)
        seconds = time.perf_counter() - clock
        if not np.array_equal(index, np.arange(len(data))):
            raise RuntimeError(f"scoring {name} met {len(index)} examples, not each of {len(data)} once")
        labels = data.labels.cpu().numpy()
        right = int((predicted == labels).sum())
        scores[name] = {
            "accuracy": right / len(labels), "correct": right, "n": len(labels), "seconds": round(seconds, 3),
        }  # fmt: skip
        scores["predictions"] = {
            "prediction": predicted, "label": labels.astype(np.uint8),
            "example": (np.arange(len(split)) if kept is None else kept).astype(np.int32),
        }  # fmt: skip
    return scores


def _predicted(found: Recipe, trained: Trained, data: DeviceSet, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Places and predicted classes of all examples, in order, from all processes."""
    sweep = Sweep(data, found.data.evaluation_batch_size, distributed.share(setting.placement))
    trainer = _trainer(found, setting) if setting.placement.world == 1 else None
    if trainer is not None:
        with quiet():
            parts: Any = trainer.predict(trained.module, sweep) or []
    else:
        here = trained.model.to(setting.device).eval()
        with torch.inference_mode(), precision.autocast(found, setting.device):
            parts = [(batch.example.cpu(), here(batch).argmax(dim=-1).cpu()) for batch in sweep]
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    every = distributed.gathered(columns)
    index, predicted = (np.concatenate(column) for column in zip(*every, strict=True))
    order = np.argsort(index, kind="stable")
    return index[order], predicted[order].astype(np.uint8)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on loaders and devices, none of which concern data that already are on the device."""
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
