"""Self-pretraining: the encoder first learns to predict the task's own training inputs, no label in sight.

Amos et al. 2023, arXiv:2310.02980. "mlm": a share of the real positions is replaced by one learned vector and predicted
from the rest; "causal": each position predicts the next, which needs a causal encoder. Tokens are predicted by
cross-entropy, continuous values by the absolute error of (byte / 255 - mean) / std or as one of 256 byte values.
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
    """A classifier's embedding and encoder under a head that predicts inputs: Batch -> loss, a mean over targets."""

    def __init__(self, model: Classifier, protocol: Protocol, objective: str, mask: float, loss: str) -> None:
        super().__init__()
        if objective == "causal" and not model.encoder.causal:
            raise UserError(
                f"pretrain.objective=causal predicts the next position, which a {model.encoder.direction} encoder "
                "sees; set model.direction=causal"
            )
        if loss == "l1" and protocol.vocabulary:
            raise UserError("pretrain.loss=l1 is for continuous values; this protocol has tokens")
        self.encoder, self.classifier = model.encoder, model
        self.objective, self.mask, self.scale = objective, mask, protocol.scale
        self.l1 = not protocol.vocabulary and loss in ("auto", "l1")
        width, channels = model.encoder.d_model, max(protocol.channels, 1)
        self.classes = protocol.vocabulary or BYTES
        self.head = nn.Linear(width, channels if self.l1 else channels * self.classes)
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, batch: Batch) -> Tensor:
        values, mask = batch.values.flatten(0, 1), batch.mask.flatten(0, 1)
        x = self.classifier.embed(values)
        if self.objective == "causal":
            x, _ = self.classifier.encode_embedded(x, mask)
            return self._loss(x[:, -mask.shape[1] :][:, :-1], values[:, 1:], mask[:, 1:])
        chosen = self._chosen(mask)
        x, _ = self.classifier.encode_embedded(torch.where(chosen.unsqueeze(-1), self.hidden.to(x.dtype), x), mask)
        return self._loss(x[:, -mask.shape[1] :], values, chosen)

    def _chosen(self, mask: Tensor) -> Tensor:
        """Hidden positions: each real one with probability `mask`, at least one of each row."""
        draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2)
        return (draw < self.mask) | (draw == draw.amin(dim=1, keepdim=True))

    def _loss(self, x: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
        """x: (B, L, D); values: (B, L[, channels]); wanted: (B, L) bool, the positions that count."""
        said, true = self.head(x[wanted]).float(), values[wanted]
        if self.l1:
            mean, std = self.scale
            return F.l1_loss(said, (true.float() / 255 - mean) / std)
        return F.cross_entropy(said.view(-1, self.classes), true.reshape(-1).long())


class Pretraining(Trainable):
    """The stage before fine-tuning, with the recipe's optimiser at the rate of its pretrain section, then constant."""

    model: Classifier

    def __init__(self, model: Classifier, recipe: Recipe, protocol: Protocol) -> None:
        own = recipe.pretrain
        settings: Optim = replace(recipe.optim, lr=own.lr, warmup=own.warmup, schedule="constant", ema=0.0)
        super().__init__(model, settings, own.steps)
        if settings.name == "sophia":
            raise UserError("optim.name 'sophia' estimates its curvature from classes, and pretraining predicts none")
        self.batch_size = own.batch_size or recipe.data.batch_size
        self.predictor = Predictor(model, protocol, own.objective, own.mask, own.loss)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.predictor(batch)
        extra = self.model.encoder.aux_loss()
        loss = loss if extra is None else loss + extra
        self.latest = (loss.detach(), batch)
        return loss
