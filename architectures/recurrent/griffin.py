"""Griffin: a diagonal recurrence whose decay is gated by the input, in two of three layers, and local attention in the
third. Hawk (`griffin/hawk`) has the recurrence in all of them.

De et al. 2024, arXiv:2402.19427. With R = rnn_dim, c = 8, G = n_blocks, section 2.4 and figure 2:

    r_t, i_t = sigmoid(W_a x_t + b_a), sigmoid(W_x x_t + b_x)       (B, L, R)   W_a, W_x of G blocks on the diagonal
    a_t = a^(c r_t),  a = sigmoid(Lambda)                           (B, L, R)   Lambda: recurrent_param, (R,)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t);  h_1 = i_1 x_1   (B, L, R)   RG-LRU
    recurrent block  W_o (RG-LRU(conv(W_1 x)) * gelu(W_2 x))        (B, L, D)   conv: depthwise, causal, d_conv taps
    attention block  multi-query softmax attention with rotary positions to the token and the `window` before it
    gated MLP        W_5 (gelu(W_3 x) * W_4 x)                      (B, L, D)   width 3 D;  tanh form of both GELUs
    h = h + block(norm(h)),  h = h + MLP(norm(h))                   in each layer; RMS norms, and one at the end

Initialisation: a^c uniform in [0.9, 0.999], as the paper has it (the released code draws a itself so, whose memories
are an eighth as long); the rest as the code: maps normal of variance 1 / columns, those that end a residual branch 2 /
(n_layers columns), the convolution 0.01 / d_conv, biases 0. Lambda, biases and norms learn without weight decay.

Departures: the first token enters whole, as in the code, where the paper's equation takes sqrt(1 - a_1^2) of it; the
code's bound on the derivative of the root (1000) is not needed, as a gate that is 0 passes no gradient here. Rotary
positions turn whole heads, in the code half of each; queries, keys and values have biases. R is the multiple of G next
to 4 D / 3, G as many blocks as heads. Of two layers the second is attention; one layer is a recurrence.

Checked against: tensors of Hugging Face's RecurrentGemma: the RG-LRU, with a document that starts half way, and the
recurrent block with every gradient, a layer with its MLP; the recurrence step by step; softmax attention under the
explicit mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, banded, checked_width
from lra.architectures._checks import at_least
from lra.architectures._dropout import tie_dropout
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, FeedForward, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.band_attention.tiles import pairs
from lra.kernels.linear_scan import linear_scan

C = 8.0
State = tuple[Tensor, Tensor, Tensor]


class BlockLinear(nn.Module):
    """A linear map of equal blocks on the diagonal: (..., R) -> (..., R)."""

    def __init__(self, width: int, n_blocks: int) -> None:
        super().__init__()
        size = width // n_blocks
        self.weight = nn.Parameter(torch.randn(n_blocks, size, size) * size**-0.5)  # each (in, out)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (len(self.weight), -1))
        return torch.einsum("...ni,nij->...nj", blocks, self.weight).flatten(-2) + self.bias


class RGLRU(nn.Module):
    """h of the equations: (B, L, R) -> (B, L, R)."""

    def __init__(self, width: int, n_blocks: int) -> None:
        super().__init__()
        self.recurrent_gate, self.input_gate = BlockLinear(width, n_blocks), BlockLinear(width, n_blocks)
        a = torch.empty(width, dtype=torch.float64).uniform_(0.9, 0.999) ** (1 / C)
        self.recurrent_param = nn.Parameter(torch.logit(a).float())  # Lambda

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a_t, sqrt(1 - a_t^2) and i_t x_t: (..., R) each."""
        log_a = C * wide(torch.sigmoid(self.recurrent_gate(x))) * F.logsigmoid(wide(self.recurrent_param))
        # never the root of 0, whose derivative is infinite
        rest = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(log_a.dtype).tiny)
        return log_a.exp(), rest.sqrt(), torch.sigmoid(self.input_gate(x)) * x

    def forward(self, x: Tensor) -> Tensor:
        a, scale, gated = self.terms(x)
        scale = torch.cat([torch.ones_like(scale[:, :1]), scale[:, 1:]], dim=1)
        return linear_scan(a, scale * gated)


