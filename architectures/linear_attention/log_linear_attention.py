"""Log-linear attention: Mamba-2 with one state for every power of two of the past, weighted depending on the input.

Guo, Yang, Goel, Xing, Dao and Kim 2025, arXiv:2506.04761, in its Mamba-2 form. With E = expand D split into H heads of
width P, state size N, and levels l = 0 .. ceil(log2 length):

    z, (x, B, C), dt, dl = split(W_in x)                   (B, L, E), (B, L, E + 2 N), (B, L, H), (B, L, H, levels)
    x, B, C = silu(conv(x, B, C))                          depthwise, causal, over d_conv tokens
    dt = softplus(dt + b_dt),   g = -exp(A_log) dt         (B, L, H)
    lambda = softplus(dl * ell)                            (B, L, H, levels)   ell: (H, levels)
    y_t = sum over s <= t of lambda_t^(level(t, s)) exp(g_{s+1} + .. + g_t) (C_t . B_s) dt_s x_s + d x_t
    out = W_out norm(y silu(z))                            (B, L, D)           RMS over all E features

level(t, s) is the place of the highest bit in which t and s differ, 0 for t = s: level l >= 1 holds the 2^(l - 1)
tokens that bit l - 1 of t splits off (a Fenwick tree), so that the past is finer the nearer it is. In chunks of 64, the
levels inside a chunk are a mask on its scores; each level above is one product of queries with the states of blocks,
and block states double from level to level: L log L work. A recurrent step keeps one state a level, log L of them.

Initialisation: exp(A_log) uniform in (0, 16] and b_dt as in Mamba-2; ell = d = 1; the rest PyTorch's own. A_log, ell, d
and b_dt learn without weight decay.

Departures: none known in the mixer. The released layer has levels for 16,384 tokens, here for `length`, and exp(A_log)
= 1, 2, .., H. N is 64 unless told, P the largest power of two up to 64 that divides E. A block is the mixer alone, with
RMS norm, as Mamba-2's.

Checked against: tensors of flash-linear-attention's definition and of the authors' mask, with every gradient; the layer
written out as that sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._delta import mamba_decay
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention.chunks import chunk_size

State = tuple[Tensor, Tensor, Tensor]
CHUNK = 64


def number_of_levels(length: int) -> int:
    return (length - 1).bit_length() + 1


def levels_inside(size: int, device: torch.device) -> Tensor:
    """level(t, s): (size, size) int64; without meaning above the diagonal."""
    t = torch.arange(size, device=device)
    return torch.frexp((t.unsqueeze(1) ^ t).double()).exponent.long()


def log_linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scales: Tensor) -> Tensor:
    """sum over s <= t of scales_t^(level(t, s)) exp(log_decay_{s+1} + .. + log_decay_t) (q_t . k_s) v_s.

    q, k: (B, L, H, K); v: (B, L, H, V); log_decay: (B, L, H); scales: (B, L, H, levels) -> (B, L, H, V), in float32 or
    float64.
    """
    length, size = q.shape[1], chunk_size(CHUNK, q.shape[1])

    def cut(x: Tensor) -> Tensor:
        x = F.pad(wide(x), (0, 0, 0, 0, 0, -length % size))
        return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, scales, log_decay = (cut(x) for x in (q, k, v, scales, log_decay.unsqueeze(-1)))
        total = log_decay.squeeze(-1).double().cumsum(-1)  # differences of float32 sums would lose digits
        ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        decays = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(ahead, -torch.inf).exp().to(q.dtype)
        weights = scales.gather(-1, levels_inside(size, q.device).expand(*scales.shape[:-1], size))
        o = ((q @ k.mT) * decays * weights) @ v
        if q.shape[2] > 1:
            o = o + _across(q, k, v, total, scales[..., size.bit_length() :])
        return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def _across(q: Tensor, k: Tensor, v: Tensor, total: Tensor, scales: Tensor) -> Tensor:
    """What the n chunks give each other: q, k: (B, H, n, C, K); v: (B, H, n, C, V); total: (B, H, n, C), running sums
    of log decays inside a chunk; scales: (B, H, n, C, levels above a chunk) -> (B, H, n, C, V)."""
    chunks, last = q.shape[2], total[..., -1:]
    outer = (chunks - 1).bit_length()
    spare = (1 << outer) - chunks
    blocks = F.pad((k * (last - total).exp().unsqueeze(-1).to(k.dtype)).mT @ v, (0, 0, 0, 0, 0, spare))
    queries = F.pad(q * total.exp().unsqueeze(-1).to(q.dtype), (0, 0, 0, 0, 0, spare))
    scales, sums = F.pad(scales, (0, 0, 0, 0, 0, spare)), F.pad(last.squeeze(-1), (0, spare))
    block_sums, o = sums, torch.zeros((), dtype=v.dtype, device=v.device)
    for level in range(outer):
        half = 1 << level
        early, late = blocks.unflatten(2, (-1, 2)).unbind(3)
        reading = queries.unflatten(2, (-1, 2, half)).select(3, 1)  # the second half of each pair of blocks
        between = sums.unflatten(2, (-1, 2, half)).select(3, 1)
        between = (between.cumsum(-1) - between).exp().to(v.dtype)  # from its start to each of its chunks
        weight = scales[..., level].unflatten(2, (-1, 2, half)).select(3, 1) * between.unsqueeze(-1)
        read = (reading.flatten(3, 4) @ early).unflatten(3, (half, -1)) * weight.unsqueeze(-1)
        o = o + torch.stack([torch.zeros_like(read), read], 3).flatten(2, 4)
        _, late_sums = (pairs := block_sums.unflatten(2, (-1, 2))).unbind(3)
        blocks = early * late_sums.exp()[..., None, None].to(v.dtype) + late
        block_sums = pairs.sum(3)
    return o[:, :, :chunks]


class LogLinearMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, *, state_size: int, head_dim: int, expand: int, d_conv: int, length: int) -> None:
        super().__init__()
        self.width, self.state_size, self.levels = expand * d_model, state_size, number_of_levels(length)
        self.n_heads, self.length = self.width // head_dim, length
        self.inner = (self.width, state_size, state_size)  # x, B, C
        self.sizes = (self.width, sum(self.inner), self.n_heads, self.n_heads * self.levels)  # z, (x, B, C), dt, dl
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv1d = ShortConvolution(sum(self.inner), d_conv)
        self.A_log, self.dt_bias = mamba_decay(self.n_heads, self.n_heads)
        self.L = nn.Parameter(torch.ones(self.n_heads, self.levels))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(self.width, eps=1e-5)
        self.out_proj = nn.Linear(self.width, d_model, bias=False)

    def _terms(self, xBC: Tensor, dt: Tensor, dl: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of one or all tokens: C and B (..., H, N), dt x (..., H, P), log decays (..., H), lambda (..., H, levels) and
        x (..., H, P)."""
        x, B, C = xBC.split(self.inner, dim=-1)
        x = x.unflatten(-1, (self.n_heads, -1))
        B, C = (t.unsqueeze(-2).expand(*t.shape[:-1], self.n_heads, -1) for t in (B, C))
        dt = F.softplus(wide(dt) + self.dt_bias)
        scales = F.softplus(wide(dl).unflatten(-1, (self.n_heads, -1)) * self.L)
        return C, B, dt.unsqueeze(-1) * x, -self.A_log.exp() * dt, scales, x

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm and output map: y, x: (..., H, P), z: (..., E) -> (..., D)."""
        y = (y + self.D.unsqueeze(-1) * x).flatten(-2)
        return self.out_proj(self.norm(wide(y * F.silu(z))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            raise ValueError(f"length {x.shape[1]} exceeds the {self.length} tokens that this encoder has levels for")
        z, xBC, dt, dl = self.in_proj(x).split(self.sizes, dim=-1)
        *terms, values = self._terms(self.conv1d(xBC), dt, dl)
        return self._finish(log_linear(*terms), values, z)

    def cost(self, length: int) -> Cost:
        d_model, head, size = self.in_proj.in_features, self.width // self.n_heads, chunk_size(CHUNK, length)
        maps = Cost.linear(length, d_model, sum(self.sizes), False) + Cost.linear(length, self.width, d_model, False)
        chunks = -(-length // size)
        outer = (chunks - 1).bit_length()
        products = 2.0 * chunks * size * size * (self.state_size + head)
        if outer:
            products += size * self.state_size * head * (2.0 * chunks + outer * (1 << outer))
        return maps + self.conv1d.cost(length) + Cost(self.n_heads * products, 16.0 * length * self.width)

    def init_state(self, batch: int) -> State:
        states = wide(self.D.new_zeros(batch, self.n_heads, self.levels, self.state_size, self.width // self.n_heads))
        return torch.zeros((), dtype=torch.int64, device=self.D.device), self.conv1d.init_state(batch), states

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the time t, the last d_conv - 1 inputs of the convolution, and one state a level (B, H, levels, N, P).

        After token t all levels below the lowest bit that t + 1 has set become one block, that bit's.
        """
        time, window, states = state
        z, xBC, dt, dl = self.in_proj(x).split(self.sizes, dim=-1)
        xBC, window = self.conv1d.step(xBC, window)
        q, k, v, log_decay, scales, values = self._terms(xBC, dt, dl)
        states = log_decay.exp()[..., None, None, None] * states
        states = torch.cat([(k.unsqueeze(-1) * v.unsqueeze(-2)).unsqueeze(2), states[:, :, 1:]], 2)
        y = torch.einsum("bhl,bhlkv,bhk->bhv", scales, states, q)
        after = int(time) + 1
        level = (after & -after).bit_length()
        if level < self.levels:
            merged = states[:, :, :level].sum(2, keepdim=True)
            states = torch.cat([torch.zeros_like(states[:, :, :level]), merged, states[:, :, level + 1 :]], 2)
        return self._finish(y, values, z), (time + 1, window, states)


class LogLinearAttention(Stack):
    """state_size: N. head_dim: P, which divides expand * d_model. d_conv: taps of the convolution."""

    card = Card(
        title="Log-Linear Attention",
        year=2025,
        url="https://arxiv.org/abs/2506.04761",
        scaling="L log L",
        causal=True,
        exempt={
            "exports": "the chunks follow the length",
        },
    )
    block = Block(ffn="none", norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        state_size: int = 64,
        head_dim: int | None = None,
        expand: int = 2,
        d_conv: int = 4,
        **stack: Any,
    ) -> None:
        at_least(1, state_size=state_size, expand=expand, d_conv=d_conv)
        width = expand * d_model
        share = math.gcd(64, width) if head_dim is None else head_dim
        if share < 1 or width % share:
            raise ValueError(f"head_dim is {share}; a divisor of expand * d_model, {width}")
        super().__init__(
            lambda _: LogLinearMixer(
                d_model, state_size=state_size, head_dim=share, expand=expand, d_conv=d_conv, length=length,
            ),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "L", "D", "dt_bias")
