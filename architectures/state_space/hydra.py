"""Hydra: a bidirectional state space model whose matrix is quasiseparable, made of two scans and a diagonal.

Hwang, Lahoti, Puduppully, Dao and Gu 2024, arXiv:2407.09941. With E = expand D, H = E / P heads of P channels, N the
state size and G groups of heads that share B and C; f is the scan ahead, b the scan back:

    z, xBC, dt = split(in_proj u)                      (B, L, E), (B, L, E + 4 G N), (B, L, 2 H)
    x, B^f, C^f, B^b, C^b = split(silu(conv1d xBC))    depthwise, centred, over d_conv tokens
    dt^f, dt^b = softplus(dt + dt_bias)                (B, L, H) each; A = -exp(A_log), (H,), and dt_bias serve both
    h^f_t = exp(dt^f_t A) h^f_{t-1} + dt^f_t x_t B^f_t^T,   s^f_t = h^f_t C^f_t       SSD, as in Mamba-2
    s^b the same from the last token back, with B^b, C^b, dt^b
    y_t = s^f_{t-1} + s^b_{t+1} + (fc_D x_t + D) x_t   (B, L, H, P)   section 3: shifted scans and a diagonal
    out = out_proj(norm(y) silu(z))                    (B, L, D)

The two shifts leave the current token to the diagonal, whose weight for each head is a function of the token.

Initialisation, as released: A = -1, D = 1; dt at x = 0 uniform in the logarithm between dt_min and dt_max, at least
1e-4; the rest PyTorch's own. A_log, D and dt_bias learn without weight decay.

Departures: none in the mixer, whose optional biases and learnt first states, off in the released code, are left out.
A block is the mixer alone with RMS norm, as in Mamba-2, from whose block the released one is derived; the paper puts
the mixer in place of attention in BERT as well.

Checked against: tensors of the authors' Hydra with its kernels replaced by their plain references: mixed sequence,
output, gradients of x and of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack, flip
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.ssd import ssd

CHUNK = 64


class HydraMixer(Mixer):
    """(B, L, D) -> (B, L, D). The padding is zero, so the convolution at the last real tokens sees nothing behind."""

    def __init__(
        self, d_model: int, *, state_size: int, head_dim: int, n_groups: int, expand: int, d_conv: int, dt_min: float,
        dt_max: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.state_size, self.n_groups = expand * d_model, state_size, n_groups
        self.n_heads = self.width // head_dim
        shared = n_groups * state_size
        self.inner = (self.width, shared, shared, shared, shared)  # x, B and C ahead, B and C back
        self.sizes = (self.width, sum(self.inner), 2 * self.n_heads)
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv1d = ShortConvolution(sum(self.inner), d_conv, bias=True)
        dt = initial_log_dt(self.n_heads, dt_min, dt_max).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.zeros(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.fc_D = nn.Linear(self.width, self.n_heads, bias=False)
        self.norm = RMSNorm(self.width, eps=1e-5)
        self.out_proj = nn.Linear(self.width, d_model, bias=False)

    def _convolve(self, xBC: Tensor) -> Tensor:
        """Centred: a causal convolution that runs d_conv // 2 tokens further."""
        later = self.conv1d.weight.shape[2] // 2
        return self.conv1d(F.pad(xBC, (0, 0, 0, later)))[:, later:]

    def mix(self, xBC: Tensor, dt: Tensor, mask: Tensor) -> Tensor:
        """y of the equations: (B, L, E + 4 G N), (B, L, 2 H) -> (B, L, E)."""
        x, B, C, B_back, C_back = self._convolve(xBC).split(self.inner, dim=-1)
        ahead, back = torch.cat([x, B, C], dim=-1), torch.cat([x, B_back, C_back], dim=-1)
        dt_ahead, dt_back = dt.chunk(2, dim=-1)
        both, steps = torch.cat([ahead, flip(back, mask)]), torch.cat([dt_ahead, flip(dt_back, mask)])
        u, B, C = both.split(self.inner[:3], dim=-1)
        s = ssd(
            u.unflatten(-1, (self.n_heads, -1)), F.softplus(wide(steps) + self.dt_bias), -self.A_log.exp(),
            B.unflatten(-1, (self.n_groups, -1)), C.unflatten(-1, (self.n_groups, -1)), CHUNK,
        )  # fmt: skip
        assert isinstance(s, Tensor)
        s_ahead, s_back = F.pad(s.flatten(-2), (0, 0, 1, 0))[:, :-1].unflatten(0, (2, -1))
        diagonal = (wide(self.fc_D(x)) + self.D).unsqueeze(-1) * x.unflatten(-1, (self.n_heads, -1))
        return s_ahead + flip(s_back, mask) + diagonal.flatten(-2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z, xBC, dt = self.in_proj(x).split(self.sizes, dim=-1)
        return self.out_proj(self.norm(wide(self.mix(xBC, dt, mask))) * F.silu(z))

    def cost(self, length: int) -> Cost:
        d_model, taps, head_dim = self.in_proj.in_features, self.conv1d.weight.shape[2], self.width // self.n_heads
        maps = (
            Cost.linear(length, d_model, sum(self.sizes), bias=False)
            + Cost.linear(length, self.width, self.n_heads, bias=False)
            + Cost.linear(length, self.width, d_model, bias=False)
        )
        scan = 8.0 * self.n_heads * (CHUNK * (self.state_size + head_dim) / 2 + self.state_size * head_dim)
        return maps + Cost(other=length * (scan + sum(self.inner) * (2.0 * taps + 6) + 24.0 * self.width))


class Hydra(Stack):
    """state_size: N. head_dim: P, which divides expand * d_model. n_groups: G, which divides the number of heads.
    d_conv: taps of the convolution, odd. dt_min, dt_max: range of the initial step sizes."""

    card = Card(
        title="Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers",
        year=2024,
        url="https://arxiv.org/abs/2407.09941",
        scaling="L",
        causal=False,
    )
    refuses_causal = True
    block = Block(ffn="none", norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        state_size: int = 64,
        head_dim: int | None = None,
        n_groups: int = 1,
        expand: int = 2,
        d_conv: int = 7,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        **stack: Any,
    ) -> None:
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; bidirectional, Hydra's matrix reads both ways")
        at_least(1, state_size=state_size, expand=expand)
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv is {d_conv}; an odd number, the convolution is centred")
        width = expand * d_model
        share = math.gcd(64, width) if head_dim is None else head_dim
        if share < 1 or width % share:
            raise ValueError(f"head_dim is {share}; a divisor of expand * d_model, {width}")
        if n_groups < 1 or width // share % n_groups:
            raise ValueError(f"n_groups is {n_groups}; a divisor of the number of heads, {width // share}")
        super().__init__(
            lambda _: HydraMixer(
                d_model, state_size=state_size, head_dim=share, n_groups=n_groups, expand=expand, d_conv=d_conv,
                dt_min=dt_min, dt_max=dt_max,
            ),
            native=True, d_model=d_model, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "D", "dt_bias")
