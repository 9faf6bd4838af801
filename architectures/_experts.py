"""Shared by mixtures of experts: the experts, choices by token with their capacity, and the counts of both.

Router arithmetic is in float32 at least. Padding is routed nowhere: it takes no capacity and no part in the losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, one_of
from lra.architectures._counts import added, unless_exporting
from lra.architectures._expert_parallel import divided_expert_mlp, share
from lra.architectures._precision import wide
from lra.encoder import Cost
from lra.kernels.expert_mlp import expert_mlp

ACTIVATIONS = ("gelu", "relu", "swiglu")


class Experts(nn.Module, ABC):
    """E perceptrons, w1 (E, D, F) and w2 (E, F, D), and what they were given to do.

    activation: of ACTIVATIONS; with "swiglu" w1 is (E, D, 2 F), gates first.
    """

    looks_ahead = False
    """Whether the output of a token depends on later tokens; then there is no causal form and no recurrent mode."""
    capacity: float = 0.0
    divides = True
    """Whether `apply_experts` computes them, whose work processes can divide."""
    divided = False
    """Whether the processes of a training run divide the experts among them (lra.training.execution.divide_experts)."""

    def __init__(self, d_model: int, expand: float, *, n_experts: int, activation: str) -> None:
        super().__init__()
        at_least(1, n_experts=n_experts)
        one_of(ACTIVATIONS, activation=activation)
        hidden = round(d_model * expand)
        self.n_experts, self.activation = n_experts, activation
        self.w1 = nn.Parameter(torch.empty(n_experts, d_model, hidden * (2 if activation == "swiglu" else 1)))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden, d_model))
        self.loss: Tensor | None = None
        self.counts: Tensor | None = None  # what fell on each expert, how much was dropped, and of how much

    def __getstate__(self) -> dict[str, Any]:
        # the loss holds a graph, which no copy can take along
        return {**self.__dict__, "loss": None}

    @abstractmethod
    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D), (B, L) -> (B, L, D); sets `loss` and counts."""

    @abstractmethod
    def router_cost(self, length: int) -> Cost:
        """Analytic forward work of what is not the experts', in evaluation mode."""

    @abstractmethod
    def visits(self, length: int) -> float:
        """Number of vectors that all experts together process for a sequence of `length` tokens."""

    @property
    @abstractmethod
    def idle_parameters(self) -> int:
        """Number of parameters of the experts that a token does not visit."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, L) -> (B, L, D), all tokens real without a mask; or (B, D) -> (B, D), one token a sequence."""
        if x.dim() == 2:
            return self(x.unsqueeze(1)).squeeze(1)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self.mix(x, mask)

    def apply_experts(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """x: (T, D); index: (T, k), -1 for no expert; gate: (T, k) -> (T, D)."""
        # evaluation is not divided: processes may have different numbers of batches there
        if self.divided and self.training and share()[1] > 1:
            return divided_expert_mlp(x, index, gate, self.w1, self.w2, activation=self.activation)
        return expert_mlp(x, index, gate, self.w1, self.w2, activation=self.activation)

    @unless_exporting
    @torch.no_grad()
    def count(self, loads: Tensor, dropped: Tensor, asked: Tensor) -> None:
        """Add to the counts: loads (E,), dropped () of asked ()."""
        self.counts = added(self.counts, torch.cat([loads, torch.stack([dropped, asked]).to(loads)]))

    @unless_exporting
    def keep(self, loss: Tensor) -> None:
        self.loss = loss

    def one_expert(self) -> int:
        return self.w1[0].numel() + self.w2[0].numel()

    def cost(self, length: int) -> Cost:
        _, hidden, d_model = self.w2.shape
        rows, width = self.visits(length), self.w1.shape[2]
        return self.router_cost(length) + Cost(2.0 * rows * d_model * (width + hidden), 8.0 * rows * hidden)

    def aux_loss(self) -> Tensor | None:
        return self.loss

    def after_step(self) -> None:
        """Update of parameters without a gradient, after an optimiser step."""

    def diagnostics(self) -> dict[str, float]:
        """Over the forwards since last asked. `dropped`: share of choices over the capacity, or of tokens that experts
        left; `entropy`: of the loads, over log E, 1 where balanced; `load_e`: share of expert e in all choices."""
        if self.counts is None:
            return {}
        *counts, dropped, asked = self.counts.tolist()
        self.counts = None
        loads = [n / max(sum(counts), 1e-30) for n in counts]
        entropy = -sum(p * math.log(p) for p in loads if p > 0) / math.log(max(self.n_experts, 2))
        shares = {"dropped": dropped / max(asked, 1), "entropy": entropy}
        return shares | {f"load_{e}": p for e, p in enumerate(loads)}


class TokenChoice(Experts):
    """Each token chooses k experts; a subclass says which.

    capacity: an expert takes at most ceil(capacity n k / E) choices of a sequence of n real tokens, earlier tokens
    first; 0: no limit. A choice over it adds nothing, and the residual connection carries the token on.
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int, k: int, capacity: float, activation: str
    ) -> None:
        if n_experts < 1 or not 1 <= k <= n_experts:
            raise ValueError(f"n_experts is {n_experts} and k {k}; k from 1 to n_experts")
        if not (math.isfinite(capacity) and capacity >= 0):
            raise ValueError(f"capacity is {capacity}; at least 0, and 0 is no limit")
        super().__init__(d_model, expand, n_experts=n_experts, activation=activation)
        self.k, self.capacity = k, capacity

    @abstractmethod
    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, L, D), mask: (B, L) -> experts (B, L, k) int64, -1 for none, their gates (B, L, k), the loss of the
        router."""

    @property
    def idle_parameters(self) -> int:
        return (self.n_experts - self.k) * self.one_expert()

    def visits(self, length: int) -> float:
        return float(length * self.k)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            index, gate, loss = self.route(wide(x), mask)
        self.keep(loss)
        kept = self.within_capacity(index.masked_fill(~mask.unsqueeze(-1), -1), mask)
        return self.apply_experts(x.flatten(0, 1), kept.flatten(0, 1), gate.to(x.dtype).flatten(0, 1)).view_as(x)

    def within_capacity(self, chosen: Tensor, mask: Tensor) -> Tensor:
        """`chosen` (B, L, k), -1 at padding, with -1 for every choice over the capacity too; counts both."""
        queue = chosen.flatten(1)
        asked = F.one_hot(queue.clamp(min=0), self.n_experts) * (queue >= 0).unsqueeze(-1)
        kept = queue
        if self.capacity:
            limit = (mask.sum(1, dtype=torch.float64) * (self.capacity * self.k / self.n_experts)).ceil()
            place = (asked.cumsum(1) * asked).sum(-1)
            kept = queue.masked_fill(place > limit.unsqueeze(1), -1)
        choices = (queue >= 0).sum()
        self.count(asked.sum((0, 1)), choices - (kept >= 0).sum(), choices)
        return kept.view_as(chosen)

    def cost(self, length: int) -> Cost:
        return super().cost(length) + Cost(other=6.0 * length * self.k * self.n_experts)


def balance_loss(p: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """E sum_e f_e P_e, mean over the sequences: 1 where balanced.

    p: (B, L, E) shares of the experts in each token; index: (B, L, k) its experts; mask: (B, L). f_e: share of a
    sequence's choices that fell on e; P_e: mean of p_e over its tokens.
    """
    real, experts = mask.unsqueeze(-1).to(p.dtype), p.shape[-1]
    tokens = real.sum(1)
    shares = (F.one_hot(index, experts).sum(2) * real).sum(1) / (tokens * index.shape[-1])
    return experts * (shares * ((p * real).sum(1) / tokens)).sum(-1).mean()
