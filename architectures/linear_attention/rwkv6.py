"""RWKV-6 (Finch): a matrix state for each head whose decay, like the token shift, depends on the input.

Peng et al. 2024, arXiv:2404.05892, section 4.2. With H heads of width N = D / H, x' the token before x (0 before the
first) and ranks R, R':

    m_n = tanh((x + mu_x (x' - x)) W_1)_n W_2n             n in w, k, v, r, g    W_1: (D, 5 R), W_2n: (R, D)
    x_n = x + (mu_n + m_n) (x' - x)                        (B, L, D)             token shift
    r, k, v, g = W_r x_r, W_k x_k, W_v x_v, silu(W_g x_g)  (B, L, H, N)          g: (B, L, D)
    w = exp(-exp(lambda + tanh(x_w A) B))                  (B, L, H, N)          A: (D, R'), B: (R', D)
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t,   S_t = diag(w_t) S_{t-1} + k_t v_t^T     S: (B, H, N, N), u: (H, N)
    time mix     W_o (norm(o) * g)                         (B, L, D)             group norm of each head
    channel mix  sigmoid(W'_r x'_r) * W'_v max(W'_k x'_k, 0)^2                   x'_n = x + mu'_n (x' - x), W'_k: (E, D)

    h = norm_0(x);  in each layer  h = h + time mix(norm(h)),  h = h + channel mix(norm(h));  last, norm(h)

No map has a bias, and there are no positions.

Initialisation, that of the released code, with l of n layers counted from 0, p = (i / D)^(1 - l / n) for channel i and
d = l / (n - 1): mu_x = mu_w = mu_k = 1 - p, mu_v = 1 - p - 0.3 d, mu_r = mu_g = 1 - p^(1/2), mu' = 1 - p; W_1 = A = 0
and W_2, B within 0.01; lambda = -6 + 5 (i / (D - 1))^(0.7 + 1.3 d); u_i = d (1 - i / (D - 1)) + 0.1 ((i + 1) mod 3 -
1); W_r, W_v and W'_k orthogonal, W_k and W_g a tenth of that, W_o, W'_r and W'_v 0, so that each part starts at 0. The
gains of the group norm are ((l + 1) / n)^0.7. What is no map learns without weight decay, lambda at twice the rate.

Departures: the embedding belongs to the suite; the paper starts it within 1e-4 of 0, ahead of norm_0. Four heads by
default, as the models here are narrow, where the released ones have N = 64. Dropout, of which the paper has none, where
the suite's block has it. Bidirectional, each of the two parts of a layer runs both ways.

Checked against: tensors of the authors' RWKV_Tmix_x060 and RWKV_CMix_x060, with the CUDA kernel replaced by its
definition: outputs, last state, every gradient; flash-linear-attention's recurrence from a given state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, divides
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._rwkv import RWKVStack, along, depth, ramp, shifted
from lra.architectures._stack import Block
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

CHUNK = 64
EPS = 64e-5
"""Of the group norm, as released: 1e-5 times the square of the 8 that earlier code divides by."""
VIEWS = ("w", "k", "v", "r", "g")


def advance(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token: r, k, log_w: (B, H, N); v: (B, H, V); u: (H, N); S: (B, H, N, V) -> o: (B, H, V), S."""
    new = k.unsqueeze(-1) * v.unsqueeze(-2)
    o = torch.einsum("bhkv,bhk->bhv", S + u.unsqueeze(-1) * new, r)
    return o, log_w.exp().unsqueeze(-1) * S + new


