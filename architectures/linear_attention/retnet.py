"""RetNet: attention without a softmax and with a fixed decay per head, which can also be computed as a recurrence.

Sun et al. 2023, arXiv:2307.08621. With H heads, keys of width K = D / H and values of width V = value_dim / H (in_proj:
the rows of W_Q, W_K, W_V, W_G):

    Q, K, V = x W_Q, x W_K, x W_V                          (B, L, H, K), (B, L, H, K), (B, L, H, V)   section 2.1
    Q, K turned by the angle t theta                       theta_j = 10000^(-j / (K/2 - 1)), pairs (2j, 2j + 1)
    S_t = gamma S_{t-1} + K_t' V_t / sqrt(K),   S_0 = 0    (B, H, K, V)   gamma_h = 1 - 2^(-5 - h), section 2.2
    O_t = Q_t S_t                                          = ((Q K' / sqrt(K)) * D) V,  D_nm = gamma^(n - m), n >= m
    out = (silu(x W_G) * norm(O)) W_O                      (B, L, D)      norm over the V features of each head

The reach of the heads is fixed: 1 / (1 - gamma) = 32, 64, ..., 2^(4 + H) tokens.

Initialisation: Xavier uniform as the released code, of gain 2^-2.5 for W_Q, W_K, W_V and W_G and 2^-1 for W_O; no
biases.

Departures: norm is the RMS norm without parameters of the released code, where the paper writes GroupNorm, which takes
the mean off too. The code divides the rows of D and of the scores by positive numbers, for half precision; the norm
undoes both but for its epsilon (1e-6), and they are left out. A block has a GELU part of width 2 D after the mixer, so
that it weighs as much as a Transformer's with value_dim = 2 D (section 3.1).

Checked against: tensors of torchscale's MultiScaleRetention: exactly with its row divisors put in, to the norm's
epsilon without them; outputs and every gradient against the recurrence step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import rope
from lra.architectures._norm import rms_norm
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

State = tuple[Tensor, Tensor]
CHUNK = 64


class RetNetMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, n_heads: int, value_dim: int) -> None:
        super().__init__()
        self.n_heads, self.value_dim = n_heads, value_dim
        self.sizes = (d_model, d_model, value_dim, value_dim)
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)  # rows: Q, K, V, G
        self.out_proj = nn.Linear(value_dim, d_model, bias=False)
        for weight in self.in_proj.weight.split(self.sizes):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)

    def log_decay(self) -> Tensor:
        """log gamma: (H,), in float64, because float32 would round 1 - gamma of a head that reaches far."""
        head = torch.arange(self.n_heads, dtype=torch.float64, device=self.out_proj.weight.device)
        return torch.log1p(-(2.0 ** (-5 - head)))

    def _projected(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, K turned: (B, L, H, K), V: (B, L, H, V), gate: (B, L, value_dim); the first position is `start`."""
        q, k, v, gate = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        half = q.shape[-1] // 2
        base = 10000.0 ** (half / max(half - 1, 1))  # exponents from 0 to 1 with both ends in
        q, k = (rope(t.transpose(1, 2), start, base=base, interleaved=True).transpose(1, 2) for t in (q, k))
        return q, k, v, gate

    def finish(self, o: Tensor, gate: Tensor) -> Tensor:
        """Norm, gate and output map: (..., H, V), (..., value_dim) -> (..., D)."""
        return self.out_proj(F.silu(gate) * rms_norm(wide(o), 1e-6).flatten(-2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v, gate = self._projected(x, 0)
        o = decay_attention(q, k, v, self.log_decay().to(wide(x).dtype), CHUNK)
        assert isinstance(o, Tensor)
        return self.finish(o, gate)

    def cost(self, length: int) -> Cost:
        d_model = self.out_proj.out_features
        maps = Cost.linear(length, d_model, sum(self.sizes), bias=False)
        maps = maps + Cost.linear(length, self.value_dim, d_model, bias=False)
        width = d_model + self.value_dim
        retention = 4.0 * (CHUNK * width / 2 + d_model * self.value_dim / self.n_heads)
        return maps + Cost(other=length * (retention + 8.0 * width))

    def init_state(self, batch: int) -> State:
        weight, heads = self.out_proj.weight, self.n_heads
        start = torch.zeros((), dtype=torch.int64, device=weight.device)
        return start, weight.new_zeros(batch, heads, weight.shape[0] // heads, self.value_dim // heads)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the position, which turns Q and K, and S (B, H, K, V)."""
        q, k, v, gate = (t.squeeze(1) for t in self._projected(x.unsqueeze(1), int(state[0])))
        gamma = self.log_decay().exp().to(wide(x).dtype)[:, None, None]
        S = gamma * state[1] + (k * k.shape[-1] ** -0.5).unsqueeze(-1) * v.unsqueeze(-2)
        return self.finish(torch.einsum("bhk,bhkv->bhv", q, S), gate), (state[0] + 1, S)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v, gate = self._projected(x, int(state[0]))
        decay = self.log_decay().to(wide(x).dtype)
        # S of step holds k / sqrt(K); the operator puts the root into what it reads
        o, S = decay_attention(q, k * k.shape[-1] ** -0.5, v, decay, CHUNK, scale=1.0, h0=state[1], return_state=True)
        return self.finish(o, gate), (state[0] + x.shape[1], S)


class RetNet(Stack):
    """n_heads: H; d_model / H must be even. value_dim: width of all values together, 2 d_model unless given."""

    card = Card(
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        year=2023,
        url="https://arxiv.org/abs/2307.08621",
        scaling="L",
        causal=True,
    )
    block = Block(expand=2.0)

    def __init__(self, *, d_model: int, n_heads: int = 8, value_dim: int | None = None, **stack: Any) -> None:
        width = 2 * d_model if value_dim is None else value_dim
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"n_heads is {n_heads}; d_model, {d_model}, splits into heads of an even width")
        if width < 1 or width % n_heads:
            raise ValueError(f"value_dim is {width}; a multiple of n_heads, {n_heads}")
        super().__init__(lambda _: RetNetMixer(d_model, n_heads, width), d_model=d_model, **stack)
