"""Mamba: a diagonal state space model whose step size, input and output maps are functions of the current token.

Gu and Dao 2023, arXiv:2312.00752. With E = expand D, N the state size and R the rank of the step-size map:

    u, z = split(W_in x)                                   (B, L, E) each                    section 3.4, figure 3
    u = silu(conv(u) + b)                                  (B, L, E)     depthwise, causal, over d_conv tokens
    r, B, C = split(W_x u)                                 (B, L, R), (B, L, N), (B, L, N)   selection, section 3.2
    dt = softplus(W_dt r + b_dt)                           (B, L, E)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   h_0 = 0    (B, L, E, N), never stored;  A = -exp(A_log), (E, N)
    y = W_out((C h + d u) silu(z))                         (B, L, D)

Initialisation (section 3.6 and the released code): A = -1, ..., -N in every channel (S4D-Real); dt at x = 0 uniform in
the logarithm between dt_min and dt_max, at least 1e-4; W_dt uniform within R^-1/2; d = 1; W_out divided by
sqrt(n_layers), as there is one residual a layer; the rest PyTorch's own. A_log, d, biases, b_dt among them,
and norms learn without weight decay.

Departures: the paper's optional norm inside the mixer is left out, as in the released code. A block is the mixer alone,
with RMS norm, as in the paper; `bias` adds biases, 0 at first, to W_in and W_out, which the released code offers and
leaves out.

Checked against: tensors of Hugging Face's MambaMixer, cross-checked there against mamba-minimal: outputs, gradients of
x and of every parameter, sequences inside the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.architectures._window import continued_conv1d
from lra.encoder import Card, Cost, Mixer
from lra.kernels.causal_conv1d import causal_conv1d
from lra.kernels.selective_scan import selective_scan

State = tuple[Tensor, Tensor]


class MambaMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, state_size: int, expand: int, d_conv: int, dt_rank: int, dt_min: float, dt_max: float,
        bias: bool, n_layers: int,
    ) -> None:  # fmt: skip
        super().__init__()
        width = expand * d_model
        self.sizes = (dt_rank, state_size, state_size)
        self.into = nn.Linear(d_model, 2 * width, bias=bias)  # rows: u, z
        self.conv_weight = nn.Parameter(torch.empty(width, d_conv).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(width).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.select = nn.Linear(width, sum(self.sizes), bias=False)  # rows: r, B, C
        self.dt_weight = nn.Parameter(torch.empty(width, dt_rank).uniform_(-(dt_rank**-0.5), dt_rank**-0.5))
        dt = initial_log_dt(width, dt_min, dt_max).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(width, 1))
        self.d = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, d_model, bias=bias)
        with torch.no_grad():
            self.out.weight.div_(math.sqrt(n_layers))
        if bias:
            nn.init.zeros_(self.into.bias)
            nn.init.zeros_(self.out.bias)

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (..., E), B and C (..., N)."""
        r, B, C = self.select(u).split(self.sizes, dim=-1)
        return F.softplus(wide(F.linear(r, self.dt_weight)) + self.dt_bias), B, C

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        u, z = self.into(x).chunk(2, dim=-1)
        u = causal_conv1d(u, self.conv_weight, self.conv_bias, "silu")
        return self.out(selective_scan(u, *self._scan_arguments(u), self.d, z))

    def _scan_arguments(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dt, B, C = self._selected(u)
        return dt, -self.A_log.exp(), B, C

    def cost(self, length: int) -> Cost:
        d_model, (width, states), rank = self.into.in_features, self.A_log.shape, self.sizes[0]
        bias = self.into.bias is not None
        maps = (
            Cost.linear(length, d_model, 2 * width, bias)
            + Cost.linear(length, width, sum(self.sizes), bias=False)
            + Cost.linear(length, rank, width)
            + Cost.linear(length, width, d_model, bias)
        )
        scan = 7.0 * states + 2.0 * self.conv_weight.shape[1]
        return maps + Cost(other=length * width * (scan + 20.0))

    def init_state(self, batch: int) -> State:
        width, taps = self.conv_weight.shape
        like = self.conv_weight
        return like.new_zeros(batch, taps - 1, width), like.new_zeros(batch, *self.A_log.shape)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, E), and h (B, E, N)."""
        u, z = self.into(x).chunk(2, dim=-1)
        window = torch.cat([state[0], u.unsqueeze(1)], dim=1)
        u = F.silu(torch.einsum("bke,ek->be", window, self.conv_weight) + self.conv_bias)
        dt, A, B, C = self._scan_arguments(u)
        h = torch.exp(dt.unsqueeze(-1) * A) * state[1] + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
        y = torch.einsum("ben,bn->be", h, C) + self.d * u
        return self.out(y * F.silu(z)), (window[:, 1:], h)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        u, z = self.into(x).chunk(2, dim=-1)
        u, window = continued_conv1d(u, state[0], self.conv_weight, self.conv_bias, "silu")
        y, h = selective_scan(u, *self._scan_arguments(u), self.d, z, h0=state[1], return_state=True)
        return self.out(y), (window, h)


class Mamba(Stack):
    """state_size: N. expand: E over d_model. d_conv: taps of the convolution. dt_rank: R, d_model / 16 rounded up
    unless given. dt_min, dt_max: range of the initial step sizes. bias: of the outer two maps."""

    card = Card(
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        year=2023,
        url="https://arxiv.org/abs/2312.00752",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="none", norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        for name, value in (("state_size", state_size), ("expand", expand), ("d_conv", d_conv), ("dt_rank", rank)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1")
        super().__init__(
            lambda _: MambaMixer(d_model, state_size, expand, d_conv, rank, dt_min, dt_max, bias, n_layers),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout, direction=direction, block=block,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "d")
