"""Callbacks of training: throughput, progress, checkpoints, resuming, stopping, early warning."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lra.config.sections import Expected
from lra.data.batches import TrainingLoader
from lra.errors import Interrupted, UserError
from lra.model import Batch
from lra.training import checkpoint, distributed, interruption
from lra.training.module import Trainable, Training

SCHEMA = 4
"""Version of the checkpoints."""
CHECKPOINT_EVERY = timedelta(minutes=10)
"""Time between two checkpoints for resuming, where validations are further apart."""
StepProgress = Callable[[int, int, Mapping[str, float]], None]
"""progress(step, steps, metrics): called as training goes on, with the latest value of every metric."""


class ThroughputMeter(Callback):
    """Logs loss, accuracy and examples per second, and stops a run whose loss is not finite.

    The loss is read every `every` steps only, so that the host does not wait for the device in between. Validation and
    checkpoints do not count as training time.

    validate_every: steps between validations (0 = none); the loss is also read before each of them.
    shares: number of processes that each batch is divided among. earlier: wall seconds that a resumed run had spent
    before, up to its checkpoint.
    """

    shares = 1

    def __init__(self, every: int, validate_every: int = 0) -> None:
        self.every, self.validate_every = every, validate_every
        self.seconds, self.examples, self.tokens, self.steps = 0.0, 0, 0, 0
        self.earlier, self._created = 0.0, time.perf_counter()
        self._logged = (0.0, 0)
        self._losses: list[Tensor] = []
        self._checked = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._checked = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._begin = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        # on a CPU reading the loss costs nothing, and the weights are still those that gave it
        assert isinstance(module, Trainable)
        if module.latest is not None and module.device.type == "cpu" and not torch.isfinite(module.latest[0]):
            raise _diverged(
                float(module.latest[0]), trainer.global_step + 1, locate_nonfinite(module, module.latest[1])
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        assert isinstance(module, Trainable)
        step = trainer.global_step
        stepped = step != module.step_before
        log = stepped and (step % self.every == 0 or step == trainer.max_steps)
        read = log or (stepped and self.validate_every > 0 and step % self.validate_every == 0)
        self._losses.append(outputs["loss"].detach())
        if read:
            losses = torch.stack(self._losses)
            self._losses = []
            per_step = losses.unflatten(0, (step - self._checked, -1)).float().mean(dim=1)
            per_step = distributed.mean(per_step)
            loss = per_step[-1].item()
        self.seconds += time.perf_counter() - self._begin
        self.examples += len(batch.labels) * self.shares
        self.tokens += batch.mask.numel() * self.shares
        self.steps += stepped
        if not read:
            return
        nonfinite = (~torch.isfinite(per_step)).nonzero()
        if len(nonfinite):
            first = int(nonfinite[0])
            raise _diverged(per_step[first].item(), self._checked + first + 1, locate_nonfinite(module, batch))
        self._checked = step
        if log:
            self._log(module, loss)

    def _log(self, module: Trainable, loss: float) -> None:
        seconds, examples = self._logged
        module.log("loss", loss, prog_bar=True)
        if isinstance(module, Training):
            module.log("accuracy", distributed.mean(module.train_accuracy.compute()), prog_bar=True)
            module.train_accuracy.reset()
        module.log("examples/s", (self.examples - examples) / (self.seconds - seconds), prog_bar=True)
        self._logged = (self.seconds, self.examples)

    @property
    def elapsed(self) -> float:
        """Wall seconds since the run began, validation and earlier parts of a resumed run included."""
        return self.earlier + time.perf_counter() - self._created

    def speed(self) -> dict[str, float | int]:
        """Training throughput over the whole run, first steps included. Tokens include padding, which costs as much."""
        seconds = max(self.seconds, 1e-9)
        return {
            "examples_per_second": round(self.examples / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "training_seconds": round(self.seconds, 3),
            "steps": self.steps,
            "examples": self.examples,
        }

    def state_dict(self) -> dict[str, Any]:
        state = {"seconds": self.seconds, "examples": self.examples, "tokens": self.tokens, "steps": self.steps}
        return state | {"earlier": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        self._logged = (self.seconds, self.examples)


def locate_nonfinite(module: nn.Module, batch: Batch) -> str:
    """Locate the first non-finite values: in the weights, otherwise in the first module whose output has them."""
    for name in _nonfinite_weights(module):
        return f"non-finite weights in {name}"
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        # its forward pass needs all processes
        return "the weights of this process are finite"
    names: list[str] = []

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if any(isinstance(p, Tensor) and not torch.isfinite(p).all() for p in parts):
                names.append(name)

        return hook

    model = getattr(module, "model", module)
    hooks = [m.register_forward_hook(record(name or "the model")) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return f"non-finite output in {names[0]}" if names else "every module's output is finite"


def _nonfinite_weights(module: nn.Module) -> list[str]:
    """Names of the parameters that are not finite, as far as this process holds them."""
    held = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return [name.removeprefix("model.") for name, value in held.items() if not torch.isfinite(value).all()]


def _diverged(loss: float, step: int, where: str) -> UserError:
    return UserError(
        f"the loss is {loss} at step {step} ({where}): lower optim.lr or raise optim.warmup; the last good checkpoint "
        "is kept"
    )


class ProgressReport(Callback):
    """Calls progress(step, steps, metrics) every `every` steps and after each validation."""

    def __init__(self, progress: StepProgress, every: int) -> None:
        self.progress, self.every = progress, every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, Trainable)
        step = trainer.global_step
        if step != module.step_before and (step % self.every == 0 or step == trainer.max_steps):
            self._call(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._call(trainer)

    def _call(self, trainer: L.Trainer) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.progress(trainer.global_step, trainer.max_steps, metrics)


class ResumeState(Callback):
    """Adds to each checkpoint what Lightning leaves out (generator states, recipe hash, schema) and restores it.

    same_draws: whether all processes draw the same dropout, which what each of them computes for all has to have.
    """

    def __init__(self, loader: TrainingLoader, recipe_hash: str, same_draws: bool = False) -> None:
        self.loader, self.recipe_hash, self.same_draws = loader, recipe_hash, same_draws

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, content: dict[str, Any]) -> None:
        # each process may hold other weights, and all of them have to stop
        for name in (name for names in distributed.gather(_nonfinite_weights(module)) for name in names):
            raise UserError(
                f"non-finite weights in {name} after step {trainer.global_step}: lower optim.lr or raise optim.warmup; "
                "the last good checkpoint is kept"
            )
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        content["lra"] = {
            "schema": SCHEMA, "recipe": self.recipe_hash, "random": distributed.gather(random),
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, content: dict[str, Any]) -> None:
        own = content["lra"]
        if len(own["random"]) != trainer.world_size:
            raise UserError(
                f"the checkpoint was written by {len(own['random'])} processes; resume with --devices and --nodes "
                f"that give as many, not {trainer.world_size}"
            )
        folder = next(str(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
        for state in content["callbacks"].values():
            if "best_k_models" in state:
                _relocate(state, folder)
        self.random = own["random"][trainer.global_rank]
        self.loader.first = content["global_step"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if hasattr(self, "random"):
            torch.set_rng_state(self.random["cpu"])
            if torch.cuda.is_available() and "cuda" in self.random:
                torch.cuda.set_rng_state(self.random["cuda"])
        elif trainer.global_rank and not self.same_draws:
            # all processes draw the same weights, and each its own dropout
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)


def _relocate(state: dict[str, Any], folder: str) -> None:
    """Point the state of a ModelCheckpoint to `folder`: Lightning drops the best score of a folder that was moved."""

    def moved(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    state["dirpath"] = folder
    state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = moved(state[key])


def check_checkpoint(path: Path, recipe_hash: str) -> int:
    """The step of a checkpoint. Raises UserError unless a run of this recipe can be resumed from it."""
    content = checkpoint.read(path)
    own = content.get("lra", {})
    if own.get("schema") != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {own.get('schema')!r}; this version reads {SCHEMA}")
    if own["recipe"] != recipe_hash:
        raise UserError(
            f"{path} was written by another recipe; resume with the recipe and settings it was started with"
        )
    return int(content["global_step"])


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar, counting steps instead of epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    @property
    def validation_description(self) -> str:
        return "validation"

    @property
    def predict_description(self) -> str:
        return "scoring"

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, module).items() if k != "v_num"}


class ProgressLines(Callback):
    """A line after each validation, where there is no terminal that could show a bar."""

    def __init__(self, console: Console) -> None:
        self.console, self.first, self.start = console, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.first, self.start = trainer.global_step, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step, steps, metrics = trainer.global_step, trainer.max_steps, trainer.callback_metrics
        if not trainer.is_global_zero or step == self.first:
            return
        parts = [f"step {step:,} of {steps:,}"]
        if "validation_accuracy" in metrics:
            parts.append(f"validation accuracy {100 * float(metrics['validation_accuracy']):.1f} %")
        if "validation_loss" in metrics:
            parts.append(f"validation loss {float(metrics['validation_loss']):.4g}")
        left = (time.monotonic() - self.start) / (step - self.first) * (steps - step)
        parts += [f"{timedelta(seconds=round(left))} left"] if left else []
        self.console.print(", ".join(parts), soft_wrap=True, highlight=False)


class ExpectationCheck(Callback):
    """Warns once, early, when a run is below the accuracy that the source of its recipe had reached by then."""

    def __init__(self, expected: Expected, steps_per_epoch: int, console: Console) -> None:
        self.expected, self.steps, self.console = expected, expected.epoch * steps_per_epoch, console
        self.best, self.warning = 0.0, ""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.best = max(self.best, float(trainer.callback_metrics.get("validation_accuracy", 0.0)))
        if not self.steps or self.warning or trainer.global_step < self.steps or self.best >= self.expected.by:
            return
        self.warning = (
            f"after {self.expected.epoch} epochs the best validation accuracy is {100 * self.best:.1f} %, below the "
            f"{100 * self.expected.by:.0f} % that the source of this recipe had reached"
        )
        self.console.print(f"[yellow]{self.warning}[/]", soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "warning": self.warning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.warning = state["best"], state["warning"]


def resumable(trainer: L.Trainer, module: L.LightningModule, validate_every: int) -> bool:
    """Whether a checkpoint written now can be resumed from exactly: not between the accumulated parts of a step, and
    not where a validation is due, which a resumed run would skip."""
    assert isinstance(module, Trainable)
    validation_due = validate_every > 0 and trainer.global_step % validate_every == 0
    return trainer.global_step != module.step_before and not validation_due


class TimedCheckpoint(ModelCheckpoint):
    """Saves after a time interval, at the next step that can be resumed from."""

    def __init__(self, *arguments: Any, validate_every: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.validate_every = validate_every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        if resumable(trainer, module, self.validate_every):
            super().on_train_batch_end(trainer, module, *rest)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights with the highest validation accuracy or the lowest validation loss (`Target.selects`). Ties in
    accuracy go to the lower loss: with some hundred validation examples they are common."""

    def __init__(self, folder: Path, selects: str) -> None:
        super().__init__(
            folder, filename="best", monitor=f"validation_{selects}", mode="max" if selects == "accuracy" else "min",
            save_top_k=1, enable_version_counter=False,
        )  # fmt: skip
        self.best_loss = math.inf

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        if current is None:
            return False
        loss = float(trainer.callback_metrics["validation_loss"])
        best = self.best_model_score
        ahead = best is not None and bool(current < best if self.mode == "min" else current > best)
        better = best is None or ahead or (bool(current == best) and loss < self.best_loss)
        better = trainer.strategy.reduce_boolean_decision(better)
        if better:
            self.best_loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_loss": self.best_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.best_loss = state["best_loss"]


