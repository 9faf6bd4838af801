"""DeltaProduct: DeltaNet with several corrections per token, so that one token can apply any rotation to the memory.

Siems, Carstensen, Zela, Hutter, Pontil and Grazzi 2025, arXiv:2502.10297. With H heads, keys of width K = expand_k D /
H, values of width V = expand_v D / H and n steps a token, j = 1 .. n:

    q, k_j, v_j = silu(conv(x W_q, x W_kj, x W_vj))        (B, L, H, K), (B, L, n, H, K), (B, L, n, H, V)
    q, k_j = q / |q|, k_j / |k_j|                          conv: depthwise, causal, over d_conv tokens
    beta_j = 2 sigmoid(x W_bj)                             (B, L, n, H)
    alpha = exp(-exp(A_log) softplus(x W_a + dt_bias))     (B, L, H)      gated; otherwise 1
    S_t = alpha_t S_{t-1}, and n times  S_t = S_t + beta_j k_j (v_j - S_t^T k_j)^T,   S_0 = 0     (B, H, K, V)
    o_t = S_t^T q_t / sqrt(K)                              (B, L, H, V)
    out = (norm(o) * silu(x W_g)) W_o                      (B, L, D)      RMS over the V features of a head, one gain

A token moves the state by alpha and a product of n generalised Householder matrices I - beta_j k_j k_j^T, each with an
eigenvalue in (-1, 1): two reflections are a rotation, and n of them any permutation of n + 1 directions.

Initialisation: maps and taps are PyTorch's own; gated, A_log and dt_bias start as in Mamba-2 and learn without weight
decay.

Departures: none known in the mixer; the epsilon of the norm is 1e-5, as released. Four heads by default, as the models
here are narrow. A block has a SwiGLU part of width 8/3 D, with biases, and RMS norm.

Checked against: tensors of flash-linear-attention's GatedDeltaProduct with its kernel replaced by its definition:
outputs with and without forget gate, gradients of x and of every parameter; its recurrence from a given state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._delta import advance, mamba_decay, unit
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.delta_rule import delta_rule

State = tuple[Tensor, Tensor, Tensor, Tensor]
CHUNK = 64


class DeltaProductMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int, value_dim: int, d_conv: int, n_steps: int, gated: bool
    ) -> None:
        super().__init__()
        self.n_heads, self.n_steps, self.gated = n_heads, n_steps, gated
        self.q_proj = nn.Linear(d_model, key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_steps * key_dim, bias=False)  # rows: step, head, feature
        self.v_proj = nn.Linear(d_model, n_steps * value_dim, bias=False)
        self.q_conv1d = ShortConvolution(key_dim, d_conv)
        self.k_conv1d = ShortConvolution(n_steps * key_dim, d_conv)
        self.v_conv1d = ShortConvolution(n_steps * value_dim, d_conv)
        self.b_proj = nn.Linear(d_model, n_steps * n_heads, bias=False)
        if gated:
            self.a_proj = nn.Linear(d_model, n_heads, bias=False)
            self.A_log, self.dt_bias = mamba_decay(n_heads, n_heads)
        self.g_proj = nn.Linear(d_model, value_dim, bias=False)
        self.o_norm = RMSNorm(value_dim // n_heads, eps=1e-5)
        self.o_proj = nn.Linear(value_dim, d_model, bias=False)

    def _views(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Convolved (..., features) -> q: (..., H, K), k: (..., n, H, K), v: (..., n, H, V), beta: (..., n, H), and
        log alpha: (..., H), None without gates."""
        steps = self.n_steps, self.n_heads
        q, k, v = q.unflatten(-1, (self.n_heads, -1)), k.unflatten(-1, (*steps, -1)), v.unflatten(-1, (*steps, -1))
        beta = 2 * torch.sigmoid(wide(self.b_proj(x))).unflatten(-1, steps)
        if not self.gated:
            return unit(q), unit(k), v, beta, None
        log_alpha = -self.A_log.exp() * F.softplus(wide(self.a_proj(x)) + self.dt_bias)
        return unit(q), unit(k), v, beta, log_alpha

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output map: (..., H, V), (..., D) -> (..., D)."""
        return self.o_proj(self.o_norm(wide(o)).flatten(-2) * F.silu(self.g_proj(x)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        convolved = self.q_conv1d(self.q_proj(x)), self.k_conv1d(self.k_proj(x)), self.v_conv1d(self.v_proj(x))
        q, k, v, beta, log_alpha = self._views(x, *convolved)
        # the steps of a token become tokens: its decay acts before the first, its query reads after the last
        later = self.n_steps - 1
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, later, 0)).flatten(1, 2)
        k, v, beta = (t.flatten(1, 2) for t in (k, v, beta))
        if log_alpha is not None:
            log_alpha = F.pad(log_alpha.unsqueeze(2), (0, 0, 0, later)).flatten(1, 2)
        o = delta_rule(q, k, v, beta, log_alpha, CHUNK)
        assert isinstance(o, Tensor)
        return self._finish(o[:, later :: self.n_steps], x)

    def cost(self, length: int) -> Cost:
        keys, d_model = self.q_proj.out_features, self.q_proj.in_features
        values = self.g_proj.out_features
        projected = keys + self.n_steps * (keys + values + self.n_heads) + (self.n_heads if self.gated else 0) + values
        maps = Cost.linear(length, d_model, projected, False) + Cost.linear(length, values, d_model, False)
        for convolution in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            maps = maps + convolution.cost(length)
        rule = self.n_steps * (4.0 * CHUNK * (keys + values) + 6.0 * keys * values / self.n_heads)
        return maps + Cost(other=length * (rule + self.n_steps * 4.0 * keys + 16.0 * values))

    def init_state(self, batch: int) -> State:
        windows = (c.init_state(batch) for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        heads = self.q_proj.out_features // self.n_heads, self.g_proj.out_features // self.n_heads
        return *windows, wide(self.o_proj.weight.new_zeros(batch, self.n_heads, *heads))  # type: ignore[return-value]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of each convolution, and S (B, H, K, V)."""
        q, q_window = self.q_conv1d.step(self.q_proj(x), state[0])
        k, k_window = self.k_conv1d.step(self.k_proj(x), state[1])
        v, v_window = self.v_conv1d.step(self.v_proj(x), state[2])
        q, k, v, beta, log_alpha = self._views(x, q, k, v)
        o, S = q, state[3]
        for j in range(self.n_steps):
            o, S = advance(q, k[:, j], v[:, j], beta[:, j], None if j else log_alpha, S)
        return self._finish(o, x), (q_window, k_window, v_window, S)


