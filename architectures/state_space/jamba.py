"""Jamba: Mamba layers with a layer of attention in every eight, and experts in place of every second feed-forward part.

Lieber et al. 2024, arXiv:2403.19887. Layer i is attention where i mod p = p // 2, p = `attention_every`, else Mamba.
Its feed-forward part is a mixture where i mod `experts_every` is the last. Each part has an RMS norm before it.

    mamba      that of arXiv:2312.00752 with E = expand D, N states and rank R, and RMS norms inside (section 3.1):
               u, z = split(in_proj x),  u = silu(conv1d u),  r, B, C = split(x_proj u), each over its rms with a gain
               dt = softplus(dt_proj r),  h_t = exp(dt A) h_{t-1} + dt B_t u_t,  y = out_proj((C h + D u) silu(z))
    attention  causal softmax, H heads of queries over n_kv_heads of keys and values, no positions of any kind
    experts    p = softmax(W_r x); y = sum over the k largest of p_e W2_e(silu(W1_e x) * W3_e x), p as it is
               balance = `balance_weight` E sum_e f_e P_e     f_e: choices of e over tokens, P_e: mean of p_e

In shallower models p is the number of layers, so that one layer is attention in any with two or more.

Initialisation: the scan as in Mamba, A = -1, ..., -N, dt at x = 0 uniform in the logarithm between dt_min and dt_max, D
= 1, dt_proj uniform within R^-1/2; attention Xavier uniform; experts normal of variance 1 / inputs; gains 1; the rest
PyTorch's own. A_log and D learn without weight decay.

Departures: the maps of attention and of the dense feed-forward part have biases, which start at 0 in attention. The
width of an expert is that of the feed-forward part, as in the paper. Padding is routed nowhere and does not count.

Checked against: tensors of Hugging Face's JambaMambaMixer, JambaSparseMoeBlock and JambaAttentionDecoderLayer: normed
r, B and C, router, balance and its gradient, outputs, gradients of x and of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, attend, checked_width
from lra.architectures._checks import at_least
from lra.architectures._dropout import tie_dropout
from lra.architectures._experts import TokenChoice
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, FeedForward, Stack
from lra.architectures._window import ShortConvolution
from lra.attention import repeat_heads
from lra.encoder import Card, Cost, Mixer
from lra.kernels.selective_scan import selective_scan

State = tuple[Tensor, Tensor]
EPS = 1e-6


class JambaMambaMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, state_size: int, expand: int, d_conv: int, dt_rank: int, dt_min: float, dt_max: float
    ) -> None:
        super().__init__()
        width = expand * d_model
        self.sizes = (dt_rank, state_size, state_size)
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)  # rows: u, z
        self.conv1d = ShortConvolution(width, d_conv, bias=True)
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)  # rows: r, B, C
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = (RMSNorm(size, eps=EPS) for size in self.sizes)
        self.dt_proj = nn.Linear(dt_rank, width)
        dt = initial_log_dt(width, dt_min, dt_max).exp().clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r (..., R), B and C (..., N), normalised."""
        r, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        return self.dt_layernorm(wide(r)), self.b_layernorm(wide(B)), self.c_layernorm(wide(C))

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (..., E), A (E, N), B and C (..., N)."""
        r, B, C = self.selected(u)
        dt = F.softplus(wide(F.linear(r, self.dt_proj.weight)) + self.dt_proj.bias)
        return dt, -self.A_log.exp(), B, C

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d(u)
        return self.out_proj(selective_scan(u, *self._selection(u), self.D, z))

    def cost(self, length: int) -> Cost:
        d_model, (width, states), rank = self.in_proj.in_features, self.A_log.shape, self.sizes[0]
        maps = (
            Cost.linear(length, d_model, 2 * width, bias=False)
            + Cost.linear(length, width, sum(self.sizes), bias=False)
            + Cost.linear(length, rank, width)
            + Cost.linear(length, width, d_model, bias=False)
        )
        scan = width * (7.0 * states + 2.0 * self.conv1d.weight.shape[2] + 20.0)
        return maps + Cost(other=length * (scan + 5.0 * sum(self.sizes)))

    def init_state(self, batch: int) -> State:
        return self.conv1d.init_state(batch), self.A_log.new_zeros(batch, *self.A_log.shape)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, E), and h (B, E, N)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, window = self.conv1d.step(u, state[0])
        dt, A, B, C = self._selection(u)
        h = torch.exp(dt.unsqueeze(-1) * A) * state[1] + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
        y = torch.einsum("ben,bn->be", h, C) + self.D * u
        return self.out_proj(y * F.silu(z)), (window, h)


class JambaAttentionMixer(AttentionMixer):
    """Causal attention with grouped keys and values: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__(d_model, n_heads, width=d_model, positions="none", causal=True, n_kv_heads=n_kv_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (repeat_heads(t, self.n_heads) for t in (k, v))
        return attend(q, k, v, mask, causal=True)

    def pairs(self, length: int) -> float:
        return float(self.n_heads * length**2)


class JambaExperts(TokenChoice):
    """Gated experts, each W1 and W3 side by side in w1: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, expand: float, *, n_experts: int, k: int, balance_weight: float) -> None:
        super().__init__(d_model, expand, n_experts=n_experts, k=k, capacity=0.0, activation="swiglu")
        self.balance_weight = balance_weight
        self.router = nn.Linear(d_model, n_experts, bias=False)
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = F.linear(x, wide(self.router.weight)).softmax(-1)
        gate, index = share.topk(self.k, dim=-1)
        return index, gate, self.balance_weight * self.balance(share, index, mask)

    def balance(self, share: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """E sum_e f_e P_e over the real tokens of the batch, k where all experts are used alike."""
        tokens = mask.sum().to(share.dtype)
        chosen = (F.one_hot(index, self.n_experts).sum(-2) * mask.unsqueeze(-1)).sum((0, 1)) / tokens
        mean = (share * mask.unsqueeze(-1)).sum((0, 1)) / tokens
        return self.n_experts * (chosen * mean).sum()

    def router_cost(self, length: int) -> Cost:
        return Cost.linear(length, self.router.in_features, self.n_experts, bias=False)


class Jamba(Stack):
    """attention_every: p, every how many layers one is attention, 0 for none. experts_every: every how many layers the
    feed-forward part is a mixture, 0 for none; n_experts: E; k: choices of a token. n_heads, n_kv_heads: of attention.
    state_size: N. expand: E of the scan over d_model. d_conv: taps of the convolution. dt_rank: R, d_model / 16 rounded
    up unless given. dt_min, dt_max: range of the initial step sizes. block.expand: width of the feed-forward parts."""

    card = Card(
        title="Jamba: A Hybrid Transformer-Mamba Language Model",
        year=2024,
        url="https://arxiv.org/abs/2403.19887",
        scaling="L^2",
        causal=True,
        variants={"dense": {"experts_every": 0}},
    )
    block = Block(ffn="none", expand=2.0, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        dropout: float = 0.0,
        attention_every: int = 8,
        experts_every: int = 2,
        n_experts: int = 4,
        k: int = 2,
        n_heads: int = 4,
        n_kv_heads: int = 1,
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        balance_weight: float = 0.001,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        at_least(1, d_model=d_model, n_layers=n_layers, state_size=state_size, expand=expand, d_conv=d_conv)
        at_least(1, dt_rank=rank, n_kv_heads=n_kv_heads)
        at_least(0, attention_every=attention_every, experts_every=experts_every)
        period = min(attention_every, n_layers)
        if period:
            checked_width(d_model, n_heads, None, "none")
            if n_heads % n_kv_heads:
                raise ValueError(f"n_kv_heads is {n_kv_heads}; a divisor of n_heads, {n_heads}")
        shape = type(self).block.updated(block)
        if shape.ffn != "none":
            raise ValueError(f"block.ffn is {shape.ffn!r}; 'none', as experts_every says what each layer has")
        self.attention_every = attention_every

        def mixer(layer: int) -> Mixer:
            if period and layer % period == period // 2:
                return JambaAttentionMixer(d_model, n_heads, n_kv_heads)
            return JambaMambaMixer(
                d_model, state_size=state_size, expand=expand, d_conv=d_conv, dt_rank=rank, dt_min=dt_min, dt_max=dt_max
            )

        super().__init__(mixer, d_model=d_model, n_layers=n_layers, dropout=dropout, block=block, **stack)
        for i, layer in enumerate(self.blocks):
            if experts_every and i % experts_every == experts_every - 1:
                layer.ffn = JambaExperts(d_model, shape.expand, n_experts=n_experts, k=k, balance_weight=balance_weight)
            else:
                layer.ffn = FeedForward("swiglu", d_model, shape.expand, dropout)
            tie_dropout(layer.ffn, shape.tie_dropout)
            layer.ffn_norm = RMSNorm(d_model, eps=EPS)

    @property
    def scaling(self) -> str:
        return "L^2" if self.attention_every else "L"

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        scanned = any(isinstance(module, JambaMambaMixer) for module in self.modules())
        return undecayed(self, "A_log", "D") if scanned else {}
