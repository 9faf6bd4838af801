"""Mamba-3: the scan of Mamba-2 with a trapezoidal rule and a state that is rotated by angles from the input.

Lahoti, Li, Chen, Wang, Bick, Kolter, Dao and Gu 2026, arXiv:2603.15569, one input and one output a head. E = expand D,
H = E / P heads of P channels, N the state size, G groups of heads that share B and C before their biases:

    z, x, B, C, dd_dt, dd_A, trap, angle = split(in_proj u)    (B, L, ...)   E, E, G N, G N, H, H, H, S = N rope / 2
    dt = softplus(dd_dt + dt_bias),  A = -max(f(dd_A), 1e-4),  lambda = sigmoid(trap)              (B, L, H) each
    f(v) = 1 + v for v >= 0, 1 / (1 - v) below
    B, C = rms norm over N with a gain, plus a bias for each head                                  (B, L, H, N)
    theta_t = theta_{t-1} + pi tanh(angle_t) dt_t                                                  (B, L, H, S)
    B_t, C_t turned by theta_t: features 2s and 2s + 1 by the s-th angle, the first 2 S of N
    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t x_{t-1} B_{t-1}^T + lambda_t dt_t x_t B_t^T,  a_t = exp(dt_t A_t)
    o_t = (S_t C_t + D x_t) silu(z_t),  out = out_proj o                                           (B, L, D)

lambda = 1 is Mamba-2's rule, 1/2 the trapezoid. A turn by pi is a sign: so the state can count modulo 2, where a real
decay cannot.

S is two scans of one decay: with w_t = (1 - lambda_{t+1}) dt_{t+1}, which is 0 for the last token, the part before the
current token is a scan of x_s B_s weighed with lambda_s dt_s + w_s, of which w_t x_t B_t has not arrived at t. Together
that is one call of `decay_attention` and a product of C_t with B_t.

Initialisation, as released: dt at x = 0 uniform in the logarithm between dt_min and dt_max, at least 1e-4; biases of B
and C, gains and D 1; the rest PyTorch's own. dt_bias and D learn without weight decay.

Departures: the released code turns the state by minus theta against the paper's proposition 3; as there. Its form with
several inputs a head (MIMO), the norm before out_proj, off by default, and a later change of f to softplus are left
out. The paper's blocks alternate with SwiGLU parts; here `block` says what follows, by default nothing, as in Mamba-2.

Checked against: tensors of the authors' Mamba3 with its kernel replaced by their references: dt, dt A, the sequence
inside, last state, output, gradients of x and of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

CHUNK = 64
SLOWEST = 1e-4
"""Smallest -A."""
State = tuple[Tensor, Tensor, Tensor, Tensor]


class Mamba3Mixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, state_size: int, head_dim: int, n_groups: int, expand: int, angles: int, dt_min: float,
        dt_max: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.n_groups, self.angles = expand * d_model, n_groups, angles
        self.n_heads = self.width // head_dim
        shared = n_groups * state_size
        self.sizes = (self.width, self.width, shared, shared, self.n_heads, self.n_heads, self.n_heads, angles)
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        dt = initial_log_dt(self.n_heads, dt_min, dt_max).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.B_bias = nn.Parameter(torch.ones(self.n_heads, state_size))
        self.C_bias = nn.Parameter(torch.ones(self.n_heads, state_size))
        self.B_norm = RMSNorm(state_size, eps=1e-5)
        self.C_norm = RMSNorm(state_size, eps=1e-5)
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.out_proj = nn.Linear(self.width, d_model, bias=False)

    def _terms(self, u: Tensor) -> tuple[Tensor, ...]:
        """z, x (..., H, P), B, C (..., H, N) before they turn, dt, dt A, lambda (..., H), turn dt (..., H, S)."""
        z, x, B, C, dd_dt, dd_A, trap, angle = self.in_proj(u).split(self.sizes, dim=-1)
        z, x = (t.unflatten(-1, (self.n_heads, -1)) for t in (z, x))
        share = self.n_heads // self.n_groups
        B, C = (
            norm(wide(t).unflatten(-1, (self.n_groups, -1))).repeat_interleave(share, -2) + bias
            for t, norm, bias in ((B, self.B_norm, self.B_bias), (C, self.C_norm, self.C_bias))
        )
        dt = F.softplus(wide(dd_dt) + self.dt_bias)
        # 1 + v above 0, 1 / (1 - v) below: one of the two parts is 1 on either side
        v = wide(dd_A)
        rate = ((1 + F.relu(v)) / (1 + F.relu(-v))).clamp_min(SLOWEST)
        turn = math.pi * torch.tanh(wide(angle)).unsqueeze(-2) * dt.unsqueeze(-1)
        return z, x, B, C, dt, -dt * rate, torch.sigmoid(wide(trap)), turn

    def _turned(self, t: Tensor, theta: Tensor) -> Tensor:
        """(..., N), its pairs of neighbours turned by theta (..., S), the rest as they are."""
        pairs, rest = t[..., : 2 * self.angles], t[..., 2 * self.angles :]
        a, b = pairs[..., ::2], pairs[..., 1::2]
        cos, sin = theta.cos(), theta.sin()
        return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)

    def _finish(self, o: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(((o + self.D.unsqueeze(-1) * x) * F.silu(z)).flatten(-2))

    def scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, decay: Tensor, trap: Tensor) -> Tensor:
        """S_t C_t: (B, L, H, P) of x, B and C turned, dt, log a and lambda."""
        later = F.pad(((1 - trap) * dt)[:, 1:], (0, 0, 0, 1))
        weight = trap * dt + later
        o = decay_attention(C, B, x * weight.unsqueeze(-1).to(x.dtype), decay, CHUNK, scale=1.0)
        assert isinstance(o, Tensor)
        return o - (later * (B * C).sum(-1)).unsqueeze(-1) * x

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z, v, B, C, dt, decay, trap, turn = self._terms(x)
        # float64: after 16,384 tokens a float32 sum is off by 1e-3 of a turn
        theta = torch.remainder(turn.double().cumsum(1), 2 * math.pi).to(turn.dtype)
        return self._finish(self.scan(v, self._turned(B, theta), self._turned(C, theta), dt, decay, trap), v, z)

    def cost(self, length: int) -> Cost:
        d_model, head_dim, states = self.in_proj.in_features, self.width // self.n_heads, self.B_bias.shape[1]
        maps = Cost.linear(length, d_model, sum(self.sizes), bias=False) + Cost.linear(
            length, self.width, d_model, False
        )
        scan = 4.0 * self.n_heads * (CHUNK * (states + head_dim) / 2 + states * head_dim)
        return maps + Cost(other=length * (scan + 24.0 * self.n_heads * states + 12.0 * self.width))

    def init_state(self, batch: int) -> State:
        zeros, head_dim = self.D.new_zeros, self.width // self.n_heads
        heads, states = self.B_bias.shape
        return (
            zeros(batch, heads, self.angles), zeros(batch, heads, head_dim, states), zeros(batch, heads, head_dim),
            zeros(batch, heads, states),
        )  # fmt: skip

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: theta (B, H, S), S (B, H, P, N), and x (B, H, P) and turned B (B, H, N) of the token before."""
        theta, S, x_before, B_before = state
        z, v, B, C, dt, decay, trap, turn = self._terms(x)
        theta = torch.remainder(theta + turn, 2 * math.pi)
        B, C = self._turned(B, theta), self._turned(C, theta)

        def outer(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return (weight.unsqueeze(-1) * a).unsqueeze(-1) * b.unsqueeze(-2)

        a = decay.exp()
        S = a[..., None, None] * S + outer((1 - trap) * dt * a, x_before, B_before) + outer(trap * dt, v, B)
        return self._finish((S * C.unsqueeze(-2)).sum(-1), v, z), (theta, S, v, B)


class Mamba3(Stack):
    """state_size: N, even. head_dim: P, which divides expand * d_model. n_groups: G, which divides the number of heads.
    rope: share of the state that turns. dt_min, dt_max: range of the initial step sizes."""

    card = Card(
        title="Mamba-3: Improved Sequence Modeling using State Space Principles",
        year=2026,
        url="https://arxiv.org/abs/2603.15569",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="none", norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        state_size: int = 64,
        head_dim: int | None = None,
        n_groups: int = 1,
        expand: int = 2,
        rope: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        **stack: Any,
    ) -> None:
        if expand < 1:
            raise ValueError(f"expand is {expand}; at least 1")
        if not 0 < rope <= 1:
            raise ValueError(f"rope is {rope}; above 0 and at most 1, a share of the state")
        angles = int(state_size * rope) // 2
        if angles < 1:
            raise ValueError(f"state_size is {state_size}; large enough that a share of {rope} holds a pair")
        width = expand * d_model
        share = math.gcd(64, width) if head_dim is None else head_dim
        if share < 1 or width % share:
            raise ValueError(f"head_dim is {share}; a divisor of expand * d_model, {width}")
        if n_groups < 1 or width // share % n_groups:
            raise ValueError(f"n_groups is {n_groups}; a divisor of the number of heads, {width // share}")
        super().__init__(
            lambda _: Mamba3Mixer(
                d_model, state_size=state_size, head_dim=share, n_groups=n_groups, expand=expand, angles=angles,
                dt_min=dt_min, dt_max=dt_max,
            ),
            d_model=d_model, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "dt_bias", "D")
