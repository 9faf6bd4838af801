"""gMLP: a perceptron whose hidden features are gated by a learnt mixture of the positions; no attention.

Liu, Dai, So and Le 2021, arXiv:2105.08050. N is `length`, E the hidden width, W: (N, N), c: (N,). A block is

    [u, v] = gelu(h W_in + b_in)                           (B, L, E/2) each; h is the block's input after its norm
    s_t = sum_r W_tr LN(v)_r + c_t                         (B, L, E/2)   one W for all features, section 2.1
    out = (u * s) W_out + b_out                            (B, L, D)

`spatial="toeplitz"`: W_tr = w_{t-r}, 2 N - 1 numbers, computed as a convolution; the paper's language models (section
4) are restricted to it. `attention`: width of one tiny attention head whose output joins the gate (aMLP, section 4.3):

    s = s + softmax(q k' / sqrt(attention)) v' W_a + b_a   q, k, v' = h W_qkv + b_qkv

A causal W is lower triangular. L tokens use the first L rows and columns. Padding adds nothing to a mixture.

Initialisation: W uniform within 0.001 / N and c = 1 ("near zero" and ones, section 2.1), so that a block starts as a
feed-forward part. Other maps are PyTorch's own.

Departures: none known. The paper's models have no dropout; `dropout` is that on the output of a block.

Checked against: tensors of a public spatial gating unit, both ways, a shorter sequence and every gradient; a loop
over the equations for W of both kinds and the attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._norm import LayerNorm
from lra.architectures._stack import Block, Stack
from lra.attention import attention_mask, fused_attention
from lra.encoder import Card, Cost, Mixer, fill_padding
from lra.kernels.fft_conv import fft_conv

SPATIAL = ("full", "toeplitz")
State = tuple[Tensor, Tensor]


class TinyAttention(nn.Module):
    """One head of self-attention: (B, L, D) -> (B, L, d_out)."""

    def __init__(self, d_model: int, width: int, d_out: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(d_model, 3 * width)
        self.to_out = nn.Linear(width, d_out)

    def forward(self, x: Tensor, past: Tensor | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """past: keys and values of earlier tokens, (B, t, 2 width); allowed: who may look at whom, broadcast to
        (B, C, t + C). Returns the output and the keys and values of all tokens."""
        q, kv = self.to_qkv(x).tensor_split([self.to_out.in_features], dim=-1)
        kv = kv if past is None else torch.cat([past, kv], dim=1)
        k, v = kv.chunk(2, dim=-1)
        y = fused_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), allowed.unsqueeze(1))
        return self.to_out(y.squeeze(1)), kv

    def cost(self, length: int) -> Cost:
        width, d_model = self.to_out.in_features, self.to_qkv.in_features
        maps = Cost.linear(length, d_model, 3 * width) + Cost.linear(length, width, self.to_out.out_features)
        return maps + Cost(4.0 * length**2 * width, 5.0 * length**2)


class GMLPMixer(Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, length: int, hidden: int, spatial: str, attention: int, causal: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.spatial, self.causal = length, spatial, causal
        self.proj_in = nn.Linear(d_model, hidden)
        self.norm = LayerNorm(hidden // 2)
        shape = (length, length) if spatial == "full" else (length if causal else 2 * length - 1,)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-1e-3 / length, 1e-3 / length))
        self.bias = nn.Parameter(torch.ones(length))
        self.attention = TinyAttention(d_model, attention, hidden // 2) if attention else None
        self.proj_out = nn.Linear(hidden // 2, d_model)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of W, columns up to `stop`: (stop - start, stop)."""
        if self.spatial == "full":
            # not a slice of columns, whose strides would tie an exported graph to one length
            w = self.weight[start:stop].index_select(1, torch.arange(stop, device=self.weight.device))
        else:
            i = torch.arange(stop, device=self.weight.device)
            # w_0 to w_{N-1} look back; w_{-1} to w_{1-N} come after them, so that an index counts from the end
            w = self.weight[(i[start:, None] - i).clamp_min(0 if self.causal else 1 - self.length)]
        return w.tril(start) if self.causal else w

    def mixed(self, v: Tensor) -> Tensor:
        """W v over a sequence: (B, L, E/2) -> (B, L, E/2)."""
        if self.spatial == "full":
            return torch.einsum("tr,brc->btc", self.rows(0, v.shape[1]), v)
        if self.causal:
            return fft_conv(v, self.weight.expand(v.shape[2], -1))
        taps = torch.stack([self.weight[: self.length], F.pad(self.weight[self.length :].flip(0), (0, 1))])
        return fft_conv(v, taps.unsqueeze(1).expand(-1, v.shape[2], -1), bidirectional=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} positions this encoder has weights for")
        u, v = F.gelu(self.proj_in(x)).chunk(2, dim=-1)
        gate = self.mixed(fill_padding(self.norm(v), mask)) + self.bias[:length, None]
        if self.attention is not None:
            gate = gate + self.attention(x, None, attention_mask(mask, causal=self.causal).squeeze(1))[0]
        return self.proj_out(u * gate)

    def cost(self, length: int) -> Cost:
        d_model, half = self.proj_in.in_features, self.proj_out.in_features
        work = Cost.linear(length, d_model, 2 * half) + Cost.linear(length, half, d_model)
        work += Cost(other=length * 26.0 * half)
        if self.attention is not None:
            work += self.attention.cost(length)
        if self.spatial == "full":
            return work + Cost(2.0 * length**2 * half, batch_other=float(length**2 if self.causal else 0))
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        kernels = half * transform
        return work + Cost(other=2 * half * transform + 6.0 * half * length, batch_other=kernels)

    def init_state(self, batch: int) -> State:
        empty = self.weight.new_zeros(batch, 0, self.proj_out.in_features)
        width = 0 if self.attention is None else 2 * self.attention.to_out.in_features
        return empty, empty.new_zeros(batch, 0, width)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: normed gates so far (B, t, E/2); keys and values of the attention (B, t, 2 width)."""
        gates, kv = state
        start, stop = gates.shape[1], gates.shape[1] + x.shape[1]
        if stop > self.length:
            raise ValueError(f"length {stop} exceeds the {self.length} positions this encoder has weights for")
        u, v = F.gelu(self.proj_in(x)).chunk(2, dim=-1)
        gates = torch.cat([gates, self.norm(v)], dim=1)
        gate = self.rows(start, stop) @ gates + self.bias[start:stop, None]
        if self.attention is not None:
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=x.device).tril(start)
            tiny, kv = self.attention(x, kv, seen.unsqueeze(0))
            gate = gate + tiny
        return self.proj_out(u * gate), (gates, kv)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state


class GMLP(Stack):
    """expand: E over d_model. spatial: form of W, of SPATIAL. attention: width of the tiny attention; 0: none."""

    card = Card(
        title="Pay Attention to MLPs",
        year=2021,
        url="https://arxiv.org/abs/2105.08050",
        scaling="L^2",
        causal=False,
        variants={"toeplitz": {"spatial": "toeplitz"}, "attention": {"attention": 64}},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        direction: str = "bidirectional",
        expand: float = 6.0,
        spatial: str = "full",
        attention: int = 0,
        **stack: Any,
    ) -> None:
        if spatial not in SPATIAL:
            raise ValueError(f"spatial is {spatial!r}; one of {', '.join(SPATIAL)}")
        hidden = 2 * round(d_model * expand / 2)
        if hidden < 2:
            raise ValueError(f"expand is {expand}; at least two hidden features, expand * d_model")
        if attention < 0:
            raise ValueError(f"attention is {attention}; a width, 0 for none")
        self.log_linear = spatial == "toeplitz" and not attention
        super().__init__(
            lambda _: GMLPMixer(
                d_model, length=length, hidden=hidden, spatial=spatial, attention=attention,
                causal=direction == "causal",
            ),
            native=True, d_model=d_model, length=length, direction=direction, **stack,
        )  # fmt: skip

    @property
    def scaling(self) -> str:
        return "L log L" if self.log_linear else "L^2"
