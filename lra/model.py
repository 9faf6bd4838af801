"""The classifier built around an encoder: embedding, encoder, pooling over real tokens, head; one or two towers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.encoder import Cost, Encoder, fill_padding, lengths_of
from lra.errors import UserError
from lra.task import Protocol
from lra.towers import FUSIONS, Contrast

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Batch(NamedTuple):
    """One batch of examples.

    values: (B, towers, L) integer tokens, or (B, towers, L, channels) bytes or float32 for continuous input; mask:
    (B, towers, L) bool, True = real; labels: (B,) int64 classes, or those of another target (lra.target); example: (B,)
    int64, index of each example in its split.
    """

    values: Tensor
    mask: Tensor
    labels: Tensor
    example: Tensor


@dataclass(frozen=True)
class Head:
    """The map from pooled vectors to logits.

    kind: "linear"; "mlp", a perceptron with hidden layers of the widths `hidden`; "auto", linear for one tower, one
    hidden layer of d_model units for two. activation: of the hidden layers, "gelu" or "relu". pair: the input of the
    head for two towers with pooled outputs u and v: [u, v] ("concat") or [u, v, u * v, u - v] ("products"), or the
    latter after each tower has attended to the other ("cross", "gated": lra.towers.FUSIONS).
    """

    kind: str = "auto"
    hidden: tuple[int, ...] = ()
    activation: str = "gelu"
    pair: str = "products"

    def join(self, u: Tensor, v: Tensor) -> Tensor:
        """Two pooled outputs (B, D) -> (B, 4 D) or (B, 2 D)."""
        return torch.cat([u, v] if self.pair == "concat" else [u, v, u * v, u - v], dim=-1)

    def build(self, d_model: int, classes: int, towers: int) -> nn.Module:
        hidden = self.hidden if self.kind == "mlp" else (d_model,) * (self.kind == "auto" and towers == 2)
        inputs = d_model * (1 if towers == 1 else 2 if self.pair == "concat" else 4)
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), ACTIVATIONS[self.activation]()]
            inputs = width
        last = nn.Linear(inputs, classes)
        return nn.Sequential(*layers, last) if layers else last


class Classifier(nn.Module):
    """Batch -> logits (B, classes); with `per_position` (B, L, classes), the head applied at every position.

    Tokens are embedded by a lookup table, continuous values by a linear map of (byte / 255 - mean) / std, or of
    (value - mean) / std if the protocol has real values. Two towers share all weights; `head` combines them. Padding
    is identified by the mask, never by a token value. A protocol that hides zeros also hides token 0 from the encoder,
    except at the first position. Raises UserError if the encoder does not support masks with gaps, which this needs.

    contrast: the contrastive loss of the towers, for two classes. Raises UserError for other tasks.

    tie: embedding and head share their weights (Press and Wolf 2017), the embedding scaled by sqrt(d_model) (Vaswani et
    al. 2017). Raises UserError unless the head is linear and maps to the vocabulary.
    """

    def __init__(
        self, encoder: Encoder, protocol: Protocol, classes: int, towers: int, pooling: str, head: Head | None = None,
        per_position: bool = False, tie: bool = False, contrast: Contrast | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if contrast is not None and (towers, classes) != (2, 2):
            raise UserError("model.contrastive compares the two sequences of a pair, but this task has no pairs; set 0")
        d = encoder.d_model
        self.encoder, self.pooling, self.towers, self.per_position = encoder, pooling, towers, per_position
        self.hides_zeros = protocol.hides_zeros
        if self.hides_zeros and (encoder.causal or not encoder.gaps):
            raise UserError(
                f"protocol {protocol.name} hides tokens between others, which {type(encoder).__name__} "
                f"{'when causal ' if encoder.gaps else ''}does not support; choose another protocol"
            )
        self.embedding: nn.Module
        if protocol.vocabulary:
            self.embedding = nn.Embedding(protocol.vocabulary, d)
            # with shared weights `embed` scales by sqrt(d); the logits then have unit variance
            nn.init.normal_(self.embedding.weight, std=d**-0.5 if tie else 1.0)
        else:
            self.embedding = nn.Linear(protocol.channels, d)
        self.mean, self.std = protocol.scale
        self.unit = 1.0 if protocol.real else 255.0
        self.cls = nn.Parameter(torch.randn(d) * 0.02) if pooling == "cls" else None
        head = head or Head()
        self.join, self.contrast = head.join, contrast
        self.fusion = FUSIONS[head.pair](d) if towers == 2 and head.pair in FUSIONS else None
        self.head = head.build(d, classes, towers)
        self.tied = tie
        if tie:
            if not (per_position and classes == protocol.vocabulary and isinstance(self.head, nn.Linear)):
                raise UserError(
                    "model.tie shares the weights of embedding and head, which needs a target of the next token and a "
                    "linear head; set model.tie=false, or model.head=linear"
                )
            self.head.weight = self.embedding.weight

    def forward(self, batch: Batch) -> Tensor:
        values, mask = batch.values.flatten(0, 1), batch.mask.flatten(0, 1)
        if self.per_position:
            encoded, _ = self.encode(values, mask)
            # without the position of a CLS token
            return self.head(encoded[:, -mask.shape[1] :])
        if self.towers == 2:
            return self.outputs(batch)[0]
        return self.head(self.pool(*self.encode(values, mask)))

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """For two towers: logits (B, classes), and the pooled output of each tower alone (B, 2, D)."""
        x, mask = self.encode(batch.values.flatten(0, 1), batch.mask.flatten(0, 1))
        alone = met = self.pool(x, mask)
        if self.fusion is not None:
            met = self.fusion(fill_padding(x, mask), mask, self.pool)
        u, v = met.unflatten(0, (-1, 2)).unbind(1)
        return self.head(self.join(u, v)), alone.unflatten(0, (-1, 2))

    def encode(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """values: (B, L) tokens or (B, L, channels) bytes -> encoded (B, L', D) and its mask; L' = L + 1 with CLS."""
        if self.hides_zeros:
            mask = mask & F.pad(values[:, 1:] != 0, (1, 0), value=True)
        return self.encode_embedded(self.embed(values), mask)

    def embed(self, values: Tensor) -> Tensor:
        """values: (B, L) tokens or (B, L, channels) bytes -> (B, L, D)."""
        if isinstance(self.embedding, nn.Embedding):
            embedded = self.embedding(values.int())
            return embedded * self.encoder.d_model**0.5 if self.tied else embedded
        # residual streams keep the precision of what enters them, so that autocast has no say here
        with torch.autocast(values.device.type, enabled=False):
            return self.embedding(self.normalise(values))

    def normalise(self, values: Tensor) -> Tensor:
        """Continuous input as it is embedded: bytes or real values (...) -> float32 (...)."""
        return (values.float() / self.unit - self.mean) / self.std

    def encode_embedded(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, L, D) -> encoded (B, L', D) and its mask."""
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
            mask = F.pad(mask, (1, 0), value=True)
        return self.encoder(x, mask), mask

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool over the real tokens: (B, L, D), (B, L) -> (B, D)."""
        if self.pooling in ("cls", "first"):
            return x[:, 0]
        if self.pooling == "last":
            last = mask.int().cumsum(1).argmax(1) if self.hides_zeros else lengths_of(mask) - 1
            return x[torch.arange(x.shape[0], device=x.device), last]
        if self.pooling == "max":
            return fill_padding(x, mask, float("-inf")).amax(dim=1)
        total = fill_padding(x, mask).sum(dim=1, dtype=torch.float32)
        return (total / lengths_of(mask).unsqueeze(-1)).to(x.dtype)

    def cost(self, length: int) -> Cost:
        """Forward work per example, with `length` tokens in each tower, and per batch. Raises NotImplementedError if
        the encoder declares no cost."""
        total = self.encoder.cost(length + (self.cls is not None))
        if isinstance(self.embedding, nn.Linear):
            total += Cost.linear(length, self.embedding.in_features, self.embedding.out_features)
        total = total.of_sequences(self.towers)
        if self.fusion is not None:
            total += self.fusion.cost(length + (self.cls is not None))
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                total += Cost.linear(length if self.per_position else 1, layer.in_features, layer.out_features)
        return total
