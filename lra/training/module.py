"""Training as a LightningModule around the classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from lra.config.recipe import Recipe
from lra.config.sections import Optim
from lra.model import Batch, Classifier
from lra.target import Target
from lra.training import distributed, optimisers
from lra.training.parallel import sharding
from lra.training.parallel.pipeline import Pipeline
from lra.training.streams import Streams

HESSIAN_EVERY = 10
"""Steps between two Hessian estimates of SophiaG, as its authors use it."""


class Trainable(L.LightningModule):
    """A module with the recipe's optimiser and schedule.

    forward_size: examples of one forward pass, summed over all devices. latest: loss and batch of the last forward
    pass in training. step_before: optimiser steps done when the current batch began. divide: divides the weights of the
    model over a mesh of processes, once there is one. zero: stage of ZeRO, 0 without.
    """

    def __init__(self, model: Classifier, recipe: Optim, steps: int, forward_size: int = 1) -> None:
        super().__init__()
        self.model, self.settings, self.steps, self.forward_size = model, recipe, steps, forward_size
        self.latest: tuple[Tensor, Batch] | None = None
        self.step_before, self.zero = 0, 0
        self.divide: Callable[[Classifier, DeviceMesh], None] | None = None
        self.plateau = optimisers.Plateau(recipe) if recipe.schedule == "plateau" else None

    def configure_model(self) -> None:
        if self.divide is not None:
            mesh = self.device_mesh
            assert mesh is not None
            self.divide(self.model, mesh)
            self.divide = None

    def configure_optimizers(self) -> Any:
        optimizer = optimisers.build(self, self.model.encoder, self.settings, self.forward_size)
        factor = optimisers.factor(self.settings, self.steps, self.plateau)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> Any:
        return self.trainer.optimizers[0]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.step_before = self.trainer.global_step
        if self.zero == 1:
            sharding.accumulate(self.model, last=(batch_idx + 1) % self.trainer.accumulate_grad_batches == 0)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.trainer.global_step > self.step_before:
            self.model.encoder.after_step()

    def on_train_start(self) -> None:
        if hasattr(self._optimizer(), "train"):
            self._optimizer().train()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val and any(isinstance(p, DTensor) for p in self.parameters()):
            sharding.clip([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_end(self) -> None:
        # a stage without validation also ends with the averaged weights
        if hasattr(self._optimizer(), "eval"):
            self._optimizer().eval()

    def on_validation_epoch_start(self) -> None:
        # schedule-free optimisers hold other weights in training than in evaluation, where they hold the average
        if self.trainer.optimizers and hasattr(self._optimizer(), "eval"):
            self._optimizer().eval()

    def on_validation_end(self) -> None:
        # after the callbacks, so that checkpoints hold the averaged weights
        if self.trainer.optimizers and hasattr(self._optimizer(), "train"):
            self._optimizer().train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plateau is not None:
            checkpoint["plateau"] = self.plateau.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plateau is not None:
            self.plateau.load_state(checkpoint["plateau"])


class Training(Trainable):
    """The loss of the task's target plus the contrastive and auxiliary losses of the model; accuracy and loss on the
    selection split.

    Accuracy is the share of right answers: of classes, or of scored positions.

    With a teacher the loss of the target counts 1 - alpha, and that of imitating the teacher alpha.

    curve: validation accuracy and loss by step. diagnostics: of the encoder, over the last validation. pipeline:
    computes the loss where processes divide the blocks. streams: carry the state of the encoder from step to step.
    """

    def __init__(self, model: Classifier, recipe: Recipe, target: Target, teacher: Classifier | None = None) -> None:
        super().__init__(model, recipe.optim, recipe.train.steps, recipe.data.batch_size // recipe.train.accumulate)
        self._hessian_step = -1
        self.target = target
        self.alpha, self.temperature = recipe.train.distill_alpha, recipe.train.distill_temperature
        # in a tuple, so that it is no part of the module: neither trained nor stored in a checkpoint
        self.teachers = () if teacher is None else (teacher,)
        # without the search for NaN, which waits for a GPU: these are 0 and 1
        self.train_accuracy = MeanMetric(nan_strategy="disable", sync_on_compute=False)
        self.validation_accuracy = MeanMetric(nan_strategy="disable")
        # weighted by examples, which may differ between processes; Lightning's own mean is not
        self.validation_loss = MeanMetric()
        self.diagnostics: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        self.pipeline: Pipeline | None = None
        self.streams: Streams | None = None

    def training_step(self, batch: Batch, _: int) -> Tensor:
        if self.pipeline is not None:
            loss, output = self.pipeline(batch)
        elif self.model.contrast is None:
            output = self.model(batch)
            loss = self.target.loss(output, batch.labels)
        else:
            output, pooled = self.model.outputs(batch)
            loss = self.target.loss(output, batch.labels) + self.model.contrast(pooled, batch.values, batch.labels)
        for teacher in self.teachers:
            with torch.no_grad():
                taught = teacher(batch)
            imitation = self.target.imitation(output, taught, batch.labels, self.temperature)
            loss = (1 - self.alpha) * loss + self.alpha * imitation
        extra = self.model.encoder.aux_loss()
        self.train_accuracy.update(self.target.right(output, batch.labels).float())
        loss = loss if extra is None else loss + extra
        self.latest = (loss.detach(), batch)
        if self.streams is not None:
            # not at the end of the batch: a checkpoint may be written before
            self.streams.end()
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.streams is not None:
            self.streams.begin(batch.example, batch_idx)
        # the estimate belongs to the coming step: a checkpoint after that step holds it
        optimizer, step = self._optimizer(), self.trainer.global_step
        if not hasattr(optimizer, "update_hessian") or step % HESSIAN_EVERY or step == self._hessian_step:
            return
        self._hessian_step = step
        optimizer.zero_grad(set_to_none=True)
        with self.trainer.precision_plugin.train_step_context():
            output = self.model(batch)
        # Gauss-Newton-Bartlett estimator: the squared gradient for labels sampled from the model
        self.target.loss(output, self.target.sample(output.detach(), batch.labels)).backward()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad = distributed.mean(parameter.grad)
        optimizer.update_hessian()
        optimizer.zero_grad(set_to_none=True)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.streams is not None:
            self.streams.attach()

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.streams is not None:
            self.streams.detach()

    def validation_step(self, batch: Batch, _: int) -> None:
        output = self.model(batch)
        right = self.target.right(output, batch.labels)
        self.validation_accuracy.update(right.float())
        self.validation_loss.update(self.target.loss(output, batch.labels), weight=len(right))

    def predict_step(self, batch: Batch, _: int) -> dict[str, np.ndarray]:
        return answers_to(batch, self.model, self.target)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        # reading resets the diagnostics, so that the next reading covers this validation alone
        self.model.encoder.diagnostics()

    def on_validation_epoch_end(self) -> None:
        self.log("validation_accuracy", self.validation_accuracy, prog_bar=True)
        self.log("validation_loss", self.validation_loss)
        if self.plateau is not None:
            self.plateau.update(float(self.validation_accuracy.compute()))
        self.diagnostics = {key: float(value) for key, value in self.model.encoder.diagnostics().items()}
        metrics = {"validation_accuracy": self.validation_accuracy, "validation_loss": self.validation_loss}
        self.curve.append({"step": self.trainer.global_step} | {k: float(v.compute()) for k, v in metrics.items()})
        self.log_dict({f"diagnostics/{key}": value for key, value in self.diagnostics.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["curve"] = self.curve
        if self.streams is not None:
            checkpoint["streams"] = distributed.gather(self.streams.states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.curve = checkpoint["curve"]
        if self.streams is not None:
            self.streams.states = checkpoint["streams"][distributed.rank()]


def answers_to(batch: Batch, model: Classifier, target: Target) -> dict[str, np.ndarray]:
    """The answers of a model to a batch, as `Target.answers` gives them."""
    columns = target.answers(model(batch), batch.example, batch.labels)
    return {name: (c.float() if c.is_floating_point() else c).cpu().numpy() for name, c in columns.items()}
