"""Differential attention: each head subtracts a second softmax map from its first, which cancels their common part.

Ye et al. 2024, arXiv:2410.05258, section 2.1. H heads of d = D / (2 H) for queries and keys and 2 d for values, G =
n_kv_heads of them for keys and values (H unless told), layer l from 0:

    q1, q2, k1, k2 = x W_q, x W_k, turned by rotary positions           (B, H or G, L, d) each
    v = x W_v                                                           (B, G, L, 2 d)
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init              a number of the layer; lq, lk: (d,)
    lambda_init = 0.8 - 0.6 exp(-0.3 l)
    o = (softmax(q1 k1' / sqrt(d)) - lambda softmax(q2 k2' / sqrt(d))) v
    y = concat_h((1 - lambda_init) rms_norm(o)) W_o                     (B, L, D), gains (2 d,) shared by the heads

No map has a bias. A step keeps keys and values, 4 L G d numbers a layer.

Initialisation: lq, lk normal of deviation 0.1, gains 1; maps are PyTorch's own, as in the released code. The norm makes
the size of o that of a plain head, and 1 - lambda_init its gradient.

Departures: with grouped keys, both maps of a head read the pair of its group, as in the authors' fused code; their
naive code repeats key heads one by one and mixes the pairs. The bidirectional form, without the causal mask, is ours.

Checked against: tensors of the authors' MultiheadDiffAttn, with all keys and grouped, both directions, every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import added_positions, attend, checked_width, rope
from lra.architectures._norm import RMSNorm
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.attention import fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer

POSITIONS = ("rope", "sinusoidal", "learned", "none")
State = tuple[Tensor, Tensor]


class DifferentialMixer(Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, *, layer: int, positions: str, causal: bool
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.causal, self.rotary = n_heads, n_kv_heads, causal, positions == "rope"
        self.head = d_model // n_heads // 2
        shared = 2 * n_kv_heads * self.head
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, shared, bias=False)
        self.v_proj = nn.Linear(d_model, shared, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(self.head) * 0.1) for _ in range(4)
        )
        self.subln = RMSNorm(2 * self.head, eps=1e-5)

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, 2 H, L, d) and keys (B, 2 G, L, d), the two of a head side by side, and values (B, G, L, 2 d)."""
        q, k = split_heads(self.q_proj(x), 2 * self.n_heads), split_heads(self.k_proj(x), 2 * self.n_kv_heads)
        if self.rotary:
            q, k = rope(q, start, interleaved=True), rope(k, start, interleaved=True)
        return q, k, split_heads(self.v_proj(x), self.n_kv_heads)

    def repeated(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of each softmax map: (B, 2 H, L, d), (B, 2 H, L, 2 d)."""
        times = self.n_heads // self.n_kv_heads
        k = k.unflatten(1, (-1, 2)).repeat_interleave(times, dim=1).flatten(1, 2)
        return k, v.repeat_interleave(2 * times, dim=1)

    def difference(self, read: Tensor) -> Tensor:
        """What both maps of each head read (B, 2 H, L, 2 d) -> (B, L, D)."""
        one, two = read.unflatten(1, (-1, 2)).unbind(2)
        first = wide(self.lambda_q1 * self.lambda_k1).sum().exp()
        second = wide(self.lambda_q2 * self.lambda_k2).sum().exp()
        o = self.subln(one - (first - second + self.lambda_init).to(one.dtype) * two)
        return self.out_proj(merge_heads(o * (1 - self.lambda_init)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, *shared = self.heads(x)
        return self.difference(attend(q, *self.repeated(*shared), mask, causal=self.causal))

    def cost(self, length: int) -> Cost:
        d_model, shared = self.q_proj.in_features, self.k_proj.out_features
        maps = Cost.linear(length, d_model, 2 * (d_model + shared), bias=False)
        pairs = 2.0 * self.n_heads * length**2
        turning = 6.0 * length * (d_model + shared) if self.rotary else 0.0
        return maps + Cost(6.0 * self.head * pairs, 5.0 * pairs + turning + 8.0 * length * d_model)

    def init_state(self, batch: int) -> State:
        empty = self.out_proj.weight.new_zeros(batch, self.n_kv_heads, 0, 2 * self.head)
        return empty.new_zeros(batch, 2 * self.n_kv_heads, 0, self.head), empty

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: keys (B, 2 G, t, d) and values (B, G, t, 2 d)."""
        time, tokens = state[0].shape[2], x.shape[1]
        q, k, v = self.heads(x, time)
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        allowed = torch.ones(tokens, time + tokens, dtype=torch.bool, device=x.device).tril(time)
        return self.difference(fused_attention(q, *self.repeated(keys, values), allowed)), (keys, values)


class Differential(Stack):
    """n_heads: H; a transformer of the same head width has twice as many. n_kv_heads: G, a divisor of n_heads.
    positions: "rope", as published, "sinusoidal", "learned" or "none"."""

    card = Card(
        title="Differential Transformer",
        year=2024,
        url="https://arxiv.org/abs/2410.05258",
        scaling="L^2",
        causal=False,
        variants={"gqa": {"n_kv_heads": 1}},
        exempt={
            "optim_groups": "lambda weighs two softmax maps; it is no rate, and there is no recurrence",
            "optim_norms": "lambda weighs two softmax maps; it is no rate, and there is no recurrence",
        },
    )
    block = Block(norm="rms", ffn="swiglu", expand=8 / 3)

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 2,
        n_kv_heads: int | None = None,
        positions: str = "rope",
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"n_heads is {n_heads}; twice as many, for two maps each, must divide d_model, {d_model}")
        checked_width(d_model, 2 * n_heads, None, positions, POSITIONS)
        groups = n_heads if n_kv_heads is None else n_kv_heads
        if groups < 1 or n_heads % groups:
            raise ValueError(f"n_kv_heads is {groups}; a divisor of n_heads, {n_heads}")
        super().__init__(
            lambda layer: DifferentialMixer(
                d_model, n_heads, groups, layer=layer, positions=positions, causal=direction == "causal"
            ),
            native=True, d_model=d_model, direction=direction,
            block={"positions": added_positions(positions), **(block or {})}, **stack,
        )  # fmt: skip
