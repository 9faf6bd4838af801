"""Two towers: how one reads the other before both meet in the head, and the contrastive loss that brings the vectors of
a pair together.

The rows 2 i and 2 i + 1 of a batch (2 B, L, D) are the two sequences of example i. Both towers share all weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.attention import CrossAttention
from lra.encoder import Cost

LATENTS, DEPTH = 32, 2
"""Latents and layers of the resampler of `gated`."""
LARGEST_SCALE = 100.0
"""Largest factor of the cosines in the contrastive loss, as in CLIP."""

Pool = Callable[[Tensor, Tensor], Tensor]


def swap(x: Tensor) -> Tensor:
    """Each tower's rows in the place of the other's: (2 B, ...) -> (2 B, ...)."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _heads(d_model: int) -> int:
    return math.gcd(d_model, 4)


def _cross_cost(attention: CrossAttention, queries: int, keys: int) -> Cost:
    width, d_model = attention.q_proj.out_features, attention.out_proj.out_features
    maps = 2 * Cost.linear(queries, d_model, width) + 2 * Cost.linear(keys, d_model, width)
    pairs = float(queries * keys)
    return maps + Cost(4.0 * pairs * width, 5.0 * pairs * attention.n_heads)


class Fusion(nn.Module, ABC):
    """Pooled outputs of both towers, each of which has read the other."""

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor, pool: Pool) -> Tensor:
        """Outputs of the encoder (2 B, L, D), mask (2 B, L) -> (2 B, D). pool: (2 B, L, D), (2 B, L) -> (2 B, D)."""

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Forward work of one example with two sequences of `length` tokens."""


class CrossFusion(Fusion):
    """The pooled vector of a tower attends to the positions of the other: u + attention(norm(u), norm(y_other)).

    One query a tower, as the decoder of Fusion-in-Decoder has for one output token (arXiv:2007.01282), so that the work
    is linear in L. Departure: that decoder reads both sequences, here each tower has pooled its own already.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.q_norm, self.kv_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = CrossAttention(d_model, _heads(d_model))

    def forward(self, x: Tensor, mask: Tensor, pool: Pool) -> Tensor:
        pooled = pool(x, mask)
        read = self.attention(self.q_norm(pooled).unsqueeze(1), self.kv_norm(swap(x)), swap(mask))
        return pooled + read.squeeze(1)

    def cost(self, length: int) -> Cost:
        return 2 * _cross_cost(self.attention, 1, length)


class FeedForward(nn.Sequential):
    """norm, linear, GELU, linear, as in Flamingo: (..., D) -> (..., D)."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__(
            nn.LayerNorm(d_model), nn.Linear(d_model, hidden, bias=False), nn.GELU(),
            nn.Linear(hidden, d_model, bias=False),
        )  # fmt: skip
        self.widths = d_model, hidden

    def cost(self, rows: int) -> Cost:
        return 2 * Cost.linear(rows, *self.widths)


class Resampler(nn.Module):
    """Perceiver resampler: `latents` learned vectors read a sequence (B, L, D) -> (B, latents, D).

    `depth` times z = z + attention(norm(z), [norm(x), norm(z)]), z = z + ffn(z), then a norm (arXiv:2204.14198, section
    3.1.1).
    """

    def __init__(
        self, d_model: int, n_heads: int, *, latents: int, depth: int, head_dim: int | None = None, expand: int = 4
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, d_model))
        self.media_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(depth))
        self.latent_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(depth))
        self.attentions: Any = nn.ModuleList(
            CrossAttention(d_model, n_heads, head_dim=head_dim, bias=False) for _ in range(depth)
        )
        self.ffns: Any = nn.ModuleList(FeedForward(d_model, expand * d_model) for _ in range(depth))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.latents.expand(len(x), -1, -1)
        masks = [mask, mask.new_ones(z.shape[:2])]
        layers = zip(self.media_norms, self.latent_norms, self.attentions, self.ffns, strict=True)
        for media_norm, latent_norm, attention, ffn in layers:
            h = latent_norm(z)
            z = z + attention(h, [media_norm(x), h], masks)
            z = z + ffn(z)
        return self.norm(z)

    def cost(self, length: int) -> Cost:
        number = len(self.latents)
        total = Cost()
        for attention, ffn in zip(self.attentions, self.ffns, strict=True):
            total += _cross_cost(attention, number, length + number) + ffn.cost(number)
        return total


class GatedCrossAttention(nn.Module):
    """x + tanh(a) attention(norm(x), z), then + tanh(b) ffn(x): (B, L, D), z: (B, S, D) -> (B, L, D).

    The gates a and b start at 0, where the block is the identity (arXiv:2204.14198, section 3.1.2).
    """

    def __init__(self, d_model: int, n_heads: int, *, head_dim: int | None = None, expand: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.attention = CrossAttention(d_model, n_heads, head_dim=head_dim, bias=False)
        self.ffn = FeedForward(d_model, expand * d_model)
        self.attention_gate, self.ffn_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = x + self.attention_gate.tanh() * self.attention(self.norm(x), z)
        return x + self.ffn_gate.tanh() * self.ffn(x)

    def cost(self, length: int, sources: int) -> Cost:
        return _cross_cost(self.attention, length, sources) + self.ffn.cost(length)


class GatedFusion(Fusion):
    """The positions of a tower attend to latents resampled from the other, through gates that start closed (Flamingo,
    arXiv:2204.14198). At the start it is pooling alone."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.resampler = Resampler(d_model, _heads(d_model), latents=LATENTS, depth=DEPTH)
        self.block = GatedCrossAttention(d_model, _heads(d_model))

    def forward(self, x: Tensor, mask: Tensor, pool: Pool) -> Tensor:
        return pool(self.block(x, swap(self.resampler(x, mask))), mask)

    def cost(self, length: int) -> Cost:
        return 2 * (self.resampler.cost(length) + self.block.cost(length, LATENTS))


