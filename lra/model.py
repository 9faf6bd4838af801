"""The classifier built around an encoder: embedding, encoder, pooling over real tokens, head; one or two towers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.encoder import Cost, Encoder, fill_padding, lengths_of
from lra.task import Protocol


class Batch(NamedTuple):
    """One batch of examples.

    values: (B, towers, L) integer tokens, or (B, towers, L, channels) bytes for continuous input; mask: (B, towers, L)
    bool, True = real; labels: (B,) int64; example: (B,) int64, index of each example in its split.
    """

    values: Tensor
    mask: Tensor
    labels: Tensor
    example: Tensor


class Classifier(nn.Module):
    """Batch -> logits (B, classes).

    Tokens are embedded by a lookup table, continuous values by a linear map of (byte / 255 - mean) / std. Two towers
    share all weights; the head reads their pooled outputs u and v as [u, v, u * v, u - v]. Padding is identified by the
    mask, never by a token value.
    """

    def __init__(self, encoder: Encoder, protocol: Protocol, classes: int, towers: int, pooling: str) -> None:
        super().__init__()
        d = encoder.d_model
        self.encoder, self.pooling, self.towers = encoder, pooling, towers
        self.embedding: nn.Module
        if protocol.vocabulary:
            self.embedding = nn.Embedding(protocol.vocabulary, d)
            nn.init.normal_(self.embedding.weight, std=1.0)
        else:
            self.embedding = nn.Linear(protocol.channels, d)
        self.mean, self.std = protocol.scale
        self.cls = nn.Parameter(torch.randn(d) * 0.02) if pooling == "cls" else None
        self.head: nn.Module = nn.Linear(d, classes)
        if towers == 2:
            self.head = nn.Sequential(nn.Linear(4 * d, d), nn.GELU(), nn.Linear(d, classes))

    def forward(self, batch: Batch) -> Tensor:
        values, mask = batch.values.flatten(0, 1), batch.mask.flatten(0, 1)
        pooled = self.pool(*self.encode(values, mask))
        if self.towers == 2:
            u, v = pooled.unflatten(0, (-1, 2)).unbind(1)
            pooled = torch.cat([u, v, u * v, u - v], dim=-1)
        return self.head(pooled)

    def encode(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """values: (B, L) tokens or (B, L, channels) bytes -> encoded (B, L', D) and its mask; L' = L + 1 with CLS."""
        return self.encode_embedded(self.embed(values), mask)

    def embed(self, values: Tensor) -> Tensor:
        """values: (B, L) tokens or (B, L, channels) bytes -> (B, L, D)."""
        if isinstance(self.embedding, nn.Embedding):
            return self.embedding(values.int())
        # residual streams keep the precision of what enters them, so that autocast has no say here
        with torch.autocast(values.device.type, enabled=False):
            return self.embedding((values.float() / 255 - self.mean) / self.std)

    def encode_embedded(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, L, D) -> encoded (B, L', D) and its mask."""
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
            mask = F.pad(mask, (1, 0), value=True)
        return self.encoder(x, mask), mask

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool over the real tokens: (B, L, D), (B, L) -> (B, D)."""
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "last":
            return x[torch.arange(len(x), device=x.device), lengths_of(mask) - 1]
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
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                total += Cost.linear(1, layer.in_features, layer.out_features)
        return total
