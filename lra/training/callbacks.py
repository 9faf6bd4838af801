"""What happens around the steps of training: measuring, stopping, saving, resuming, warning."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from torch import Tensor, nn

from lra.config.sections import Expected
from lra.data.batches import Steps
from lra.errors import UserError
from lra.model import Batch
from lra.training import checkpoint, distributed
from lra.training.module import Interrupted, Trainable, Training

SCHEMA = 3
# between two checkpoints for resuming when validations are further apart
CHECKPOINT_EVERY = timedelta(minutes=10)


class Meter(Callback):
    """Logs loss, accuracy and examples/s every `every` steps, without waiting for the device in between, and stops a
    run whose loss is no longer a number. Time spent in validation and checkpoints is not training time.

    validate_every: steps between validations, before each of which the loss is looked at too (0 = none).
    earlier: wall seconds, all included, that a resumed run had spent before, up to its last checkpoint.
    """

    def __init__(self, every: int, validate_every: int = 0) -> None:
        self.every, self.validate_every = every, validate_every
        self.seconds, self.examples, self.tokens, self.steps = 0.0, 0, 0, 0
        self.earlier, self._begun = 0.0, time.perf_counter()
        self._since = (0.0, 0)
        self._losses: list[Tensor] = []
        self._checked = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._checked = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._begin, self._before = time.perf_counter(), trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        # on a CPU looking costs nothing, and the weights still are those that gave the loss
        assert isinstance(module, Trainable)
        if module.latest is not None and module.device.type == "cpu" and not torch.isfinite(module.latest[0]):
            raise _lost(float(module.latest[0]), trainer.global_step + 1, culprit(module, module.latest[1]))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        step = trainer.global_step
        stepped = step != self._before
        last = stepped and (step % self.every == 0 or step == trainer.max_steps)
        look = last or (stepped and self.validate_every > 0 and step % self.validate_every == 0)
        self._losses.append(outputs["loss"].detach())
        if look:
            losses = torch.stack(self._losses)
            self._losses = []
            per_step = losses.unflatten(0, (step - self._checked, -1)).float().mean(dim=1)
            per_step = distributed.mean(per_step)
            loss = per_step[-1].item()
        self.seconds += time.perf_counter() - self._begin
        self.examples += len(batch.labels) * distributed.world()
        self.tokens += batch.mask.numel() * distributed.world()
        self.steps += stepped
        if not look:
            return
        wrong = (~torch.isfinite(per_step)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise _lost(per_step[first].item(), self._checked + first + 1, culprit(module, batch))
        self._checked = step
        if last and isinstance(module, Trainable):
            self._log(module, loss)

    def _log(self, module: Trainable, loss: float) -> None:
        seconds, examples = self._since
        module.log("loss", loss, prog_bar=True)
        if isinstance(module, Training):
            module.log("accuracy", distributed.mean(module.train_accuracy.compute()), prog_bar=True)
            module.train_accuracy.reset()
        module.log("examples/s", (self.examples - examples) / (self.seconds - seconds), prog_bar=True)
        self._since = (self.seconds, self.examples)

    @property
    def elapsed(self) -> float:
        """Wall seconds since the run began, validation and earlier parts of a resumed run included."""
        return self.earlier + time.perf_counter() - self._begun

    def speed(self) -> dict[str, float | int]:
        """Training throughput of the whole run, first steps included; tokens count padding, which is worked on too."""
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
        self._since = (self.seconds, self.examples)


def culprit(module: nn.Module, batch: Batch) -> str:
    """Where numbers stop being finite: in weights, else in the first module of a forward pass that makes such ones."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights {name.removeprefix('model.')} are not finite"
    found: list[str] = []

    def looking(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(p, Tensor) and not torch.isfinite(p).all() for p in parts):
                found.append(name)

        return hook

    model = getattr(module, "model", module)
    hooks = [m.register_forward_hook(looking(name or "the model")) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return f"{found[0]} is the first module to put out such values" if found else "no module puts out such values"


def _lost(loss: float, step: int, where: str) -> UserError:
    return UserError(
        f"the loss is {loss} at step {step}: {where}; lower optim.lr or raise optim.warmup; "
        "the last good checkpoint is kept"
    )


class Resume(Callback):
    """Puts into each checkpoint what Lightning leaves out (generator states, recipe, schema) and reads it back."""

    def __init__(self, steps: Steps, recipe_hash: str) -> None:
        self.steps, self.recipe_hash = steps, recipe_hash

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, content: dict[str, Any]) -> None:
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise UserError(
                    f"the weights {name.removeprefix('model.')} are not finite after step {trainer.global_step}: "
                    "lower optim.lr or raise optim.warmup; the last good checkpoint is kept"
                )
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        content["lra"] = {
            "schema": SCHEMA, "recipe": self.recipe_hash, "random": distributed.gathered(random),
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
                _follow(state, folder)
        self.random = own["random"][trainer.global_rank]
        self.steps.first = content["global_step"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if hasattr(self, "random"):
            torch.set_rng_state(self.random["cpu"])
            if torch.cuda.is_available() and "cuda" in self.random:
                torch.cuda.set_rng_state(self.random["cuda"])
        elif trainer.global_rank:
            # weights are drawn alike everywhere, dropout is not
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)


def _follow(state: dict[str, Any], folder: str) -> None:
    """Lightning forgets its best score where the checkpoints have another path than when they were written."""

    def here(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    state["dirpath"] = folder
    state["best_k_models"] = {here(path): score for path, score in state["best_k_models"].items()}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = here(state[key])


def check_checkpoint(path: Path, recipe_hash: str) -> None:
    """Raise UserError unless a run of this recipe can go on from this file."""
    content = checkpoint.read(path)
    own = content.get("lra", {})
    if own.get("schema") != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {own.get('schema')!r}; this version reads {SCHEMA}")
    if own["recipe"] != recipe_hash:
        raise UserError(
            f"{path} was written by another recipe; resume with the recipe and settings it was started with"
        )


class Bar(RichProgressBar):
    """Lightning's rich bar in this suite's words, which counts steps and not epochs."""

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


class Band(Callback):
    """Says once, early, when a run is below what its source had reached by then."""

    def __init__(self, expected: Expected, steps_per_epoch: int, console: Console) -> None:
        self.expected, self.steps, self.console = expected, expected.epoch * steps_per_epoch, console
        self.best, self.below = 0.0, ""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.best = max(self.best, float(trainer.callback_metrics.get("validation_accuracy", 0.0)))
        if not self.steps or self.below or trainer.global_step < self.steps or self.best >= self.expected.by:
            return
        self.below = (
            f"after {self.expected.epoch} epochs the best validation accuracy is {100 * self.best:.1f} %, where the "
            f"source of this recipe had reached {100 * self.expected.by:.0f} %: this run is off"
        )
        self.console.print(f"[yellow]{self.below}[/]", soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "below": self.below}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.below = state["best"], state["below"]


def between_steps(trainer: L.Trainer, validate_every: int) -> bool:
    """Whether a run could go on from here: not amid the accumulated parts of one step, nor with a validation due, which
    a resumed run would leave out."""
    due = validate_every > 0 and trainer.global_step % validate_every == 0
    return not trainer.fit_loop._should_accumulate() and not due


class BetweenSteps(ModelCheckpoint):
    """Saves where a run can go on; after a validation the other checkpoints are written."""

    def __init__(self, *arguments: Any, validate_every: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.validate_every = validate_every

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if between_steps(trainer, self.validate_every):
            super().on_train_batch_end(trainer, *rest)


def checkpoints(folder: Path, validate_every: int) -> list[Callback]:
    """The best on validation, where there is one (validate_every > 0), and the last for resuming."""
    common: dict[str, Any] = {"save_top_k": 1, "enable_version_counter": False}
    best = ModelCheckpoint(folder, filename="best", monitor="validation_accuracy", mode="max", **common)
    last = ModelCheckpoint(folder, filename="last", **common)
    timed = BetweenSteps(
        folder, filename="last", train_time_interval=CHECKPOINT_EVERY, validate_every=validate_every, **common
    )
    return [best, last, timed] if validate_every else [timed]


class Stop(Callback):
    """Stops between two steps, with a checkpoint, on Ctrl-C, SIGTERM or a deadline; a second Ctrl-C stops at once.

    validate_every: steps between validations (0 = none); where one is due it is done first.
    """

    def __init__(self, checkpoint: Path, deadline: float | None, validate_every: int = 0) -> None:
        self.checkpoint, self.deadline, self.reason, self.validate_every = checkpoint, deadline, "", validate_every
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)

    def _heard(self, number: int, _: Any) -> None:
        now = time.monotonic()
        # `timeout` and a shell's Ctrl-C each deliver the same signal twice; only a later one means impatience
        if self.reason and number == signal.SIGINT and now - self._first > 1:
            self._restore()
            raise KeyboardInterrupt
        if not self.reason:
            self.reason, self._first = signal.Signals(number).name, now

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look_at_the_clock()
        if between_steps(trainer, self.validate_every) and trainer.global_step < trainer.max_steps:
            self._stop(trainer, save=True)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look_at_the_clock()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # by now the checkpoints of the validation before this step are written
        if self.validate_every and trainer.global_step and trainer.global_step % self.validate_every == 0:
            self._stop(trainer, save=False)

    def _look_at_the_clock(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"

    def _stop(self, trainer: L.Trainer, save: bool) -> None:
        # saving is the work of all processes, so they stop at the same step
        reasons = [r for r in distributed.gathered(self.reason) if r] if trainer.world_size > 1 else [self.reason]
        if not reasons or not reasons[0]:
            return
        if save:
            trainer.save_checkpoint(self.checkpoint)
        raise Interrupted(f"stopped at step {trainer.global_step} of {trainer.max_steps} by {reasons[0]}")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