def checkpoints(folder: Path, validate_every: int, selects: str) -> list[Callback]:
    """The best checkpoint on validation, where there is one (validate_every > 0), and the last one for resuming.
    selects: as of a Target."""
    last: dict[str, Any] = {"filename": "last", "save_top_k": 1, "enable_version_counter": False}
    timed = TimedCheckpoint(folder, train_time_interval=CHECKPOINT_EVERY, validate_every=validate_every, **last)
    return [BestCheckpoint(folder, selects), ModelCheckpoint(folder, **last), timed] if validate_every else [timed]


class Stop(Callback):
    """Stops between two steps, with a checkpoint, on Ctrl-C, SIGTERM, SIGHUP or a deadline; a second Ctrl-C stops at
    once.

    Signals are handled in the main thread only, and their handlers are restored afterwards.
    deadline: of `time.monotonic`. validate_every: steps between validations (0 = none); one that is due runs first.
    """

    def __init__(self, checkpoint: Path, deadline: float | None, validate_every: int = 0) -> None:
        self.checkpoint, self.deadline, self.reason, self.validate_every = checkpoint, deadline, "", validate_every
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in interruption.heeded():
                self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        now = time.monotonic()
        # `timeout` and a shell's Ctrl-C deliver the same signal twice; only a later one means to stop at once
        if self.reason and number == signal.SIGINT and now - self._first > 1:
            self._restore()
            raise interruption.Stopped(self.reason)
        if not self.reason:
            self.reason, self._first = signal.Signals(number).name, now

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._check_deadline()
        if resumable(trainer, module, self.validate_every) and trainer.global_step < trainer.max_steps:
            self._stop(trainer, save=True)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_deadline()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # the checkpoints of the validation before this step are written by now
        if self.validate_every and trainer.global_step and trainer.global_step % self.validate_every == 0:
            self._stop(trainer, save=False)

    def _check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"

    def _stop(self, trainer: L.Trainer, save: bool) -> None:
        # saving needs all processes, so they stop at the same step
        reasons = [r for r in distributed.gather(self.reason) if r] if trainer.world_size > 1 else [self.reason]
        if not reasons or not reasons[0]:
            return
        if save:
            trainer.save_checkpoint(self.checkpoint)
        raise Interrupted(f"stopped at step {trainer.global_step} of {trainer.max_steps} by {reasons[0]}")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()
        # a signal after the last step: scoring may take long
        if self.reason and self._first:
            raise Interrupted(f"stopped after the last of {trainer.max_steps} steps by {self.reason}")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
