"""Mixtures of experts: feed-forward parts in which each token visits a few of many perceptrons. Any stack takes them as
`block={"ffn": "moe"}` or "switch", with their options under `experts`.

Of x (B, L, D), E experts and k choices a token:  y = sum over choices e of gate_e  act(x W1_e) W2_e.

Router arithmetic is in float32 at least. Padding is routed nowhere: it takes no capacity and no part in the losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._precision import wide
from lra.encoder import Cost
from lra.kernels.expert_mlp import expert_mlp


class Experts(nn.Module, ABC):
    """The experts of a mixture, what a capacity drops, and the counts of both; a subclass routes.

    capacity: an expert takes at most ceil(capacity n k / E) choices of a sequence of n real tokens, earlier tokens
    first; 0: no limit. A choice over it adds nothing, and the residual connection carries the token on.
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int, k: int, capacity: float, activation: str
    ) -> None:
        super().__init__()
        if n_experts < 1 or not 1 <= k <= n_experts:
            raise ValueError(f"n_experts is {n_experts} and k {k}; k from 1 to n_experts")
        if not (math.isfinite(capacity) and capacity >= 0):
            raise ValueError(f"capacity is {capacity}; at least 0, and 0 is no limit")
        if activation not in ("gelu", "relu"):
            raise ValueError(f"activation is {activation!r}; one of gelu, relu")
        hidden = round(d_model * expand)
        self.n_experts, self.k, self.capacity, self.activation = n_experts, k, capacity, activation
        self.w1 = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden, d_model))
        self.loss: Tensor | None = None
        self.counts: Tensor | None = None  # choices of each expert before the capacity, and how many were dropped

    def __getstate__(self) -> dict[str, Any]:
        # the loss holds a graph, which no copy can take along
        return {**self.__dict__, "loss": None}

    @abstractmethod
    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, L, D), mask: (B, L) -> experts (B, L, k) int64, their gates (B, L, k), the loss of the router."""

    @abstractmethod
    def router_cost(self, length: int) -> Cost:
        """Analytic forward work of `route` in evaluation mode."""

    @property
    def idle_parameters(self) -> int:
        """Number of parameters of the experts that a token does not visit."""
        return (self.n_experts - self.k) * (self.w1[0].numel() + self.w2[0].numel())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, L) -> (B, L, D), all tokens real without a mask; or (B, D) -> (B, D), one token a sequence."""
        if x.dim() == 2:
            return self(x.unsqueeze(1)).squeeze(1)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            index, gate, self.loss = self.route(wide(x), mask)
        chosen = index.masked_fill(~mask.unsqueeze(-1), -1)
        kept = self.within_capacity(chosen, mask)
        return self.apply_experts(x.flatten(0, 1), kept.flatten(0, 1), gate.to(x.dtype).flatten(0, 1)).view_as(x)

    def apply_experts(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """x: (T, D); index: (T, k), -1 for no expert; gate: (T, k) -> (T, D)."""
        return expert_mlp(x, index, gate, self.w1, self.w2, activation=self.activation)

    def within_capacity(self, chosen: Tensor, mask: Tensor) -> Tensor:
        """`chosen` (B, L, k), -1 at padding, with -1 for every choice over the capacity too; counts both."""
        queue = chosen.flatten(1)
        asked = F.one_hot(queue.clamp(min=0), self.n_experts) * (queue >= 0).unsqueeze(-1)
        kept = queue
        if self.capacity:
            limit = (mask.sum(1, dtype=torch.float64) * (self.capacity * self.k / self.n_experts)).ceil()
            place = (asked.cumsum(1) * asked).sum(-1)
            kept = queue.masked_fill(place > limit.unsqueeze(1), -1)
        now = torch.cat([asked.sum((0, 1)), (queue >= 0).sum().sub((kept >= 0).sum()).unsqueeze(0)])
        self.counts = now if self.counts is None else self.counts.to(now.device) + now
        return kept.view_as(chosen)

    def cost(self, length: int) -> Cost:
        _, d_model, hidden = self.w1.shape
        experts = Cost(4.0 * length * self.k * d_model * hidden, 8.0 * length * self.k * hidden)
        return self.router_cost(length) + experts + Cost(other=6.0 * length * self.k * self.n_experts)

    def aux_loss(self) -> Tensor | None:
        return self.loss

    def diagnostics(self) -> dict[str, float]:
        """`dropped`: share of choices over the capacity; `load_e`: share of choices that fell on expert e, 1 / E where
        balanced. Over the forwards since last asked."""
        if self.counts is None:
            return {}
        *loads, dropped = self.counts.tolist()
        self.counts = None
        total = max(1, sum(loads))
        return {"dropped": dropped / total, **{f"load_{e}": load / total for e, load in enumerate(loads)}}


class NoisyTopK(Experts):
    """The gate of Shazeer et al. 2017, arXiv:1701.06538, section 2.1 and appendix A, over the real tokens of a batch:

        clean = x W_g,  sd = softplus(x W_noise) + 0.01,  H = clean + normal sd when training, else clean    (T, E)
        gate = softmax of the k largest H, 0 elsewhere
        importance_e = sum of gate_e,   load_e = sum of P(expert e is among the k | noise drawn anew for e alone)
        loss = importance_weight CV(importance)^2 + load_weight CV(load)^2

    CV is standard deviation over mean. Both matrices start at 0, experts as two LeCun-normal maps. The 0.01 is that of
    the authors' released code. Without noise, load counts choices.
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, k: int = 2, capacity: float = 0.0,
        activation: str = "relu", importance_weight: float = 0.1, load_weight: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=k, capacity=capacity, activation=activation)
        self.weights = importance_weight, load_weight
        self.w_gate = nn.Parameter(torch.zeros(d_model, n_experts))
        self.w_noise = nn.Parameter(torch.zeros(d_model, n_experts))
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean, sd = x @ wide(self.w_gate), F.softplus(x @ wide(self.w_noise)) + 0.01
        noise = torch.randn_like(clean) if self.training else None
        index, gate, importance, load = self.gates(clean, sd, noise, mask)
        importance_weight, load_weight = self.weights
        return index, gate, importance_weight * cv_squared(importance) + load_weight * cv_squared(load)

    def gates(
        self, clean: Tensor, sd: Tensor, noise: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, L, E) each -> experts and gates (B, L, k), importance and load (E,)."""
        noisy = clean if noise is None else clean + noise * sd
        best, order = noisy.topk(min(self.k + 1, self.n_experts), dim=-1)
        index, gate = order[..., : self.k], best[..., : self.k].softmax(-1)
        real = mask.unsqueeze(-1)
        spread = torch.zeros_like(clean).scatter(-1, index, gate) * real
        chosen = torch.zeros_like(clean).scatter(-1, index, 1.0)
        if noise is None or self.k == self.n_experts:
            load = chosen
        else:
            # what e must exceed: the k-th largest of the others, which for e among the k is the (k + 1)-th of all
            threshold = torch.where(chosen > 0, best[..., self.k :], best[..., self.k - 1 : self.k])
            load = torch.special.ndtr((clean - threshold) / sd)
        return index, gate, spread.sum((0, 1)), (load * real).sum((0, 1))

    def router_cost(self, length: int) -> Cost:
        d_model, experts = self.w_gate.shape
        return Cost.linear(length, d_model, 2 * experts, bias=False)


class Switch(Experts):
    """The router of Fedus et al. 2021, arXiv:2101.03961, section 2: one expert a token.

        x' = x, in training times uniform(1 - jitter, 1 + jitter)
        p = softmax(x' W_r),  expert = argmax p,  gate = max p
        balance = E sum_e f_e P_e     f_e: share of a sequence's tokens whose expert is e, P_e: mean of p_e over them
        z = mean over tokens of logsumexp(x' W_r)^2                 arXiv:2202.08906
        loss = balance_weight balance + z_weight z                  balance is the mean over the sequences of a batch

    All matrices start truncated normal of variance 0.1 / inputs (section 2.4).
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, capacity: float = 1.25, activation: str = "relu",
        jitter: float = 0.01, balance_weight: float = 0.01, z_weight: float = 0.001,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=1, capacity=capacity, activation=activation)
        self.jitter, self.weights = jitter, (balance_weight, z_weight)
        self.router = nn.Linear(d_model, n_experts, bias=False)
        for weight, inputs in ((self.router.weight, d_model), (self.w1, d_model), (self.w2, self.w2.shape[1])):
            std = (0.1 / inputs) ** 0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x, wide(self.router.weight))
        gate, index = logits.softmax(-1).max(-1, keepdim=True)
        balance, z = self.losses(logits, index, mask)
        balance_weight, z_weight = self.weights
        return index, gate, balance_weight * balance + z_weight * z

    def losses(self, logits: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Balance and z: (B, L, E), (B, L, 1), (B, L) -> two scalars."""
        real = mask.unsqueeze(-1).to(logits.dtype)
        tokens = real.sum(1)
        shares = (F.one_hot(index.squeeze(-1), self.n_experts) * real).sum(1) / tokens
        means = (logits.softmax(-1) * real).sum(1) / tokens
        z = (logits.logsumexp(-1).square() * mask).sum() / mask.sum()
        return self.n_experts * (shares * means).sum(-1).mean(), z

    def router_cost(self, length: int) -> Cost:
        return Cost.linear(length, self.router.in_features, self.n_experts, bias=False)


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation: variance over squared mean, 0 for one number."""
    return x.var(correction=0) / (x.mean().square() + 1e-10)


MIXTURES: dict[str, type[Experts]] = {"moe": NoisyTopK, "switch": Switch}
