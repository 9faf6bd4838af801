"""Mega: one gated head of attention whose queries and keys are smoothed by moving averages.

Ma et al. 2022, arXiv:2209.10655. N averages a channel, Z query features, E value features; xn = norm(x), or x where the
norm comes after. Per layer:

    q = 1 - p a,  p = sigmoid(delta), a = sigmoid(alpha)      (D, N)       damping of each average
    s_t = q s_{t-1} + p beta xn_t                             (B, L, D, N)
    m = silu(sum_n gamma_n s_n / sqrt(N) + omega xn)          (B, L, D)
    u, z, r, c = split(mx_proj m)                             D, Z, E, D   u = sigmoid(u), z = silu(z), r = silu(r)
    Q = k_0 z + m_0,  K = k_1 z + m_1,  V = silu(v_proj xn)                (B, L, Z), (B, L, E)    k: gamma, m: beta
    A = softmax(Q K' / sqrt(Z) + bias), or laplace(Q K' / n + bias), n the keys a query sees
    h = silu(c + h_proj (r * A V))                            (B, L, D)
    y = x + u (h - x)                                         (B, L, D)

laplace(s) = (1 + erf((s - 0.707107) / (0.282095 sqrt 2))) / 2, element by element. bias_ij: "simple", one number for
each j - i, or "rotary", (R_i a) . (R_j b) with rotations R. chunk: attention within blocks of so many tokens; the
averages run over all. Bidirectional: averages both ways, each with the current token, and attention to all.

Initialisation, the authors': linear maps and k normal of deviation 0.02, their biases and m 0; alpha, delta normal of
0.2; beta (1, -1, 1, ...) and normal noise of 0.02; gamma, omega standard normal; the positions' bias normal of 0.02.

Departures: dropout where the suite's block has it, on u (h - x); theirs is on m, V, A and h.

Checked against: tensors of the authors' MultiHeadEMA (both directions, every gradient), MovingAverageGatedAttention
(causal, softmax and laplace, both biases) and MegaSentenceEncoderLayer (before and after each part; layer, batch and
scale norm; chunks, padding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import rope
from lra.architectures._checks import at_least, one_of
from lra.architectures._norm import normalised
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.attention import attention_mask
from lra.encoder import Card, Cost, Mixer, fill_padding
from lra.kernels.fft_conv import fft_conv
from lra.kernels.ssm_kernel_diag import ssm_kernel_diag

ATTENTIONS = ("softmax", "laplace")
BIASES = ("simple", "rotary")
MEAN, DEVIATION = 0.707107, 0.282095
State = tuple[Tensor, Tensor, Tensor]


class MovingAverages(nn.Module):
    """m of the equations: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, averages: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        rows = (1 if causal else 2) * d_model  # ahead after behind
        self.alpha = nn.Parameter(torch.randn(rows, averages) * 0.2)
        self.delta = nn.Parameter(torch.randn(rows, averages) * 0.2)
        self.beta = nn.Parameter(torch.randn(rows, averages) * 0.02 + 1 - 2.0 * (torch.arange(averages) % 2))
        self.gamma = nn.Parameter(torch.randn(rows, averages))
        self.omega = nn.Parameter(torch.randn(d_model))

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """log q, p beta and gamma / sqrt(N): each (rows, N)."""
        p = wide(self.delta).sigmoid()
        leave = wide(self.gamma) * self.gamma.shape[1] ** -0.5
        return torch.log1p(-p * wide(self.alpha).sigmoid()), p * self.beta, leave

    def kernel(self, length: int) -> Tensor:
        """(rows, length), the current token first."""
        log_q, p_beta, gamma = self._coefficients()
        pairs = (torch.complex(t, torch.zeros_like(t)) for t in (log_q, p_beta * gamma / 2))
        A, C = pairs  # halved: that operator sums over conjugate pairs
        return ssm_kernel_diag(A, C.unsqueeze(0), torch.ones_like(log_q[:, 0]), length, "none")[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.causal:
            return F.silu(fft_conv(x, self.kernel(x.shape[1]), self.omega))
        behind, ahead = self.kernel(x.shape[1] + 1).chunk(2)
        # the operator's second kernel leaves the current token out
        kernels = torch.stack([behind[:, :-1], ahead[:, 1:]])
        return F.silu(fft_conv(x, kernels, self.omega + ahead[:, 0], bidirectional=True))

    def cost(self, length: int) -> Cost:
        rows, averages = self.gamma.shape
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        kernel = rows * (4.0 * averages * length + transform)
        return Cost(other=2 * len(self.omega) * transform, batch_other=kernel)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: s (B, D, N)."""
        log_q, p_beta, gamma = self._coefficients()
        state = log_q.exp() * state + p_beta * x.unsqueeze(-1)
        return F.silu((state * gamma).sum(-1) + self.omega * x), state


class MegaMixer(Mixer):
    """u (h - x): (B, L, D) -> (B, L, D). norm: of xn. positions: the longest distance that the simple bias knows."""

    def __init__(
        self, d_model: int, *, positions: int, norm: nn.Module, z_dim: int, value_dim: int, averages: int,
        attention: str, bias: str, chunk: int | None, causal: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention, self.chunk_size, self.causal = attention, chunk, causal
        self.sizes = [d_model, z_dim, value_dim, d_model]
        self.norm = norm
        self.move = MovingAverages(d_model, averages, causal)
        self.v_proj = nn.Linear(d_model, value_dim)
        self.mx_proj = nn.Linear(d_model, sum(self.sizes))  # rows: u, z, r, c
        self.gamma = nn.Parameter(torch.randn(2, z_dim) * 0.02)
        self.beta = nn.Parameter(torch.zeros(2, z_dim))
        self.rel_pos_bias = nn.Parameter(torch.randn(2 * positions - 1) * 0.02) if bias == "simple" else None
        self.angles = nn.Parameter(torch.randn(2, z_dim) * 0.02) if bias == "rotary" else None
        self.h_proj = nn.Linear(value_dim, d_model)
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def bias(self, length: int) -> Tensor:
        """(length, length): row i, column j."""
        if self.angles is not None:
            a, b = (rope(part.expand(length, -1)) for part in self.angles)
            return a @ b.mT
        assert self.rel_pos_bias is not None
        middle = len(self.rel_pos_bias) // 2
        if length > middle + 1:
            raise ValueError(f"length {length} exceeds the {middle + 1} positions this Mega has")
        return self.rel_pos_bias[middle + 1 - length : middle + length].unfold(0, length, 1).flip(0)

    def _weights(self, q: Tensor, k: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
        """(..., i, Z), (..., j, Z), (..., i or 1, j) bool, (i, j) -> (..., i, j)."""
        if self.attention == "softmax":
            s = (q * q.shape[-1] ** -0.5) @ k.mT + bias
            return wide(s).masked_fill(~allowed, -torch.inf).softmax(dim=-1).to(s.dtype)
        seen = allowed.sum(dim=-1, keepdim=True)
        s = wide(q @ k.mT) / seen + bias
        weights = (1 + torch.erf((s - MEAN) / (DEVIATION * math.sqrt(2)))) / 2
        return weights.masked_fill(~allowed, 0).to(q.dtype)

    def _views(self, m: Tensor) -> tuple[Tensor, ...]:
        """u, Q, K, r, c of the equations, each (..., features)."""
        u, z, r, c = self.mx_proj(m).split(self.sizes, dim=-1)
        q, k = (F.silu(z).unsqueeze(-2) * self.gamma + self.beta).unbind(-2)
        return torch.sigmoid(u), q, k, F.silu(r), c

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        xn = fill_padding(normalised(self.norm, x, mask), mask)
        u, q, k, r, c = self._views(self.move(xn))
        block = length if self.chunk_size is None else min(self.chunk_size, length)
        spare = -length % block
        q, k, v = (F.pad(t, (0, 0, 0, spare)).unflatten(1, (-1, block)) for t in (q, k, F.silu(self.v_proj(xn))))
        keys = F.pad(mask, (0, spare)).view(-1, block)
        # one "head": (B chunks, 1, 1 or block, block); a chunk of padding sees something, which nobody reads
        allowed = attention_mask(keys | ~keys.any(dim=1, keepdim=True), causal=self.causal)
        weights = self._weights(q, k, allowed[:, 0].unflatten(0, (x.shape[0], -1)), self.bias(block))
        read = (weights @ v).flatten(1, 2)[:, :length]
        return u * (F.silu(c + self.h_proj(r * read)) - x)

    def cost(self, length: int) -> Cost:
        width, z_dim, value_dim, _ = self.sizes
        block = length if self.chunk_size is None else min(self.chunk_size, length)
        chunks = -(-length // block)
        maps = Cost.linear(length, width, value_dim) + Cost.linear(length, width, sum(self.sizes))
        maps = maps + Cost.linear(length, value_dim, width) + self.move.cost(length)
        turned = 2.0 * block**2 * z_dim if self.angles is not None else 0.0
        attention = Cost(2.0 * chunks * block**2 * (z_dim + value_dim), 8.0 * chunks * block**2, turned)
        return maps + attention + Cost(other=length * (20.0 * width + 8.0 * (z_dim + value_dim)))

    def init_state(self, batch: int) -> State:
        _, z_dim, value_dim, _ = self.sizes
        zeros = self.gamma.new_zeros
        return zeros(batch, *self.move.gamma.shape), zeros(batch, 0, z_dim), zeros(batch, 0, value_dim)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: s (B, D, N), keys and values of the chunk so far, (B, t, Z) and (B, t, E)."""
        s, keys, values = state
        xn = self.norm(x)
        m, s = self.move.step(xn, s)
        u, q, k, r, c = self._views(m)
        if keys.shape[1] == self.chunk_size:
            keys, values = keys[:, :0], values[:, :0]
        keys = torch.cat([keys, k.unsqueeze(1)], dim=1)
        values = torch.cat([values, F.silu(self.v_proj(xn)).unsqueeze(1)], dim=1)
        seen = keys.shape[1]
        allowed = torch.ones(1, seen, dtype=torch.bool, device=x.device)
        weights = self._weights(q.unsqueeze(1), keys, allowed, self.bias(seen)[-1:])
        return u * (F.silu(c + self.h_proj(r * (weights @ values).squeeze(1))) - x), (s, keys, values)


class Mega(Stack):
    """z_dim: Z. value_dim: E, twice d_model unless given. averages: N. attention: of ATTENTIONS. bias: of BIASES.
    chunk: tokens that attend to one another, all unless given."""

    card = Card(
        title="Mega: Moving Average Equipped Gated Attention",
        year=2022,
        url="https://arxiv.org/abs/2209.10655",
        scaling="L^2",
        causal=True,
        variants={"laplace": {"attention": "laplace"}, "rotary": {"bias": "rotary"}, "chunk": {"chunk": 128}},
        exempt={
            "exports": "the chunks and their biases follow the length",
        },
    )
    block = Block(ffn="silu", expand=2.0)

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        direction: str = "causal",
        z_dim: int = 64,
        value_dim: int | None = None,
        averages: int = 16,
        attention: str = "softmax",
        bias: str = "simple",
        chunk: int | None = None,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        one_of(ATTENTIONS, attention=attention)
        one_of(BIASES, bias=bias)
        at_least(1, z_dim=z_dim, averages=averages, chunk=chunk, value_dim=value_dim)
        if bias == "rotary" and z_dim % 2:
            raise ValueError(f"z_dim is {z_dim}; even, as rotary positions turn pairs of features")
        self.chunk_size = chunk
        shape = type(self).block.updated(block)

        def mixer(_: int) -> MegaMixer:
            norm = shape.make_norm(d_model) if shape.prenorm else nn.Identity()
            return MegaMixer(
                d_model, positions=length if chunk is None else chunk, norm=norm, z_dim=z_dim,
                value_dim=value_dim or 2 * d_model, averages=averages, attention=attention, bias=bias, chunk=chunk,
                causal=direction == "causal",
            )  # fmt: skip

        super().__init__(mixer, native=True, d_model=d_model, length=length, direction=direction, block=block, **stack)
        for layer in self.blocks if shape.prenorm else ():
            layer.norm = nn.Identity()  # the gated residual needs x as it is: the mixer has the norm
        for name, parameter in self.named_parameters():
            if ".ffn." in name:
                nn.init.normal_(parameter, std=0.02 if parameter.ndim == 2 else 0.0)

    @property
    def scaling(self) -> str:
        return "L^2" if self.chunk_size is None else "L log L"
