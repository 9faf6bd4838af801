"""Training: a LightningModule around the classifier, and the callbacks a run needs."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lra import optim
from lra.data import Batch, Steps
from lra.errors import UserError
from lra.model import Classifier
from lra.recipe import Recipe

SCHEMA = 1


class Training(L.LightningModule):
    """Cross-entropy plus what the encoder adds; accuracy on the selection split chooses the checkpoint."""

    def __init__(self, model: Classifier, recipe: Recipe, classes: int) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        # micro: the share of right answers, not the mean over classes
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.validation_accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch: Batch, _: int) -> Tensor:
        logits = self.model(batch)
        loss = F.cross_entropy(logits.float(), batch.labels)
        extra = self.model.encoder.aux_loss()
        self.train_accuracy.update(logits, batch.labels)
        return loss if extra is None else loss + extra

    def validation_step(self, batch: Batch, _: int) -> None:
        logits = self.model(batch)
        self.validation_accuracy.update(logits, batch.labels)
        loss = F.cross_entropy(logits.float(), batch.labels)
        self.log("validation_loss", loss, batch_size=len(batch.labels))

    def predict_step(self, batch: Batch, _: int) -> tuple[Tensor, Tensor]:
        return batch.example.cpu(), self.model(batch).argmax(dim=-1).cpu()

    def on_validation_epoch_end(self) -> None:
        self.log("validation_accuracy", self.validation_accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = optim.build(self, self.model.encoder, self.recipe.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, optim.factor(self.recipe.optim, self.recipe.train.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Meter(Callback):
    """Logs loss, accuracy and examples/s every `every` steps, without waiting for the device in between, and stops a
    run whose loss is no longer a number. Time spent in validation and checkpoints is not training time."""

    def __init__(self, every: int) -> None:
        self.every, self.seconds, self.examples, self.tokens, self.steps = every, 0.0, 0, 0, 0
        self._since = (0.0, 0)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        last = trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps
        loss = float(outputs["loss"]) if last else 0.0
        self.seconds += time.perf_counter() - self._begin
        self.examples += len(batch.labels)
        self.tokens += batch.mask.numel()
        self.steps += 1
        if not last:
            return
        if not loss - loss == 0:
            raise UserError(
                f"the loss is {loss} at step {trainer.global_step}: lower optim.lr or raise optim.warmup; "
                f"the checkpoint before it is kept in {trainer.default_root_dir}"
            )
        seconds, examples = self._since
        assert isinstance(module, Training)
        module.log("loss", loss, prog_bar=True)
        module.log("accuracy", module.train_accuracy.compute(), prog_bar=True)
        module.log("examples/s", (self.examples - examples) / (self.seconds - seconds), prog_bar=True)
        module.train_accuracy.reset()
        self._since = (self.seconds, self.examples)

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
        return {"seconds": self.seconds, "examples": self.examples, "tokens": self.tokens, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        self._since = (self.seconds, self.examples)


class Resume(Callback):
    """Puts into each checkpoint what Lightning leaves out (generator states, recipe, schema) and reads it back."""

    def __init__(self, steps: Steps, recipe_hash: str) -> None:
        self.steps, self.recipe_hash = steps, recipe_hash

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        checkpoint["lra"] = {"schema": SCHEMA, "recipe": self.recipe_hash, "random": random}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("lra", {})
        if own.get("schema") != SCHEMA:
            raise UserError(f"the checkpoint has schema {own.get('schema')!r}; this version reads {SCHEMA}")
        if own["recipe"] != self.recipe_hash:
            raise UserError("the checkpoint was written by another recipe; resume with the recipe it was started with")
        self.random = own["random"]
        self.steps.first = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if hasattr(self, "random"):
            torch.set_rng_state(self.random["cpu"])
            if torch.cuda.is_available() and "cuda" in self.random:
                torch.cuda.set_rng_state(self.random["cuda"])


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


def checkpoints(folder: Path) -> list[Callback]:
    """The best on validation, and the last for resuming."""
    best = ModelCheckpoint(
        folder, filename="best", monitor="validation_accuracy", mode="max", save_top_k=1, enable_version_counter=False
    )
    last = ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)
    return [best, last]


class Interrupted(Exception):
    """Training stopped before its last step, by Ctrl-C, SIGTERM or a deadline; a checkpoint was written."""


class Stop(Callback):
    """Stops between two steps, with a checkpoint, on Ctrl-C, SIGTERM or a deadline; a second Ctrl-C stops at once."""

    def __init__(self, checkpoint: Path, deadline: float | None) -> None:
        self.checkpoint, self.deadline, self.reason = checkpoint, deadline, ""
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
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        if self.reason and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self.checkpoint)
            raise Interrupted(f"stopped at step {trainer.global_step} of {trainer.max_steps} by {self.reason}")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
