"""Mamba-2: a selective state space model with one decay per head, which makes it linear attention in chunks.

Dao and Gu 2024, arXiv:2405.21060. With E = expand D split into H heads of width P, state size N, and G groups of heads
that share B and C:

    z, (x, B, C), dt = split(W_in x)                       (B, L, E), (B, L, E + 2 G N), (B, L, H)   section 7.1
    x, B, C = silu(conv(x, B, C) + b)                      depthwise, causal, over d_conv tokens
    dt = softplus(dt + b_dt)                               (B, L, H)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t',   h_0 = 0   (B, L, H, P, N), never stored;  A = -exp(A_log), (H,)
    y_t = h_t C_t + d x_t                                  (B, L, H, P), flattened to (B, L, E)      section 6
    out = W_out norm(y silu(z))                            (B, L, D)     RMS over the E / G features of each group

Initialisation, that of the released code: A uniform in [-16, -1]; dt at x = 0 uniform in the logarithm between dt_min
and dt_max, at least 1e-4; d = 1; W_out divided by sqrt(n_layers), as there is one residual a layer; the rest PyTorch's
own. A_log, d, biases, b_dt among them, and norms learn without weight decay.

Departures: none known in the mixer. N is 64 unless told, where the paper's language models have 128, and P the largest
power of two up to 64 that divides E. A block is the mixer alone, with RMS norm, as in the paper; `bias` adds biases, 0
at first, to W_in and W_out, which the released code offers and leaves out.

Checked against: tensors of Hugging Face's Mamba2Mixer, cross-checked there against mamba2-minimal, with one group and
with two: outputs, gradients of x and of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._norm import rms_norm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.architectures._window import continued_conv1d
from lra.encoder import Card, Cost, Mixer
from lra.kernels.causal_conv1d import causal_conv1d
from lra.kernels.ssd import ssd

State = tuple[Tensor, Tensor]
CHUNK = 64


class Mamba2Mixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, state_size: int, head_dim: int, n_groups: int, expand: int, d_conv: int, dt_min: float,
        dt_max: float, bias: bool, n_layers: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.state_size, self.n_groups = expand * d_model, state_size, n_groups
        self.n_heads = self.width // head_dim
        shared = n_groups * state_size
        self.inner = (self.width, shared, shared)  # x, B, C
        self.sizes = (self.width, sum(self.inner), self.n_heads)  # z, (x, B, C), dt
        self.into = nn.Linear(d_model, sum(self.sizes), bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.inner), d_conv).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(sum(self.inner)).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        dt = initial_log_dt(self.n_heads, dt_min, dt_max).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.d = nn.Parameter(torch.ones(self.n_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.width))
        self.out = nn.Linear(self.width, d_model, bias=bias)
        with torch.no_grad():
            self.out.weight.div_(math.sqrt(n_layers))
        if bias:
            nn.init.zeros_(self.into.bias)
            nn.init.zeros_(self.out.bias)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E + 2 G N) -> x: (..., H, P), B and C: (..., G, N)."""
        x, B, C = xBC.split(self.inner, dim=-1)
        return (
            x.unflatten(-1, (self.n_heads, -1)),
            B.unflatten(-1, (self.n_groups, -1)),
            C.unflatten(-1, (self.n_groups, -1)),
        )

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm and output map: y, x: (..., H, P), z: (..., E) -> (..., D)."""
        y = wide((y + self.d.unsqueeze(-1) * x).flatten(-2) * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        return self.out(rms_norm(y, 1e-5).flatten(-2) * self.norm_weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z, xBC, dt = self.into(x).split(self.sizes, dim=-1)
        heads, B, C = self._split(causal_conv1d(xBC, self.conv_weight, self.conv_bias, "silu"))
        y = ssd(heads, F.softplus(wide(dt) + self.dt_bias), -self.A_log.exp(), B, C, CHUNK)
        assert isinstance(y, Tensor)
        return self._finish(y, heads, z)

    def cost(self, length: int) -> Cost:
        d_model, taps = self.into.in_features, self.conv_weight.shape[1]
        bias = self.into.bias is not None
        maps = Cost.linear(length, d_model, sum(self.sizes), bias) + Cost.linear(length, self.width, d_model, bias)
        head_dim = self.width // self.n_heads
        scan = 4.0 * self.n_heads * (CHUNK * (self.state_size + head_dim) / 2 + self.state_size * head_dim)
        return maps + Cost(other=length * (scan + sum(self.inner) * (2.0 * taps + 6) + 16.0 * self.width))

    def init_state(self, batch: int) -> State:
        channels, taps = self.conv_weight.shape
        like = self.conv_weight
        head_dim = self.width // self.n_heads
        return like.new_zeros(batch, taps - 1, channels), like.new_zeros(batch, self.n_heads, head_dim, self.state_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, E + 2 G N), and h (B, H, P, N)."""
        z, xBC, dt = self.into(x).split(self.sizes, dim=-1)
        window = torch.cat([state[0], xBC.unsqueeze(1)], dim=1)
        heads, B, C = self._split(F.silu(torch.einsum("bkc,ck->bc", window, self.conv_weight) + self.conv_bias))
        B, C = (t.repeat_interleave(self.n_heads // self.n_groups, dim=1) for t in (B, C))  # (B, H, N)
        dt = F.softplus(wide(dt) + self.dt_bias)
        decay = torch.exp(-dt * self.A_log.exp())[..., None, None]
        h = decay * state[1] + torch.einsum("bh,bhp,bhn->bhpn", dt, heads, B)
        return self._finish(torch.einsum("bhpn,bhn->bhp", h, C), heads, z), (window[:, 1:], h)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        z, xBC, dt = self.into(x).split(self.sizes, dim=-1)
        xBC, window = continued_conv1d(xBC, state[0], self.conv_weight, self.conv_bias, "silu")
        heads, B, C = self._split(xBC)
        dt = F.softplus(wide(dt) + self.dt_bias)
        y, h = ssd(heads, dt, -self.A_log.exp(), B, C, CHUNK, h0=state[1], return_state=True)
        return self._finish(y, heads, z), (window, h)


class Mamba2(Stack):
    """state_size: N. head_dim: P, which divides expand * d_model. n_groups: G, which divides the number of heads.
    d_conv: taps of the convolution. dt_min, dt_max: range of the initial step sizes. bias: of the outer two maps."""

    card = Card(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
        "Duality",
        year=2024,
        url="https://arxiv.org/abs/2405.21060",
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
        state_size: int = 64,
        head_dim: int | None = None,
        n_groups: int = 1,
        expand: int = 2,
        d_conv: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("state_size", state_size), ("expand", expand), ("d_conv", d_conv)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1")
        width = expand * d_model
        share = math.gcd(64, width) if head_dim is None else head_dim
        if share < 1 or width % share:
            raise ValueError(f"head_dim is {share}; a divisor of expand * d_model, {width}")
        if n_groups < 1 or width // share % n_groups:
            raise ValueError(f"n_groups is {n_groups}; a divisor of the number of heads, {width // share}")
        super().__init__(
            lambda _: Mamba2Mixer(
                d_model, state_size, share, n_groups, expand, d_conv, dt_min, dt_max, bias, n_layers
            ),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout, direction=direction, block=block,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "d")
