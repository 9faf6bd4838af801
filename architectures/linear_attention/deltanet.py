"""DeltaNet: linear attention whose memory corrects the value stored under a key instead of adding to it.

Yang, Wang, Zhang, Shen and Kim 2024, arXiv:2406.06484; gated: Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464.
With H heads, keys of width K = expand_k D / H and values of width V = expand_v D / H:

    q, k, v = silu(conv(x W_q, x W_k, x W_v))              (B, L, H, K), (B, L, H, K), (B, L, H, V)
    q, k = q / |q|, k / |k|                                conv: depthwise, causal, over d_conv tokens
    beta = sigmoid(x W_beta)                               (B, L, H)      how much of an old value is replaced;
                                                                          negative: twice that
    alpha = exp(-exp(A_log) softplus(x W_alpha + b_dt))    (B, L, H)      gated; otherwise 1
    S' = alpha_t S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  S_0 = 0             (B, H, K, V), never stored
    o_t = S_t^T q_t / sqrt(K)                              (B, L, H, V)
    out = norm(o) W_o;  gated: (norm(o) * silu(x W_g)) W_o (B, L, D)      RMS over the V features of a head, one gain

As |k| = 1 the state moves by alpha (I - beta k k^T), which shrinks along k alone and only by 1 - beta: stable. With
beta in (0, 2) that eigenvalue is in (-1, 1), and what is held under k can change its sign, which parity and other
automata need (Grazzi et al. 2024, arXiv:2411.12537).

Initialisation: maps and taps are PyTorch's own, whose size follows the width; the released language models draw them
with a deviation of 0.02, which at small widths leaves values below the epsilon of the norm. Gated, as Mamba-2:
exp(A_log) uniform in (0, 16]; the step at x = 0 uniform in the logarithm between 0.001 and 0.1; both learn without
weight decay.

Departures: none known in the mixer; norms take the epsilon of the released models, 1e-6, and W_beta has no bias, as in
flash-linear-attention (the code of the gated paper gives it one). Four heads by default, as the models here are narrow,
where that library has K at 128, gated at 256. A block has a SwiGLU part of width 8/3 D, with biases, and RMS norm.
Hybrids with attention are left out. The gated paper's widths, expand_k 3/4 and expand_v 3/2, come with the variant.

Checked against: tensors of flash-linear-attention's DeltaNet and GatedDeltaNet with kernels replaced by their
definitions: outputs, gradients of x and of every parameter; its recurrences from a given state; the products of
alpha (I - beta k k^T) as the papers write them, beta up to 2; its recurrence with beta in (0, 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._delta import EPS, advance, mamba_decay, unit
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.delta_rule import delta_rule

State = tuple[Tensor, Tensor]
CHUNK = 64


class DeltaNetMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int, value_dim: int, d_conv: int, gated: bool, negative: bool
    ) -> None:
        super().__init__()
        self.n_heads, self.gated, self.negative = n_heads, gated, negative
        self.inner = (key_dim, key_dim, value_dim)  # q, k, v
        self.sizes = (sum(self.inner), n_heads, *((n_heads, value_dim) if gated else ()))  # qkv, beta, alpha, gate
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv1d = ShortConvolution(sum(self.inner), d_conv)
        if gated:
            self.A_log, self.dt_bias = mamba_decay(n_heads, n_heads)
        self.o_norm = RMSNorm(value_dim // n_heads, eps=EPS)
        self.o_proj = nn.Linear(value_dim, d_model, bias=False)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(..., D) -> qkv before the convolution, beta: (..., H), log alpha: (..., H) and gate, None without gates."""
        qkv, beta, *gates = self.in_proj(x).split(self.sizes, dim=-1)
        beta = wide(beta).sigmoid() * (2 if self.negative else 1)
        if not self.gated:
            return qkv, beta, None, None
        return qkv, beta, -self.A_log.exp() * F.softplus(wide(gates[0]) + self.dt_bias), gates[1]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 2 K H + V H) -> q and k of unit length: (..., H, K), v: (..., H, V)."""
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in qkv.split(self.inner, dim=-1))
        return unit(q), unit(k), v

    def _finish(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """Norm, gate and output map: (..., H, V), (..., H V) -> (..., D)."""
        o = self.o_norm(wide(o)).flatten(-2)
        return self.o_proj(o if gate is None else o * F.silu(gate))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv, beta, log_alpha, gate = self._projected(x)
        q, k, v = self._heads(self.conv1d(qkv))
        return self._finish(delta_rule(q, k, v, beta, log_alpha, CHUNK), gate)

    def cost(self, length: int) -> Cost:
        d_model, taps = self.in_proj.in_features, self.conv1d.weight.shape[2]
        keys, _, values = self.inner
        maps = Cost.linear(length, d_model, sum(self.sizes), False) + Cost.linear(length, values, d_model, False)
        rule = 4.0 * CHUNK * (keys + values) + 6.0 * keys * values / self.n_heads
        return maps + Cost(other=length * (rule + sum(self.inner) * (2.0 * taps + 8) + 12.0 * values))

    def init_state(self, batch: int) -> State:
        keys, _, values = (size // self.n_heads for size in self.inner)
        return self.conv1d.init_state(batch), wide(self.o_proj.weight.new_zeros(batch, self.n_heads, keys, values))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, 2 K H + V H), and S (B, H, K, V)."""
        qkv, beta, log_alpha, gate = self._projected(x)
        qkv, window = self.conv1d.step(qkv, state[0])
        o, S = advance(*self._heads(qkv), beta, log_alpha, state[1])
        return self._finish(o, gate), (window, S)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        qkv, beta, log_alpha, gate = self._projected(x)
        qkv, window = self.conv1d.chunk(qkv, state[0])
        q, k, v = self._heads(qkv)
        o, S = delta_rule(q, k, v, beta, log_alpha, CHUNK, h0=state[1], return_state=True)
        return self._finish(o, gate), (window, S)


class DeltaNet(Stack):
    """n_heads: H. expand_k, expand_v: width of all keys, and of all values, over d_model. d_conv: taps of the
    convolution. gated: the state decays by alpha and a gate stands before the last map. negative: beta in (0, 2), so
    that the state's transition has negative eigenvalues."""

    card = Card(
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        year=2024,
        url="https://arxiv.org/abs/2406.06484",
        scaling="L",
        causal=True,
        variants={
            "gated": {"gated": True, "expand_k": 0.75, "expand_v": 1.5},
            "negative": {"negative": True},
            "gated_negative": {"gated": True, "expand_k": 0.75, "expand_v": 1.5, "negative": True},
        },
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        d_conv: int = 4,
        gated: bool = False,
        negative: bool = False,
        **stack: Any,
    ) -> None:
        at_least(1, n_heads=n_heads, d_conv=d_conv)
        key_dim, value_dim = round(expand_k * d_model), round(expand_v * d_model)
        for name, share, width in (("expand_k", expand_k, key_dim), ("expand_v", expand_v, value_dim)):
            if width < 1 or width % n_heads or not math.isclose(width, share * d_model):
                raise ValueError(f"{name} is {share}; times d_model, {d_model}, it is a multiple of n_heads, {n_heads}")
        super().__init__(
            lambda _: DeltaNetMixer(
                d_model, n_heads=n_heads, key_dim=key_dim, value_dim=value_dim, d_conv=d_conv, gated=gated,
                negative=negative,
            ),
            d_model=d_model, **stack,
        )  # fmt: skip
        self.gated = gated

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log") if self.gated else {}
