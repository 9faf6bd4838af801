"""GLA: linear attention in which every channel of the keys decays at a rate that depends on the input.

Yang, Wang, Shen, Panda and Kim 2023, arXiv:2312.06635. With H heads, keys of width K = expand_k D / H, values of width
V = expand_v D / H and a gate through R = gate_rank channels (in_proj: the rows of W_q, W_k, W_1, W_v, W_r; k_gate: W_2
and b_alpha; g_bias: b_r):

    q, k, v = x W_q, x W_k, x W_v                          (B, L, H, K), (B, L, H, K), (B, L, H, V)
    alpha = sigmoid(x W_1 W_2 + b_alpha)^(1 / tau)         (B, L, H, K)   W_1: (D, R), W_2: (R, H K)
    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   S_0 = 0     (B, H, K, V), never stored
    o_t = S_t^T q_t / sqrt(K)                              (B, L, H, V)
    out = (silu(x W_r + b_r) * norm(o)) W_o                (B, L, D)      layer norm of each head, without gains

The root, tau = 16, keeps alpha near 1: a gate that is half open still holds a value over 1 / (1 - 2^(-1/16)) = 24
tokens.

Initialisation, as the authors' code: Xavier uniform of gain 2^-2.5 for W_q, W_k, W_1 and W_2, b_alpha = b_r = 0. W_v,
W_r and W_o are PyTorch's own, whose size follows the width, where that code has a deviation of 0.02 at any width.

Departures: none known in the mixer. The code puts 1 / sqrt(D / H) on k on top of the operator's 1 / sqrt(K), which the
norm undoes but for its epsilon, 1e-5. flash-linear-attention has a later form with an RMS norm with gains, and without
b_r. A block has a SwiGLU part of width 8/3 D, with biases, and RMS norm.

Checked against: tensors of the authors' layer with its kernel replaced by its definition: outputs, gradients of x and
of every parameter; flash-linear-attention's recurrence from a given state; the parallel form of the paper.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

CHUNK = 64


def advance(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_alpha: (B, H, K); v: (B, H, V); S: (B, H, K, V) -> o: (B, H, V), S."""
    S = log_alpha.exp().unsqueeze(-1) * S + k.unsqueeze(-1) * v.unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", S, q) * k.shape[-1] ** -0.5, S


class GLAMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, *, n_heads: int, key_dim: int, value_dim: int, gate_rank: int, tau: float) -> None:
        super().__init__()
        self.n_heads, self.tau = n_heads, tau
        self.sizes = (key_dim, key_dim, gate_rank, value_dim, value_dim)
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)  # rows: q, k, gate, v, r
        self.k_gate = nn.Linear(gate_rank, key_dim)
        self.g_bias = nn.Parameter(torch.zeros(value_dim))
        self.out_proj = nn.Linear(value_dim, d_model, bias=False)
        for weight in (*self.in_proj.weight.split(self.sizes)[:3], self.k_gate.weight):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.zeros_(self.k_gate.bias)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(..., D) -> q, k: (..., H, K), v: (..., H, V), log alpha: (..., H, K), r before its silu: (..., H V)."""
        q, k, low, v, r = self.in_proj(x).split(self.sizes, dim=-1)
        log_alpha = F.logsigmoid(wide(self.k_gate(low))) / self.tau
        q, k, v, log_alpha = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v, log_alpha))
        return q, k, v, log_alpha, r + self.g_bias

    def _finish(self, o: Tensor, r: Tensor) -> Tensor:
        """Norm, gate and output map: (..., H, V), (..., H V) -> (..., D)."""
        return self.out_proj(F.silu(r) * F.layer_norm(wide(o), o.shape[-1:], eps=1e-5).flatten(-2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v, log_alpha, r = self._projected(x)
        return self._finish(decay_attention(q, k, v, log_alpha, CHUNK), r)

    def cost(self, length: int) -> Cost:
        d_model, (keys, _, rank, values, _) = self.in_proj.in_features, self.sizes
        maps = Cost.linear(length, d_model, sum(self.sizes), False) + Cost.linear(length, rank, keys)
        maps = maps + Cost.linear(length, values, d_model, False)
        attention = 2.0 * CHUNK * (keys + values) + 4.0 * keys * values / self.n_heads
        return maps + Cost(other=length * (attention + 8.0 * keys + 14.0 * values))

    def init_state(self, batch: int) -> Tensor:
        keys, values = self.sizes[0] // self.n_heads, self.sizes[3] // self.n_heads
        return wide(self.g_bias.new_zeros(batch, self.n_heads, keys, values))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: S (B, H, K, V)."""
        q, k, v, log_alpha, r = self._projected(x)
        o, S = advance(q, k, v, log_alpha, state)
        return self._finish(o, r), S

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_alpha, r = self._projected(x)
        o, S = decay_attention(q, k, v, log_alpha, CHUNK, h0=state, return_state=True)
        return self._finish(o, r), S


class GLA(Stack):
    """n_heads: H. expand_k, expand_v: width of all keys, and of all values, over d_model. gate_rank: R. tau: the root
    taken of the gates."""

    card = Card(
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        year=2023,
        url="https://arxiv.org/abs/2312.06635",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        tau: float = 16.0,
        **stack: Any,
    ) -> None:
        at_least(1, n_heads=n_heads, gate_rank=gate_rank)
        if tau <= 0:
            raise ValueError(f"tau is {tau}; more than 0")
        key_dim, value_dim = round(expand_k * d_model), round(expand_v * d_model)
        for name, share, width in (("expand_k", expand_k, key_dim), ("expand_v", expand_v, value_dim)):
            if width < 1 or width % n_heads or not math.isclose(width, share * d_model):
                raise ValueError(f"{name} is {share}; times d_model, {d_model}, it is a multiple of n_heads, {n_heads}")
        super().__init__(
            lambda _: GLAMixer(
                d_model, n_heads=n_heads, key_dim=key_dim, value_dim=value_dim, gate_rank=gate_rank, tau=tau,
            ),
            d_model=d_model, **stack,
        )  # fmt: skip
