"""Shared by gated attention units: the maps around one head of attention, with a bias for each of T5's buckets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._precision import wide
from lra.architectures._relative import buckets
from lra.encoder import Cost, Mixer

BUCKETS = 32


class GatedUnit(Mixer):
    """v, gate = silu(W_h x + b_h), (..., E) each; z = silu(W_z x + b_z), (..., S); `copies` queries and keys, gamma_c *
    z + beta_c; after the attention, W_o (gate * o) + b_o. A bias for each bucket of distances.

    Starts as published: gamma and the biases of distances normal with a deviation of 0.02, beta 0; maps are PyTorch's.
    """

    def __init__(self, d_model: int, *, qk_dim: int, width: int, copies: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.to_hidden = nn.Linear(d_model, 2 * width)  # rows: v, gate
        self.to_qk = nn.Linear(d_model, qk_dim)
        self.gamma = nn.Parameter(torch.empty(copies, qk_dim).normal_(std=0.02))
        self.beta = nn.Parameter(torch.zeros(copies, qk_dim))
        self.rel_pos_bias = nn.Parameter(torch.empty(BUCKETS).normal_(std=0.02))
        self.to_out = nn.Linear(width, d_model)

    def views(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(..., D) -> v, gate: (..., E), and the copies, (..., S) each."""
        v, gate = F.silu(self.to_hidden(x)).chunk(2, dim=-1)
        z = F.silu(self.to_qk(x)).unsqueeze(-2)
        return v, gate, list((z * self.gamma + self.beta).unbind(-2))

    def weights(self, scores: Tensor, ago: Tensor) -> Tensor:
        """relu(scores + bias)^2, 0 ahead of a causal query: (..., i, j); ago: (i, j), i - j."""
        a = F.relu(wide(scores) + self.rel_pos_bias[buckets(ago, self.causal)]).square()
        return a.masked_fill(ago < 0, 0) if self.causal else a

    def maps_cost(self, length: int) -> Cost:
        """Work of everything but the attention."""
        d_model, width, qk_dim = self.to_hidden.in_features, self.to_out.in_features, self.to_qk.out_features
        maps = Cost.linear(length, d_model, 2 * width) + Cost.linear(length, d_model, qk_dim)
        other = Cost(other=length * (10.0 * width + qk_dim * (4.0 + 2 * len(self.gamma))))
        return maps + Cost.linear(length, width, d_model) + other


def checked_sizes(qk_dim: int, expand: float, d_model: int) -> int:
    """E. Raises ValueError."""
    if qk_dim < 1:
        raise ValueError(f"qk_dim is {qk_dim}; at least 1")
    width = round(expand * d_model)
    if width < 1:
        raise ValueError(f"expand is {expand}; at least one value, expand * d_model")
    return width