class TimeMix(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, n_heads: int, mix_rank: int, decay_rank: int, layer: int, n_layers: int
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        p, deep, i = ramp(d_model, layer, n_layers), depth(layer, n_layers), along(d_model)
        self.time_maa_x = nn.Parameter(1 - p)
        self.time_maa_w = nn.Parameter(1 - p)
        self.time_maa_k = nn.Parameter(1 - p)
        self.time_maa_v = nn.Parameter(1 - (p + 0.3 * deep))
        self.time_maa_r = nn.Parameter(1 - p.sqrt())
        self.time_maa_g = nn.Parameter(1 - p.sqrt())
        self.time_maa_w1 = nn.Parameter(torch.zeros(d_model, 5 * mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, mix_rank, d_model).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter(-6 + 5 * i ** (0.7 + 1.3 * deep))
        self.time_decay_w1 = nn.Parameter(torch.zeros(d_model, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, d_model).uniform_(-0.01, 0.01))
        zigzag = 0.1 * ((torch.arange(d_model) + 1) % 3 - 1)
        self.time_faaaa = nn.Parameter((deep * (1 - i) + zigzag).view(n_heads, -1))
        self.receptance, self.key, self.value, self.gate, self.output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(5)
        )
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.output.weight)
        self.ln_x = nn.GroupNorm(n_heads, d_model, eps=EPS)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / n_layers) ** 0.7)

    def _views(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r, k, v, log w: (..., H, N) and the gate before its silu: (..., D)."""
        change = before - x
        low = torch.tanh((x + change * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        moved = torch.einsum("...nr,nrd->n...d", low, self.time_maa_w2)
        x_w, x_k, x_v, x_r, x_g = (
            x + change * (getattr(self, f"time_maa_{name}") + m) for name, m in zip(VIEWS, moved, strict=True)
        )
        decay = self.time_decay + torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        parts = self.receptance(x_r), self.key(x_k), self.value(x_v), -wide(decay).exp()
        r, k, v, log_w = (t.unflatten(-1, (self.n_heads, -1)) for t in parts)
        return r, k, v, log_w, self.gate(x_g)

    def _finish(self, o: Tensor, gate: Tensor) -> Tensor:
        """Norm, gate and output map: (..., H, N), (..., D) -> (..., D)."""
        normed = self.ln_x(o.to(self.ln_x.weight.dtype).reshape(-1, gate.shape[-1])).view(gate.shape)
        return self.output(normed * F.silu(gate))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        r, k, v, log_w, gate = self._views(x, shifted(x))
        # one step late, the operator's state is what a token finds; the token itself enters through the bonus
        k_, v_, log_w_ = (F.pad(t[:, :-1], (0, 0, 0, 0, 1, 0)) for t in (k, v, log_w))
        o = decay_attention(r, k_, v_, log_w_, CHUNK, scale=1.0)
        assert isinstance(o, Tensor)
        return self._finish(o + (r * self.time_faaaa * k).sum(-1, keepdim=True) * v, gate)

    def cost(self, length: int) -> Cost:
        d_model, mix, decay = self.key.in_features, self.time_maa_w2.shape[1], self.time_decay_w2.shape[0]
        maps = 5 * Cost.linear(length, d_model, d_model, False) + 2 * Cost.linear(length, d_model, 5 * mix, False)
        maps = maps + 2 * Cost.linear(length, d_model, decay, False)
        attention = 4.0 * CHUNK * d_model + 4.0 * d_model**2 / self.n_heads
        return maps + Cost(other=length * (attention + 50.0 * d_model))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        bonus = self.time_faaaa
        heads, width = bonus.shape
        return bonus.new_zeros(batch, heads * width), wide(bonus.new_zeros(batch, heads, width, width))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: the token before (B, D), and S (B, H, N, N)."""
        r, k, v, log_w, gate = self._views(x, state[0])
        o, S = advance(r, k, v, log_w, self.time_faaaa, state[1])
        return self._finish(o, gate), (x, S)


class ChannelMix(Mixer):
    """(B, L, D) -> (B, L, D): the feed-forward part, which sees the token before."""

    def __init__(self, d_model: int, width: int, layer: int, n_layers: int) -> None:
        super().__init__()
        p = ramp(d_model, layer, n_layers)
        self.time_maa_k, self.time_maa_r = nn.Parameter(1 - p), nn.Parameter(1 - p)
        self.key = nn.Linear(d_model, width, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(width, d_model, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        change = before - x
        k = F.relu(self.key(x + change * self.time_maa_k)).square()
        return torch.sigmoid(self.receptance(x + change * self.time_maa_r)) * self.value(k)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._mix(x, shifted(x))

    def cost(self, length: int) -> Cost:
        d_model, width = self.key.in_features, self.key.out_features
        maps = 2 * Cost.linear(length, d_model, width, False) + Cost.linear(length, d_model, d_model, False)
        return maps + Cost(other=length * (11.0 * d_model + 2.0 * width))

    def init_state(self, batch: int) -> Tensor:
        return self.time_maa_k.new_zeros(batch, len(self.time_maa_k))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: the token before (B, D)."""
        return self._mix(x, state), x


class RWKV6(RWKVStack):
    """n_heads: H. channel_dim: E, 3.5 d_model unless given. mix_rank: R, of the token shift; decay_rank: R', of the
    decay. A layer is two blocks of the stack."""

    card = Card(
        title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        year=2024,
        url="https://arxiv.org/abs/2404.05892",
        scaling="L",
        causal=True,
        exempt={"magnitudes": "the released ramps of decay and token shift let deeper layers start larger"},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        n_heads: int = 4,
        channel_dim: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        **stack: Any,
    ) -> None:
        hidden = round(3.5 * d_model) if channel_dim is None else channel_dim
        at_least(1, channel_dim=channel_dim, mix_rank=mix_rank, decay_rank=decay_rank)
        divides("d_model", d_model, n_heads=n_heads)
        super().__init__(
            lambda layer: TimeMix(
                d_model, n_heads=n_heads, mix_rank=mix_rank, decay_rank=decay_rank, layer=layer, n_layers=n_layers,
            ),
            lambda layer: ChannelMix(d_model, hidden, layer, n_layers),
            d_model=d_model, n_layers=n_layers, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"*.time_decay": {"lr_scale": 2.0, "weight_decay": 0.0}, **undecayed(self, "time_*", "ln_x.weight")}
