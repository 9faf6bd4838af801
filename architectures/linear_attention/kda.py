"""Kimi Delta Attention: a gated delta rule with a separate decay for every channel of the keys.

Kimi Team 2025, arXiv:2510.26692, section 3. With H heads, keys and values of width K each:

    q, k, v = silu(conv(x W_q, x W_k, x W_v))              (B, L, H, K) each    conv: depthwise, causal
    q, k = q / |q|, k / |k|
    beta = sigmoid(x W_b)                                  (B, L, H)
    alpha = exp(-exp(A_log) softplus(x W_f1 W_f2 + dt_bias))     (B, L, H, K)   W_f1: (D, K)
    S' = diag(alpha_t) S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  S_0 = 0     (B, H, K, K)
    o_t = S_t^T q_t / sqrt(K)                              (B, L, H, K)
    out = (norm(o) * sigmoid(x W_g1 W_g2 + b_g)) W_o       (B, L, D)      RMS over the K features of a head, one gain

Gated DeltaNet has one alpha a head; here it is GLA's, one a channel, applied ahead of the correction. negative: beta is
twice the sigmoid, as in DeltaNet.

Initialisation: maps and taps are PyTorch's own; A_log and dt_bias start as in Mamba-2, so that channels remember from
a few tokens to some thousand, and learn without weight decay.

Departures: that start; the released layer has exp(A_log) uniform in (1, 16) and dt_bias 0, where no channel keeps more
than half of a value for one token. The epsilon of the norm is 1e-5, as released. The paper interleaves three layers
with one of attention without positions, which is left out. Four heads by default, of width D / H, where the released
models have 128. A block has a SwiGLU part of width 8/3 D, with biases, and RMS norm.

Checked against: tensors of flash-linear-attention's KimiDeltaAttention with its kernel replaced by its definition:
outputs, last state, gradients of x and of every parameter; its recurrence from a given state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._delta import channel_delta, channel_delta_cost, channel_delta_step, mamba_decay, unit
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer

State = tuple[Tensor, Tensor, Tensor, Tensor]
Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class KDAMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, n_heads: int, *, head_dim: int, d_conv: int, negative: bool) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.negative = n_heads, head_dim, negative
        width = n_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, width, bias=False) for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConvolution(width, d_conv) for _ in range(3))
        self.f_proj = nn.Sequential(nn.Linear(d_model, head_dim, bias=False), nn.Linear(head_dim, width, bias=False))
        self.b_proj = nn.Linear(d_model, n_heads, bias=False)
        self.A_log, self.dt_bias = mamba_decay(n_heads, width)
        self.g_proj = nn.Sequential(nn.Linear(d_model, head_dim, bias=False), nn.Linear(head_dim, width))
        self.o_norm = RMSNorm(head_dim, eps=1e-5)
        self.o_proj = nn.Linear(width, d_model, bias=False)

    def _terms(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Terms:
        """Convolved q, k, v: (..., H K) -> scaled q, k, beta k, v and log alpha of `channel_delta`: (..., H, K)."""
        rate = F.softplus(wide(self.f_proj(x)) + self.dt_bias)
        q, k, v, rate = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v, rate))
        beta = torch.sigmoid(wide(self.b_proj(x))).unsqueeze(-1) * (2 if self.negative else 1)
        k = unit(k)
        return unit(q) * self.head_dim**-0.5, k, beta * k, v, -self.A_log.exp().unsqueeze(-1) * rate

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output map: (..., H, K), (..., D) -> (..., D)."""
        return self.o_proj(self.o_norm(wide(o)).flatten(-2) * torch.sigmoid(self.g_proj(x)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        convolved = self.q_conv1d(self.q_proj(x)), self.k_conv1d(self.k_proj(x)), self.v_conv1d(self.v_proj(x))
        return self._finish(channel_delta(*self._terms(x, *convolved)), x)

    def cost(self, length: int) -> Cost:
        d_model, width, head = self.q_proj.in_features, self.q_proj.out_features, self.head_dim
        maps = 4 * Cost.linear(length, d_model, width, False) + Cost.linear(length, d_model, self.n_heads, False)
        maps = maps + 2 * (Cost.linear(length, d_model, head, False) + Cost.linear(length, head, width, False))
        for convolution in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            maps = maps + convolution.cost(length)
        rule = channel_delta_cost(length, self.n_heads, head, head, False)
        return maps + rule + Cost(other=40.0 * length * width)

    def init_state(self, batch: int) -> State:
        windows = (c.init_state(batch) for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        S = wide(self.dt_bias.new_zeros(batch, self.n_heads, self.head_dim, self.head_dim))
        return *windows, S  # type: ignore[return-value]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of each convolution, and S (B, H, K, K)."""
        q, q_window = self.q_conv1d.step(self.q_proj(x), state[0])
        k, k_window = self.k_conv1d.step(self.k_proj(x), state[1])
        v, v_window = self.v_conv1d.step(self.v_proj(x), state[2])
        o, S = channel_delta_step(*self._terms(x, q, k, v), state[3])
        return self._finish(o, x), (q_window, k_window, v_window, S)


class KDA(Stack):
    """n_heads: H. head_dim: K, d_model / n_heads unless given. d_conv: taps of the convolutions. negative: beta in
    (0, 2), so that the state's transition has negative eigenvalues."""

    card = Card(
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        year=2025,
        url="https://arxiv.org/abs/2510.26692",
        scaling="L",
        causal=True,
        variants={"negative": {"negative": True}},
        exempt={
            "exports": "the chunks follow the length",
        },
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int = 4,
        head_dim: int | None = None,
        d_conv: int = 4,
        negative: bool = False,
        **stack: Any,
    ) -> None:
        at_least(1, n_heads=n_heads, head_dim=head_dim, d_conv=d_conv)
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}; a divisor of d_model, {d_model}, unless head_dim is given")
        width = d_model // n_heads if head_dim is None else head_dim
        super().__init__(
            lambda _: KDAMixer(d_model, n_heads, head_dim=width, d_conv=d_conv, negative=negative),
            d_model=d_model,
            **stack,
        )

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "dt_bias")