class RecurrentMixer(Mixer):
    """The recurrent block: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, *, width: int, n_blocks: int, d_conv: int, n_layers: int) -> None:
        super().__init__()
        self.linear_xy = nn.Linear(d_model, 2 * width)  # rows: W_1, W_2
        taps = torch.randn(width, 1, d_conv) * (0.01 / d_conv) ** 0.5
        self.conv_1d = ShortConvolution(width, d_conv, None, bias=True, weight=taps)
        self.rg_lru = RGLRU(width, n_blocks)
        self.linear_out = nn.Linear(width, d_model)
        start(self.linear_xy)
        start(self.linear_out, 2 / n_layers)

    def _gated(self, h: Tensor, gate: Tensor) -> Tensor:
        """Gate and output map: (..., R) twice -> (..., D)."""
        return self.linear_out(h * F.gelu(gate, approximate="tanh"))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, gate = self.linear_xy(x).chunk(2, dim=-1)
        return self._gated(self.rg_lru(self.conv_1d(x)), gate)

    def cost(self, length: int) -> Cost:
        d_model, (width, _, taps) = self.linear_out.out_features, self.conv_1d.weight.shape
        maps = Cost.linear(length, d_model, 2 * width) + Cost.linear(length, width, d_model)
        gates = Cost.linear(length, width // len(self.rg_lru.input_gate.weight), 2 * width)
        return maps + gates + Cost(other=length * width * (2.0 * taps + 36.0))

    def init_state(self, batch: int) -> State:
        decay = wide(self.rg_lru.recurrent_param)
        h, started = decay.new_zeros(batch, len(decay)), torch.zeros((), dtype=torch.bool, device=decay.device)
        return self.conv_1d.init_state(batch), h, started

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, R), h (B, R), whether a token came."""
        x, gate = self.linear_xy(x).chunk(2, dim=-1)
        x, window = self.conv_1d.step(x, state[0])
        a, scale, gated = self.rg_lru.terms(x)
        h = a * state[1] + torch.where(state[2], scale, 1.0) * gated
        return self._gated(h, gate), (window, h, torch.ones_like(state[2]))

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        x, gate = self.linear_xy(x).chunk(2, dim=-1)
        x, window = self.conv_1d.chunk(x, state[0])
        a, scale, gated = self.rg_lru.terms(x)
        scale = torch.cat([torch.where(state[2], scale[:, :1], 1.0), scale[:, 1:]], dim=1)
        h = linear_scan(a, scale * gated, state[1])
        return self._gated(h, gate), (window, h[:, -1], torch.ones_like(state[2]))


class LocalMixer(AttentionMixer):
    """The attention block: one head of keys and values, (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, n_heads: int, window: int, n_layers: int) -> None:
        super().__init__(d_model, n_heads, width=d_model, positions="rope", causal=True, n_kv_heads=1)
        self.window = window
        start(self.qkv)
        start(self.out, 2 / n_layers)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(self.n_heads, dim=1) for t in (k, v))
        return banded(q, k, v, mask, (self.window, 0))

    def pairs(self, length: int) -> float:
        return float(pairs(length, self.window, 0, [1] * self.n_heads, 0, 0, 1))

    def sees(self, i: int, j: Tensor) -> Tensor:
        return (j >= self.oldest(i))[None]

    def oldest(self, i: int) -> int:
        return i - self.window


class GatedMLP(FeedForward):
    """Position-wise: (..., D) -> (..., D). The shapes are those of "swiglu", the gate a GELU."""

    def __init__(self, d_model: int, expand: float, dropout: float, n_layers: int) -> None:
        super().__init__("swiglu", d_model, expand, dropout)  # rows of up: W_3, W_4
        start(self.up)
        start(self.down, 2 / n_layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        gate, h = self.up(x).chunk(2, dim=-1)
        return self.down(self.dropout(F.gelu(gate, approximate="tanh") * h))


def start(linear: nn.Linear, scale: float = 1.0) -> None:
    nn.init.normal_(linear.weight, std=(scale / linear.in_features) ** 0.5)
    nn.init.zeros_(linear.bias)


class Griffin(Stack):
    """rnn_dim: R, next to 4 / 3 d_model unless given; n_blocks: G, which divides it. d_conv: taps of the convolution.
    attention_every: every how many layers one is attention, 0 for none. window: tokens it sees before the own one.
    n_heads: of its queries. block.expand: width of the MLP over d_model."""

    card = Card(
        title="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
        year=2024,
        url="https://arxiv.org/abs/2402.19427",
        scaling="L",
        causal=True,
        variants={"hawk": {"attention_every": 0}},
    )
    block = Block(ffn="none", expand=3.0, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        dropout: float = 0.0,
        rnn_dim: int | None = None,
        n_blocks: int = 4,
        d_conv: int = 4,
        attention_every: int = 3,
        window: int = 1024,
        n_heads: int = 4,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        at_least(1, d_model=d_model, n_layers=n_layers, n_blocks=n_blocks, d_conv=d_conv, window=window)
        width = n_blocks * max(1, round(4 * d_model / (3 * n_blocks))) if rnn_dim is None else rnn_dim
        if width < 1 or width % n_blocks:
            raise ValueError(f"rnn_dim is {width}; a multiple of n_blocks, {n_blocks}")
        if attention_every < 0 or attention_every == 1:
            raise ValueError(f"attention_every is {attention_every}; 0 for none, or at least 2")
        period = min(attention_every, max(n_layers, 2))
        if period:
            checked_width(d_model, n_heads, None, "rope")
        shape = type(self).block.updated(block)
        if shape.ffn != "none":
            raise ValueError(f"block.ffn is {shape.ffn!r}; 'none', as the gated MLP stands in its place")

        def mixer(layer: int) -> Mixer:
            if period and layer % period == period - 1:
                return LocalMixer(d_model, n_heads, window, n_layers)
            return RecurrentMixer(d_model, width=width, n_blocks=n_blocks, d_conv=d_conv, n_layers=n_layers)

        super().__init__(mixer, d_model=d_model, n_layers=n_layers, dropout=dropout, block=block, **stack)
        for layer in self.blocks:
            layer.ffn = GatedMLP(d_model, shape.expand, dropout, n_layers)
            layer.ffn_norm = shape.make_norm(d_model)
        tie_dropout(self, shape.tie_dropout)

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "recurrent_param")
