"""xLSTM: LSTMs with exponential input gates, with connected units (sLSTM) or with a matrix as memory (mLSTM).

Beck et al. 2024, arXiv:2405.04517. Per token and head, in stabilised form: m follows the largest exponent, every sum is
held divided by exp(m).

sLSTM layer (equations 8 to 17), from x: (B, D), with x' = silu(conv(x)), a causal convolution of 4 tokens, h the cell's
own last output, and block-diagonal W and R, a block of D / heads features for each head:
    i, f = W_i x' + R_i h + b_i,  W_f x' + R_f h + b_f     exponential and sigmoid gate, before their function
    z, o = tanh(W_z x + R_z h + b_z),  sigmoid(W_o x + R_o h + b_o)
    m_t = max(log sigmoid(f) + m_{t-1}, i)                 m_0 = -inf
    c_t = exp(log sigmoid(f) + m_{t-1} - m_t) c_{t-1} + exp(i - m_t) z;   n_t the same with 1 for z
    h_t = o c_t / n_t;   y = norm of each head of h_t
    block: x = x + sLSTM(norm(x));  x = x + W_d (gelu(g) * u),  [g, u] = W_u norm(x)

mLSTM layer (equations 19 to 27), inside twice as wide, E = 2 D:
    [u, w] = W_up x,   u' = silu(conv(u)),   q, k from u', v from u by maps of blocks of 4 features
    i, f = W_i [q, k, v] + b_i,  W_f [q, k, v] + b_f       one number for each head
    C_t = exp(log sigmoid(f) + m_{t-1} - m_t) C_{t-1} + exp(i - m_t) k v^T / sqrt(E / heads);   n_t with 1 for v
    h_t = C_t^T q / (max(|n_t q|, exp(-m_t)) + 1e-6)
    y = W_down ((norm of each head of h_t + skip * u') * silu(w))
    block: x = x + mLSTM(norm(x))

Between m's the decays are at most 1: the recurrence of C and n is `decay_attention` with a 1 appended to v, and m is a
running maximum, so that an mLSTM runs over all tokens at once.

pattern: the kinds of the layers, repeated over the depth: "ms" (default), "s" (variant slstm), "m" (variant mlstm).
Released names, but for those that the released code swaps: here `igate` feeds the input gate of the sLSTM, `fgate` its
forget gate.

Initialisation: maps Gaussian with deviation sqrt(2 / 5 D), those that end a layer 2 / (n_layers sqrt(D)); R = 0,
skip = 1; mLSTM gates W = 0, b_f from 3 to 6 over the heads, b_i Gaussian with deviation 0.1, all as released. The b_f
of the sLSTM is log(u), u uniform in [1, length - 1]: memories up to the length, where the code has a fixed spread.

Departures: that bias; norms of blocks with offset. Inner widths are multiples of 64 as released.

The loop of the sLSTM is Python's: `recurrent_cell` would need this cell.

Checked against: tensors of the authors' code: both cells with all gradients, the sLSTM layer with all gradients, both
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._dropout import tie_dropout
from lra.architectures._init import chrono
from lra.architectures._norm import LayerNorm
from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop, Recurrence
from lra.architectures._stack import Block, FeedForward, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

TAPS, BLOCK, CHUNK = 4, 4, 64
Tensors = tuple[Tensor, ...]


def _rounded(width: float) -> int:
    return 64 * math.ceil(width / 64)


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal map: x (..., N I), weight (N, O, I) -> (..., N O)."""
    return torch.einsum("...ni,noi->...no", x.unflatten(-1, (len(weight), -1)), weight).flatten(-2)


