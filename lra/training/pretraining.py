"""Self-pretraining: the encoder first learns to predict the task's own training inputs, without labels.

Amos et al. 2023, arXiv:2310.02980. "mlm" replaces a fraction of the real positions by one learned vector and predicts
them from the rest. "causal" predicts the next position from the earlier ones and needs a causal encoder. The loss is
cross-entropy over tokens or byte values, or the absolute error of (byte / 255 - mean) / std.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.config.recipe import Recipe
from lra.config.sections import Optim
from lra.errors import UserError
from lra.model import Batch, Classifier
from lra.task import Protocol
from lra.training.module import Trainable

BYTES = 256


class Predictor(nn.Module):
    """A classifier's embedding and encoder with a head that predicts inputs: Batch -> mean loss over the targets."""

    def __init__(self, model: Classifier, protocol: Protocol, objective: str, mask: float, loss: str) -> None:
        super().__init__()
        if objective == "causal" and not model.encoder.causal:
            raise UserError(
                f"pretrain.objective=causal needs a causal encoder, and this one is {model.encoder.direction}: it sees "
                "the position it predicts; set model.direction=causal"
            )
        if loss == "l1" and protocol.vocabulary:
            raise UserError("pretrain.loss=l1 is for continuous values; this protocol has tokens")
        if loss == "cross_entropy" and protocol.real:
            raise UserError("pretrain.loss=cross_entropy is for tokens and bytes; this protocol has real values")
        self.encoder, self.classifier = model.encoder, model
        self.objective, self.mask = objective, mask
        self.l1 = not protocol.vocabulary and loss in ("auto", "l1")
        width, channels = model.encoder.d_model, max(protocol.channels, 1)
        self.classes = protocol.vocabulary or BYTES
        self.head = nn.Linear(width, channels if self.l1 else channels * self.classes)
        self.mask_vector = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, batch: Batch) -> Tensor:
        values, mask = batch.values.flatten(0, 1), batch.mask.flatten(0, 1)
        x = self.classifier.embed(values)
        if self.objective == "causal":
            x, _ = self.classifier.encode_embedded(x, mask)
            return self._loss(x[:, -mask.shape[1] :][:, :-1], values[:, 1:], mask[:, 1:])
        masked = self._masked_positions(mask)
        x = torch.where(masked.unsqueeze(-1), self.mask_vector.to(x.dtype), x)
        x, _ = self.classifier.encode_embedded(x, mask)
        return self._loss(x[:, -mask.shape[1] :], values, masked)

    def _masked_positions(self, mask: Tensor) -> Tensor:
        """(B, L) bool: each real position with probability `self.mask`, at least one in each row."""
        draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2)
        return (draw < self.mask) | (draw == draw.amin(dim=1, keepdim=True))

    def _loss(self, x: Tensor, values: Tensor, targets: Tensor) -> Tensor:
        """x: (B, L, D); values: (B, L[, channels]); targets: (B, L) bool, the positions to predict."""
        predicted, true = self.head(x[targets]).float(), values[targets]
        if self.l1:
            return F.l1_loss(predicted, self.classifier.normalise(true))
        return F.cross_entropy(predicted.view(-1, self.classes), true.reshape(-1).long())


class Pretraining(Trainable):
    """The stage before training: the recipe's optimiser at the rate of its pretrain section, constant after warm-up."""

    model: Classifier

    def __init__(self, model: Classifier, recipe: Recipe, protocol: Protocol) -> None:
        own = recipe.pretrain
        settings: Optim = replace(recipe.optim, lr=own.lr, warmup=own.warmup, schedule="constant", ema=0.0)
        super().__init__(model, settings, own.steps)
        if settings.name == "sophia":
            raise UserError("optim.name 'sophia' estimates its Hessian from classes, and pretraining predicts none")
        self.batch_size = own.batch_size or recipe.data.batch_size
        self.predictor = Predictor(model, protocol, own.objective, own.mask, own.loss)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.predictor(batch)
        extra = self.model.encoder.aux_loss()
        loss = loss if extra is None else loss + extra
        self.latest = (loss.detach(), batch)
        return loss
