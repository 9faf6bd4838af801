"""Megalodon: Mega with complex moving averages, a norm over all tokens so far, and normalised attention within chunks.

Ma, Yang, Xiong, Chen, Yu, Zhang, May, Zettlemoyer, Levy and Zhou 2024, arXiv:2404.08801. N averages a channel, G groups
of channels for the norm, Z query features and E value features in H heads. Per layer, with hat(w) = 1 + w:

    mu_t, var_t: of the channels of a group and of all tokens up to t together
    n = hat(timenorm.weight) (x - mu) / sqrt(var + eps) + timenorm.bias         (B, L, D)      section 3.2
    q_n = (1 - p_n d_n) e^(i n theta),  p = sigmoid(alpha),  d = sigmoid(delta),  theta = 2 pi sigmoid(theta) / N
    h_t = q h_{t-1} + p n_t,  c_t = Re sum_n gamma_n h_t / sqrt(N) + omega n_t  (B, L, D, N)   section 3.1
    m = hat(rmsnorm.weight) c / rms(c)                                          (B, L, D)
    z = W_z m + b_z, over its rms in each head                                  (B, L, Z)      section 3.3
    Q, K = z hat(gamma_i) / sqrt(Z / H) + beta_i,  i = 1, 2;  V = silu(W_v n + b_v)
    a = softmax(R Q (R K)') V, causal, within chunks of C tokens; R turns neighbouring features by place
    y = x + W_h1 m + b_h1 + W_h2 (a * silu(W_r m + b_r))                        (B, L, D)
    out = x + fc2(silu(fc1 l) * fc3 l),  l = layernorm(y)                       two-hop residual, section 3.4

Initialisation, as released: alpha, delta normal of 0.2; theta such that sigmoid(theta) = D^(-j / D), j = 1 .. D, in a
drawn order; gamma real standard normal; omega normal of 0.25; weights of the norms, gamma_i and beta_i 0; linear maps
of variance 1 / (3 fan-in), which is PyTorch's own.

Departures: the paper's equation 2 turns the input of the averages by e^(i theta) too; as in the released code, it does
not here. Dropout where the suite's block has it. A layer norm follows the last layer. The released code has no
bidirectional form, so that the wrapper gives it one.

Checked against: tensors of the authors' MovingAverageGatedAttention with their own timestep norm (two chunks and
more): norm, averages, attention, output, gradients of x and of every parameter; tensors of a second implementation of
the averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import rope
from lra.architectures._checks import at_least
from lra.architectures._dropout import Dropout
from lra.architectures._norm import LayerNorm, rms_norm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.attention import merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv
from lra.kernels.ssm_kernel_diag import ssm_kernel_diag

EPS = 1e-5
Sums = tuple[Tensor, Tensor, Tensor]
State = tuple[Sums, Tensor, Tensor, Tensor]


class TimestepNorm(nn.Module):
    """n of the equations: (B, L, D) -> (B, L, D). Sums over time are in double precision."""

    def __init__(self, d_model: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def start(self, batch: int) -> Sums:
        """Tokens so far (B, 1), and the sums of means and of mean squares of each group (B, G)."""
        zeros = torch.zeros(batch, self.groups, dtype=torch.float64, device=self.weight.device)
        return zeros[:, :1], zeros, zeros

    def forward(self, x: Tensor, sums: Sums | None = None) -> tuple[Tensor, Sums]:
        """Also the sums after the last token."""
        count, first, second = self.start(x.shape[0]) if sums is None else sums
        channels = x.double().unflatten(-1, (self.groups, -1))  # (B, L, G, D / G)
        tokens = torch.arange(1, x.shape[1] + 1, dtype=torch.float64, device=x.device)
        count = count.unsqueeze(1) + tokens.unsqueeze(-1)
        first = first.unsqueeze(1) + channels.mean(-1).cumsum(1)
        second = second.unsqueeze(1) + channels.square().mean(-1).cumsum(1)
        mean = first / count
        variance = (second / count - mean.square()).clamp_min(0)
        n = ((channels - mean.unsqueeze(-1)) * torch.rsqrt(variance + EPS).unsqueeze(-1)).flatten(-2)
        n = n.to(wide(x).dtype) * (1 + self.weight) + self.bias
        return n, (count[:, -1], first[:, -1], second[:, -1])


class ComplexEMA(nn.Module):
    """c of the equations: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, averages: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(d_model, averages, 1) * 0.2)
        self.delta = nn.Parameter(torch.randn(d_model, averages, 1) * 0.2)
        share = torch.exp(-torch.arange(1, d_model + 1) * (math.log(d_model) / d_model))[torch.randperm(d_model)]
        self.theta = nn.Parameter(torch.logit(share).view(-1, 1, 1))
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.gamma = nn.Parameter(F.pad(torch.randn(d_model, averages, 1), (0, 1)))
        self.omega = nn.Parameter(nn.init.trunc_normal_(torch.empty(d_model, 1), std=0.25, a=-1.0, b=1.0))

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """log q, and p gamma / sqrt(N): (D, N) complex each."""
        averages = self.gamma.shape[1]
        p = torch.sigmoid(wide(self.alpha).squeeze(-1))
        size = torch.log1p(-p * torch.sigmoid(wide(self.delta).squeeze(-1)))
        n = torch.arange(1, averages + 1, device=p.device, dtype=p.dtype)
        angle = n * torch.sigmoid(wide(self.theta).squeeze(-1)) * (2 * math.pi / averages)
        return torch.complex(size, angle), p * torch.view_as_complex(wide(self.gamma)) * averages**-0.5

    def kernel(self, length: int) -> Tensor:
        """(D, length), the current token first."""
        decay, weight = self._coefficients()
        # halved: that operator sums over conjugate pairs
        return ssm_kernel_diag(decay, weight.unsqueeze(0) / 2, torch.ones_like(self.omega[:, 0]), length, "none")[0]

    def forward(self, x: Tensor) -> Tensor:
        return fft_conv(x, self.kernel(x.shape[1]), self.omega.squeeze(-1))

    def cost(self, length: int) -> Cost:
        width, averages, _ = self.gamma.shape
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        return Cost(other=width * (4.0 * averages * length + 3 * transform + 6.0 * length))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h / p, (B, D, N) complex. In double precision: rounding q would grow with time."""
        decay, weight = self._coefficients()
        after = (decay.to(torch.complex128).exp() * state + x.unsqueeze(-1)).to(state.dtype)
        return (weight * after).sum(-1).real + self.omega.squeeze(-1) * x, after


class MegalodonMixer(Mixer):
    """out - x: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, z_dim: int, value_dim: int, n_heads: int, averages: int, chunk: int, groups: int,
        hidden: int, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.chunk_size = n_heads, chunk
        self.timenorm = TimestepNorm(d_model, groups)
        self.cema = ComplexEMA(d_model, averages)
        self.rmsnorm_weight = nn.Parameter(torch.zeros(d_model))
        self.wv = nn.Linear(d_model, value_dim)
        self.wz = nn.Linear(d_model, z_dim)
        self.wr = nn.Linear(d_model, value_dim)
        self.wh1 = nn.Linear(d_model, d_model)
        self.wh2 = nn.Linear(value_dim, d_model, bias=False)
        self.gamma = nn.Parameter(torch.zeros(2, z_dim))
        self.beta = nn.Parameter(torch.zeros(2, z_dim))
        self.ffn_norm = LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)
        self.fc3 = nn.Linear(d_model, hidden, bias=False)
        self.dropout = Dropout(dropout)

    def _views(self, n: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m, Q, K and V of the equations, each (..., features)."""
        m = rms_norm(wide(c), EPS) * (1 + self.rmsnorm_weight)
        z = wide(self.wz(m)).unflatten(-1, (self.n_heads, -1))
        head = z.shape[-1]
        z = rms_norm(z, EPS).flatten(-2).unsqueeze(-2)
        q, k = (z * ((1 + self.gamma) * head**-0.5) + self.beta).unbind(-2)
        return m, q, k, F.silu(self.wv(n))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """a of the equations: (B, L, Z) twice and (B, L, E) -> (B, L, E)."""
        batch, length, _ = q.shape
        block = min(self.chunk_size, length)
        chunks = (F.pad(t, (0, 0, 0, -length % block)).unflatten(1, (-1, block)).flatten(0, 1) for t in (q, k, v))
        q, k, v = (split_heads(t, self.n_heads) for t in chunks)
        later = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
        scores = rope(q, interleaved=True) @ rope(k, interleaved=True).mT
        weights = wide(scores).masked_fill(later, -torch.inf).softmax(-1).to(v.dtype)
        return merge_heads(weights @ v).unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]

    def _gated(self, m: Tensor, a: Tensor) -> Tensor:
        """y - x of the equations."""
        return self.wh1(m) + self.wh2(a * F.silu(self.wr(m)))

    def _hop(self, y: Tensor) -> Tensor:
        """out - x of the equations."""
        y = self.ffn_norm(y)
        return self.fc2(self.dropout(F.silu(self.fc1(y)) * self.fc3(y)))

    def attend(self, x: Tensor) -> Tensor:
        """y of the equations: (B, L, D) -> (B, L, D)."""
        n, _ = self.timenorm(x)
        m, q, k, v = self._views(n, self.cema(n))
        return x + self._gated(m, self.attention(q, k, v))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._hop(self.attend(x))

    def cost(self, length: int) -> Cost:
        value_dim, width = self.wv.weight.shape
        z_dim, hidden = self.wz.out_features, self.fc1.out_features
        block = min(self.chunk_size, length)
        chunks = -(-length // block)
        maps = 2 * Cost.linear(length, width, value_dim) + Cost.linear(length, width, z_dim)
        maps = maps + Cost.linear(length, width, width) + Cost.linear(length, value_dim, width, bias=False)
        maps = maps + 3 * Cost.linear(length, width, hidden, bias=False) + self.cema.cost(length)
        pairs = float(chunks * block**2)
        attention = Cost(2.0 * pairs * (z_dim + value_dim), 6.0 * pairs * self.n_heads)
        return maps + attention + Cost(other=length * (40.0 * width + 20.0 * z_dim + 10.0 * value_dim + 6.0 * hidden))

    def init_state(self, batch: int) -> State:
        zeros = self.gamma.new_zeros
        averages = torch.zeros(
            batch, *self.cema.gamma.shape[:2], dtype=self.gamma.dtype.to_complex(), device=self.gamma.device
        )
        keys, values = zeros(batch, 0, self.gamma.shape[1]), zeros(batch, 0, self.wv.out_features)
        return self.timenorm.start(batch), averages, keys, values

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the sums of the norm, h / p, and turned keys (B, t, Z) and values (B, t, E) of the chunk."""
        sums, averages, keys, values = state
        n, sums = self.timenorm(x.unsqueeze(1), sums)
        c, averages = self.cema.step(n.squeeze(1), averages)
        m, q, k, v = self._views(n.squeeze(1), c)
        if keys.shape[1] == self.chunk_size:
            keys, values = keys[:, :0], values[:, :0]
        place = keys.shape[1]
        q, k = (rope(split_heads(t.unsqueeze(1), self.n_heads), place, interleaved=True) for t in (q, k))
        keys = torch.cat([keys, merge_heads(k)], dim=1)
        values = torch.cat([values, v.unsqueeze(1)], dim=1)
        scores = q @ split_heads(keys, self.n_heads).mT
        a = merge_heads(wide(scores).softmax(-1).to(v.dtype) @ split_heads(values, self.n_heads)).squeeze(1)
        return self._hop(x + self._gated(m, a)), (sums, averages, keys, values)


class Megalodon(Stack):
    """z_dim: Z. value_dim: E, twice d_model unless given. n_heads: H, which divides both. averages: N. chunk: C. norm
    groups: G, a divisor of d_model below it, 32 or the most that fit unless given. block.expand: width of the
    feed-forward part over d_model."""

    card = Card(
        title="Megalodon: Efficient LLM Pretraining and Inference with Unlimited Context Length",
        year=2024,
        url="https://arxiv.org/abs/2404.08801",
        scaling="L log L",
        causal=True,
        exempt={
            "exports": "the chunks follow the length",
        },
    )
    block = Block(ffn="none", expand=2.0)

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        z_dim: int = 64,
        value_dim: int | None = None,
        n_heads: int = 1,
        averages: int = 16,
        chunk: int = 128,
        norm_groups: int | None = None,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        at_least(1, z_dim=z_dim, n_heads=n_heads, averages=averages, chunk=chunk)
        values = 2 * d_model if value_dim is None else value_dim
        if z_dim % (2 * n_heads):
            raise ValueError(
                f"z_dim is {z_dim}; a multiple of 2 n_heads, {2 * n_heads}, as rotary positions turn pairs"
            )
        if values < 1 or values % n_heads:
            raise ValueError(f"value_dim is {values}; a multiple of n_heads, {n_heads}")
        groups = math.gcd(32, d_model // 2) if norm_groups is None else norm_groups
        if groups < 1 or d_model % groups or d_model == groups:
            raise ValueError(
                f"norm_groups is {groups}; a divisor of d_model, {d_model}, that leaves 2 channels or more"
            )
        shape = type(self).block.updated(block)
        if shape.ffn != "none":
            raise ValueError(f"block.ffn is {shape.ffn!r}; 'none', as the mixer holds the feed-forward part")
        if not shape.prenorm:
            raise ValueError("block.prenorm is false; true, as the mixer holds its norms")
        super().__init__(
            lambda _: MegalodonMixer(
                d_model, z_dim=z_dim, value_dim=values, n_heads=n_heads, averages=averages, chunk=chunk, groups=groups,
                hidden=round(shape.expand * d_model), dropout=dropout,
            ),
            d_model=d_model, dropout=dropout, block=block, **stack,
        )  # fmt: skip
        for layer in self.blocks:
            layer.norm = nn.Identity()  # the residual of two hops needs x as it is

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "theta")