def head_norm(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Layer norm of each head without offset: (..., D), weight (D,)."""
    x = x.unflatten(-1, (heads, -1))
    return F.layer_norm(x, x.shape[-1:]).flatten(-2) * weight


def short_convolution(channels: int, taps: int) -> ShortConvolution:
    weight = torch.empty(channels, 1, taps).uniform_(-(taps**-0.5), taps**-0.5)
    return ShortConvolution(channels, taps, bias=True, weight=weight)


def small(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (2 / (5 * shape[-1])) ** 0.5)


class SLSTMCell(Loop):
    """The recurrence of the sLSTM: gates (B, L, 4 D), the input's part of i, f, z, o -> h (B, L, D)."""

    def __init__(self, d_model: int, heads: int, horizon: int) -> None:
        super().__init__()
        self.d_model, self.heads = 4 * d_model, heads
        width = d_model // heads
        self.recurrent_kernel = nn.Parameter(torch.zeros(heads, 4 * width, width))
        self.bias = nn.Parameter(torch.zeros(4 * d_model))
        chrono(self.bias.data[d_model : 2 * d_model], horizon)

    def enter(self, x: Tensor) -> Tensor:
        """Gate by gate (4, heads, D / heads) to head by head (heads, 4, D / heads)."""
        by_gate = (wide(x) + self.bias).unflatten(-1, (4, self.heads, -1))
        return by_gate.transpose(-2, -3).flatten(-3)

    def weights(self) -> Tensors:
        return (self.recurrent_kernel.mT,)

    def advance(self, entering: Tensor, state: Tensors, *weights: Tensor) -> tuple[Tensor, Tensors]:
        """State: h, c, n and m, (heads, B, D / heads) each."""
        h, c, n, m = state
        own = entering.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        i, f, z, o = torch.baddbmm(own, h, weights[0]).chunk(4, dim=-1)
        log_f = F.logsigmoid(f) + m
        m = torch.maximum(log_f, i)
        f, i = torch.exp(log_f - m), torch.exp(i - m)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        return h.transpose(0, 1).flatten(1), (h, c, n, m)

    def cost(self, length: int) -> Cost:
        width = self.d_model // 4
        return Cost(8.0 * length * width**2 / self.heads, 40.0 * length * width)

    def init_state(self, batch: int) -> Tensors:
        zero = self.zeros(batch, self.d_model // 4).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return zero, zero, zero, torch.full_like(zero, -math.inf)


class SLSTMMixer(Recurrence):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, heads: int, horizon: int, taps: int = TAPS) -> None:
        super().__init__()
        self.d_model, self.heads = d_model, heads
        self.conv1d = short_convolution(d_model, taps)
        width = d_model // heads
        self.igate, self.fgate, self.zgate, self.ogate = (small(heads, width, width) for _ in range(4))
        self.cell = SLSTMCell(d_model, heads, horizon)
        self.group_norm = nn.Parameter(torch.ones(d_model))

    def chunk(self, x: Tensor, state: tuple[Tensor, Tensors]) -> tuple[Tensor, tuple[Tensor, Tensors]]:
        """State: the last taps - 1 inputs (B, taps - 1, D), and that of the cell."""
        seen, recent = self.conv1d.chunk(x, state[0].to(x.dtype))
        gates = ((seen, self.igate), (seen, self.fgate), (x, self.zgate), (x, self.ogate))
        h, cell = self.cell.chunk(torch.cat([headwise(u, w) for u, w in gates], dim=-1), state[1])
        return head_norm(h, self.group_norm, self.heads), (recent, cell)

    def cost(self, length: int) -> Cost:
        width, _, taps = self.conv1d.weight.shape
        maps = Cost(8.0 * length * width**2 / self.heads, (2.0 * taps + 15.0) * length * width)
        return maps + self.cell.cost(length)

    def init_state(self, batch: int) -> tuple[Tensor, Tensors]:
        return self.conv1d.init_state(batch), self.cell.init_state(batch)


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q, k, v: (B, L, heads, E), i and f before their functions: (B, L, heads) -> h (B, L, heads, E) and the state, C
    with n as its last column: (B, heads, E, E + 1), and m: (B, heads), both after the last token."""
    memory, m_0 = state
    # m is a running maximum of i less the sum of log f, both long sums: in float64, few as they are
    total = F.logsigmoid(f.double()).cumsum(1)
    top = torch.maximum((i.double() - total).cummax(1).values, m_0.double().unsqueeze(1))
    before = torch.cat([torch.where(m_0.isinf(), top[:, 0], m_0.double()).unsqueeze(1), top[:, :-1]], dim=1)
    input_gate, log_decay, m = torch.exp(i.double() - total - top), before - top, top + total
    narrow = memory.dtype
    keys = wide(k) * (input_gate.to(narrow) * k.shape[-1] ** -0.5).unsqueeze(-1)
    values = F.pad(wide(v), (0, 1), value=1.0)
    o, memory = decay_attention(
        wide(q), keys, values, log_decay.to(narrow), CHUNK, scale=1.0, h0=memory, return_state=True
    )  # fmt: skip
    floor = torch.exp(-m).to(narrow).unsqueeze(-1)
    h = o[..., :-1] / (torch.maximum(o[..., -1:].abs(), floor) + 1e-6)
    return h, (memory, m[:, -1].to(narrow))


class MLSTMMixer(Recurrence):
    """(B, L, D) -> (B, L, D). inner: width E of the layer; bias: of its maps."""

    def __init__(
        self, d_model: int, *, heads: int, inner: int, n_layers: int, taps: int = TAPS, block: int = BLOCK,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.heads, self.inner = d_model, heads, inner
        self.proj_up = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = short_convolution(inner, taps)
        self.q_proj, self.k_proj, self.v_proj = (small(inner // block, block, block) for _ in range(3))
        self.qkv_bias = nn.Parameter(torch.zeros(3, inner)) if bias else None
        self.igate, self.fgate = (nn.Linear(3 * inner, heads) for _ in range(2))
        self.outnorm = nn.Parameter(torch.ones(inner))
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, d_model, bias=bias)
        nn.init.normal_(self.proj_up.weight, std=(2 / (5 * d_model)) ** 0.5)
        nn.init.normal_(self.proj_down.weight, std=2 / n_layers * inner**-0.5)
        for gate in (self.igate, self.fgate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        self.fgate.bias.data.copy_(torch.linspace(3, 6, heads))

    def chunk(self, x: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        """State: the last taps - 1 inner inputs (B, taps - 1, E), C with n, and m."""
        u, gate = self.proj_up(x).chunk(2, dim=-1)
        seen, recent = self.conv1d.chunk(u, state[0].to(u.dtype))
        q, k, v = headwise(seen, self.q_proj), headwise(seen, self.k_proj), headwise(u, self.v_proj)
        if self.qkv_bias is not None:
            q, k, v = q + self.qkv_bias[0], k + self.qkv_bias[1], v + self.qkv_bias[2]
        qkv = torch.cat([q, k, v], dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        h, (memory, m) = mlstm(q, k, v, self.igate(qkv), self.fgate(qkv), (state[1], state[2]))
        h = head_norm(h.flatten(-2), self.outnorm, self.heads) + self.learnable_skip * seen
        return self.proj_down(h.to(x.dtype) * F.silu(gate)), (recent, memory, m)

    def cost(self, length: int) -> Cost:
        inner, _, taps = self.conv1d.weight.shape
        maps = Cost.linear(length, self.d_model, 2 * inner, bias=False) + Cost.linear(length, inner, self.d_model)
        block = self.q_proj.shape[-1]
        maps = maps + Cost(6.0 * length * inner * block) + 2 * Cost.linear(length, 3 * inner, self.heads)
        width = inner // self.heads
        memory = 4.0 * self.heads * (CHUNK * (2 * width + 1) / 2 + width * (width + 1))
        return maps + Cost(other=length * (memory + (2.0 * taps + 30.0) * inner))

    def init_state(self, batch: int) -> Tensors:
        width, m = self.inner // self.heads, self.zeros(batch, self.heads)
        memory = m.new_zeros(batch, self.heads, width, width + 1)
        return self.conv1d.init_state(batch), memory, torch.full_like(m, -math.inf)


class GatedFeedForward(FeedForward):
    """W_d (gelu(g) * u) with [g, u] = W_u x, without biases: the part after an sLSTM."""

    def __init__(self, d_model: int, hidden: int, dropout: float) -> None:
        super().__init__("swiglu", d_model, hidden / d_model, dropout)
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        gate, u = self.up(x).chunk(2, dim=-1)
        return self.down(self.dropout(F.gelu(gate) * u))


class XLSTM(Stack):
    """pattern: "s" and "m", the kind of each layer, repeated over the depth. heads: of either kind."""

    card = Card(
        title="xLSTM: Extended Long Short-Term Memory",
        year=2024,
        url="https://arxiv.org/abs/2405.04517",
        scaling="L",
        causal=True,
        variants={"slstm": {"pattern": "s"}, "mlstm": {"pattern": "m"}},
        exempt={
            "slstm/exports": "a Python loop over the tokens is unrolled for one length",
        },
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        pattern: str = "ms",
        heads: int = 4,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        if not pattern or set(pattern) - {"s", "m"}:
            raise ValueError(f"pattern is {pattern!r}; letters s and m, such as 'ms'")
        if heads < 1 or d_model % heads or d_model // heads < 2:
            raise ValueError(f"heads is {heads}; a divisor of d_model, {d_model}, with two features or more a head")
        inner = _rounded(2 * d_model)
        if inner % heads:
            raise ValueError(f"heads is {heads}; a divisor of {inner}, the inner width of an mLSTM")
        kinds = [pattern[layer % len(pattern)] for layer in range(n_layers)]

        def make(layer: int) -> Mixer:
            if kinds[layer] == "s":
                return SLSTMMixer(d_model, heads, length)
            return MLSTMMixer(d_model, heads=heads, inner=inner, n_layers=n_layers)

        super().__init__(make, d_model=d_model, n_layers=n_layers, length=length, dropout=dropout, block=block, **stack)
        for kind, layer in zip(kinds, self.blocks, strict=True):
            if kind == "s" and layer.ffn is None:
                layer.ffn = GatedFeedForward(d_model, _rounded(4 * d_model / 3), dropout)
                tie_dropout(layer.ffn, type(self).block.updated(block).tie_dropout)
                layer.ffn_norm = LayerNorm(d_model)
                nn.init.normal_(layer.ffn.up.weight, std=(2 / (5 * d_model)) ** 0.5)
                nn.init.normal_(layer.ffn.down.weight, std=2 / n_layers * d_model**-0.5)