FUSIONS: dict[str, Callable[[int], Fusion]] = {"cross": CrossFusion, "gated": GatedFusion}
"""By the name in `model.pair`."""


class Contrast(nn.Module):
    """Contrastive loss of pooled pairs (CLIP, arXiv:2103.00020; DPR, arXiv:2004.04906).

    Among all second sequences of the batch, that of a pair of class 1 is to have the largest cosine with the first, and
    the other way round: cross-entropy of cosines / temperature, mean of both directions and of the pairs of class 1.
    The other sequences are negatives, those of pairs of class 0 among them, but no copy of a right answer. Negatives
    come from one process and micro-batch.

    temperature: at the start; it is learned, and stays above 1 / 100. weight: of this loss beside that of the classes.
    """

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__()
        self.weight = weight
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, pooled: Tensor, values: Tensor, labels: Tensor) -> Tensor:
        """pooled: (B, 2, D); values: (B, 2, L) or (B, 2, L, channels), which tell copies; labels: (B,) -> ()."""
        with torch.autocast(pooled.device.type, enabled=False):
            u, v = F.normalize(pooled.float(), dim=-1).unbind(1)
            scores = self.log_scale.exp().clamp(max=LARGEST_SCALE) * (u @ v.T)
        ids = torch.unique(values.flatten(2).flatten(0, 1), dim=0, return_inverse=True)[1]
        same_one, same_two = (part[:, None] == part for part in ids.view(-1, 2).unbind(1))
        right, answer = labels == 1, torch.arange(len(labels), device=labels.device)
        total = scores.new_zeros(())
        for rows, same_query, same_answer in ((scores, same_one, same_two), (scores.T, same_two, same_one)):
            # right answers of a query in any pair of the batch are not negatives
            known = (same_query & right).float() @ same_answer.float() > 0
            losses = F.cross_entropy(
                rows.masked_fill(known.fill_diagonal_(False), -torch.inf), answer, reduction="none"
            )
            total = total + (losses * right).sum()
        return self.weight * total / (2 * right.sum().clamp(min=1))


def recall_at(embeddings: Tensor, index: Tensor, labels: Tensor, k: tuple[int, ...]) -> dict[int, float]:
    """Recall@k: the share of a document's right answers among its k nearest documents, the mean of all queries.

    embeddings: (documents, D), compared by cosine; index: (n, 2), the documents of each pair; labels: (n,), 1 = right.
    Queries are the first documents of right pairs; candidates all second documents but the query itself. Raises
    ValueError where no pair is right.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    candidates, position = torch.unique(index[:, 1], return_inverse=True)
    chosen = labels == 1
    queries, row = torch.unique(index[chosen, 0], return_inverse=True)
    if not len(queries):
        raise ValueError("no pair has the label 1, so there is nothing to find")
    relevant = torch.zeros(len(queries), len(candidates), dtype=torch.bool, device=index.device)
    relevant[row, position[chosen]] = True
    scores = unit[queries] @ unit[candidates].T
    scores = scores.masked_fill(queries[:, None] == candidates, -torch.inf)
    found = relevant.gather(1, scores.argsort(dim=1, descending=True, stable=True)).cumsum(1)
    return {n: (found[:, min(n, len(candidates)) - 1] / found[:, -1]).mean().item() for n in k}
