"""Training as a LightningModule around the classifier, and the ways it ends early."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lra.config.recipe import Recipe
from lra.config.sections import Optim
from lra.model import Batch, Classifier
from lra.training import distributed, optimisers

# of SophiaG: steps between two estimates of the curvature, as its authors use it
CURVATURE_EVERY = 10


class Interrupted(Exception):
    """Training stopped before its last step, by Ctrl-C, SIGTERM or a deadline; a checkpoint was written."""


class Trainable(L.LightningModule):
    """A module with the recipe's optimiser and schedule. `latest`: loss and batch of the last forward in training;
    labels: of one forward on all devices together."""

    def __init__(self, model: Classifier, recipe: Optim, steps: int, labels: int = 1) -> None:
        super().__init__()
        self.model, self.settings, self.steps, self.labels = model, recipe, steps, labels
        self.latest: tuple[Tensor, Batch] | None = None
        self.plateau = optimisers.Plateau(recipe) if recipe.schedule == "plateau" else None

    def setup(self, stage: str) -> None:
        """A sharding strategy flattens what it shards, so which parameters are matrices is noted before."""
        self.dimensions = {name: p.ndim for name, p in self.named_parameters()}

    def configure_optimizers(self) -> Any:
        optimizer = optimisers.build(self, self.model.encoder, self.settings, self.labels, self.dimensions)
        factor = optimisers.factor(self.settings, self.steps, self.plateau)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> Any:
        return self.trainer.optimizers[0]

    def on_train_start(self) -> None:
        if hasattr(self._optimizer(), "train"):
            self._optimizer().train()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        whole: Any = self.trainer.strategy.model
        if gradient_clip_val and hasattr(whole, "clip_grad_norm_"):
            # the norm of a sharded gradient is the work of all processes
            whole.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_end(self) -> None:
        # of a stage without validation, too, the average is what is kept
        if hasattr(self._optimizer(), "eval"):
            self._optimizer().eval()

    def on_validation_epoch_start(self) -> None:
        # schedule-free keeps the point of the gradients in training and its average in evaluation
        if self.trainer.optimizers and hasattr(self._optimizer(), "eval"):
            self._optimizer().eval()

    def on_validation_end(self) -> None:
        # after the callbacks, so that checkpoints hold the average
        if self.trainer.optimizers and hasattr(self._optimizer(), "train"):
            self._optimizer().train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plateau is not None:
            checkpoint["plateau"] = self.plateau.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plateau is not None:
            self.plateau.restore(checkpoint["plateau"])


class Training(Trainable):
    """Cross-entropy plus what the encoder adds; accuracy on the selection split chooses the checkpoint."""

    def __init__(self, model: Classifier, recipe: Recipe, classes: int) -> None:
        super().__init__(model, recipe.optim, recipe.train.steps, recipe.data.batch_size // recipe.train.accumulate)
        self._estimated = -1
        # micro: the share of right answers, not the mean over classes
        self.train_accuracy = MulticlassAccuracy(classes, average="micro", sync_on_compute=False)
        self.validation_accuracy = MulticlassAccuracy(classes, average="micro")
        # a logged number would be weighted by whole examples per process, which need not divide
        self.validation_loss = MeanMetric()
        self.diagnostics: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        logits = self.model(batch)
        loss = F.cross_entropy(logits.float(), batch.labels)
        extra = self.model.encoder.aux_loss()
        self.train_accuracy.update(logits, batch.labels)
        loss = loss if extra is None else loss + extra
        self.latest = (loss.detach(), batch)
        return loss

    def on_train_batch_start(self, batch: Batch, _: int) -> None:
        # before the step, so that a checkpoint after it finds nothing left to do
        optimizer, step = self._optimizer(), self.trainer.global_step
        if not hasattr(optimizer, "update_hessian") or step % CURVATURE_EVERY or step == self._estimated:
            return
        self._estimated = step
        optimizer.zero_grad(set_to_none=True)
        with self.trainer.precision_plugin.train_step_context():
            logits = self.model(batch)
        # Gauss-Newton-Bartlett: the squared gradient for labels drawn from the model itself
        drawn = torch.distributions.Categorical(logits=logits.detach().float()).sample()
        F.cross_entropy(logits.float(), drawn).backward()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad = distributed.mean(parameter.grad)
        optimizer.update_hessian()
        optimizer.zero_grad(set_to_none=True)

    def validation_step(self, batch: Batch, _: int) -> None:
        logits = self.model(batch)
        self.validation_accuracy.update(logits, batch.labels)
        loss = F.cross_entropy(logits.float(), batch.labels)
        self.validation_loss.update(loss, weight=len(batch.labels))

    def predict_step(self, batch: Batch, _: int) -> tuple[Tensor, Tensor]:
        return batch.example.cpu(), self.model(batch).argmax(dim=-1).cpu()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        # asking starts anew, so that what is told at the end is of this evaluation alone
        self.model.encoder.diagnostics()

    def on_validation_epoch_end(self) -> None:
        self.log("validation_accuracy", self.validation_accuracy, prog_bar=True)
        self.log("validation_loss", self.validation_loss)
        if self.plateau is not None:
            self.plateau.seen(float(self.validation_accuracy.compute()))
        self.diagnostics = {key: float(value) for key, value in self.model.encoder.diagnostics().items()}
        seen = {"validation_accuracy": self.validation_accuracy, "validation_loss": self.validation_loss}
        self.curve.append({"step": self.trainer.global_step} | {k: float(v.compute()) for k, v in seen.items()})
        self.log_dict({f"diagnostics/{key}": value for key, value in self.diagnostics.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.curve = checkpoint["curve"]