class DeltaProduct(Stack):
    """n_heads: H. n_steps: n. expand_k, expand_v: width of the keys of all heads in one step, and of the values, over
    d_model. d_conv: taps of the convolutions. gated: the state decays by alpha."""

    card = Card(
        title="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
        year=2025,
        url="https://arxiv.org/abs/2502.10297",
        scaling="L",
        causal=True,
        variants={"gated": {"gated": True}, "3": {"n_steps": 3}},
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int = 4,
        n_steps: int = 2,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        d_conv: int = 4,
        gated: bool = False,
        **stack: Any,
    ) -> None:
        at_least(1, n_heads=n_heads, n_steps=n_steps, d_conv=d_conv)
        key_dim, value_dim = round(expand_k * d_model), round(expand_v * d_model)
        for name, share, width in (("expand_k", expand_k, key_dim), ("expand_v", expand_v, value_dim)):
            if width < 1 or width % n_heads or not math.isclose(width, share * d_model):
                raise ValueError(f"{name} is {share}; times d_model, {d_model}, it is a multiple of n_heads, {n_heads}")
        super().__init__(
            lambda _: DeltaProductMixer(
                d_model, n_heads=n_heads, key_dim=key_dim, value_dim=value_dim, d_conv=d_conv, n_steps=n_steps,
                gated=gated,
            ),
            d_model=d_model, **stack,
        )  # fmt: skip
        self.gated = gated

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "dt_bias") if self.gated else {}
