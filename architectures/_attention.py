"""Shared by the attention files: the mixer around a pattern, rotary and ALiBi positions, and the fused softmax path.

Heads are laid out (B, H, L, d). Masks are boolean, True = may look; `mask` is always the right-padding mask (B, L).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._table import Tables
from lra.attention import attention_mask, fused_attention, merge_heads, repeat_heads, split_heads
from lra.encoder import Cost, Mixer, keep_linear
from lra.kernels.band_attention import band_attention

POSITIONS = ("sinusoidal", "learned", "rope", "alibi", "none")

SPARE = 8
"""Features added to a head to carry the padding: one is used, eight keep fused kernels aligned."""


def checked_width(
    d_model: int, n_heads: int, qkv_dim: int | None, positions: str, known: tuple[str, ...] = POSITIONS
) -> int:
    """Width of all heads together: `qkv_dim`, or d_model unless given. Raises ValueError where heads or positions do
    not fit it."""
    width = d_model if qkv_dim is None else qkv_dim
    if n_heads < 1 or width < 1 or width % n_heads:
        raise ValueError(f"n_heads is {n_heads}; a divisor of the attention's width {width}")
    if positions not in known:
        raise ValueError(f"positions is {positions!r}; one of {', '.join(known)}")
    if positions == "rope" and width // n_heads % 2:
        raise ValueError(f"positions 'rope' turns pairs of features; a head has {width // n_heads}, an odd number")
    return width


def added_positions(positions: str) -> str:
    """Positions that the stack adds to its input; all others act inside the attention."""
    return positions if positions in ("sinusoidal", "learned") else "none"


def checked_dropout(rate: float) -> float:
    """`rate` itself. Raises ValueError where it is no share of attention weights."""
    if not 0 <= rate < 1:
        raise ValueError(f"attention_dropout is {rate}; from 0 up to, not including, 1")
    return rate


def drop_keys(v: Tensor, rate: float) -> Tensor:
    """Dropout on attention weights that are never formed: leave a key out for all queries of its head, v: (B, H, L, d).
    Normalising sums stay those of all keys, as with dropout on each weight."""
    return v * F.dropout(torch.ones_like(v[..., :1]), rate) if rate else v


def banded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *pattern: Any, **options: Any) -> Tensor:
    """`band_attention` with its pattern and options, over heads laid out (B, H, L, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return band_attention(q, k, v, mask, *pattern, **options).transpose(1, 2)


class AttentionMixer(Tables, Mixer):
    """Multi-head attention over a pattern that `attend` computes: (B, L, D) -> (B, L, D).

    width: of all query heads together; n_kv_heads: of keys and values, each shared by n_heads / n_kv_heads consecutive
    query heads; dropout: on the attention weights. Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o, as
    the LRA code, so that Q K' / sqrt(d) has unit variance for normalised inputs and the softmax starts soft; zero
    biases, which that code leaves out.
    """

    slopes: Tensor | None
    scale: float | None = None
    """Factor of the scores; d^-1/2 if None."""

    def __init__(
        self, d_model: int, n_heads: int, *, width: int, positions: str, causal: bool, n_kv_heads: int | None = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dropout = checked_dropout(dropout)
        self.n_heads, self.n_kv_heads, self.causal = n_heads, n_kv_heads or n_heads, causal
        self.head, self.rotary = width // n_heads, positions == "rope"
        self.widths = width, self.n_kv_heads * self.head, self.n_kv_heads * self.head
        self.qkv = nn.Linear(d_model, sum(self.widths))
        self.out = nn.Linear(width, d_model)
        for weight in (*self.qkv.weight.split(self.widths), self.out.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("slopes", None)
        if positions == "alibi":
            self.register_table("slopes", alibi_slopes, n_heads)

    @property
    def rate(self) -> float:
        """Probability of dropout on the attention weights; 0 when not training."""
        return self.dropout if self.training else 0.0

    unit = "heads"

    @property
    def units(self) -> int:
        """Heads that can be removed: 0 where heads share keys, or have parameters beside those of the maps."""
        maps = {id(p) for p in (*self.qkv.parameters(), *self.out.parameters())}
        plain = self.n_kv_heads == self.n_heads and all(id(p) in maps for p in self.parameters())
        return self.n_heads if plain else 0

    @property
    def reader(self) -> nn.Linear:
        return self.out

    def keep(self, units: Tensor) -> None:
        columns = torch.arange(self.widths[0], device=units.device).view(self.n_heads, -1)[units].flatten()
        keep_linear(self.qkv, rows=torch.cat([columns + part * self.widths[0] for part in range(3)]))
        keep_linear(self.out, columns=columns)
        self.n_heads = self.n_kv_heads = len(units)
        self.widths = (len(columns),) * 3
        if self.slopes is not None:
            self.slopes = self.slopes[units]

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q: (B, H, L, d); k, v: (B, n_kv_heads, L, d); mask: (B, L) -> (B, H, L, d)."""

    @abstractmethod
    def pairs(self, length: int) -> float:
        """Pairs of query and key computed for one sequence, over all heads."""

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D), the first of whose tokens stands at `start` -> queries, keys and values by head."""
        counts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (split_heads(part, count) for part, count in zip(parts, counts, strict=True))
        return (rope(q, start), rope(k, start), v) if self.rotary else (q, k, v)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(merge_heads(self.attend(q, k, v, mask)))

    def cost(self, length: int) -> Cost:
        d_model, pairs = self.out.out_features, self.pairs(length)
        linear = Cost.linear(length, d_model, sum(self.widths)) + Cost.linear(length, self.widths[0], d_model)
        turning = 6.0 * length * sum(self.widths[:2]) if self.rotary else 0.0
        return linear + Cost(4.0 * self.head * pairs, (5.0 if self.slopes is None else 8.0) * pairs + turning)

    def sees(self, i: int, j: Tensor) -> Tensor | None:
        """Recurrent mode: which keys at positions j: (t,), none after i, query i sees, (H or 1, t) bool; None: all."""
        return None

    def oldest(self, i: int) -> int:
        """Recurrent mode: the first position that a query at i or later may look at."""
        return 0

    def read(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Recurrent mode: (B, H, C, d), (B, H, t, d) twice, (1, H, C, t), -inf at hidden keys -> (B, H, C, d)."""
        return fused_attention(q, k, v, bias, self.rate, scale=self.scale)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        empty = self.out.weight.new_zeros(batch, self.n_kv_heads, 0, self.head)
        return empty, empty, torch.zeros((), dtype=torch.int64, device=empty.device)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """State: keys and values that may still be looked at, two (B, n_kv_heads, t, d), and the time."""
        time = int(state[2])
        q, k, v = self.heads(x.unsqueeze(1), time)
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        first = time + 1 - keys.shape[2]
        bias = self._bias(time, 1, first, q).view(1, self.n_kv_heads, -1, keys.shape[2])
        # queries that share a key head are rows of one product
        q = q.flatten(1).unflatten(1, (self.n_kv_heads, -1, self.head))
        y = self.read(q, keys, values, bias)
        gone = max(0, self.oldest(time + 1) - first)
        return self.out(y.flatten(1)), (keys[:, :, gone:], values[:, :, gone:], state[2] + 1)

    def chunk(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        time, tokens = int(state[2]), x.shape[1]
        q, k, v = self.heads(x, time)
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        first = time + tokens - keys.shape[2]
        if time == 0:
            y = self.attend(q, k, v, x.new_ones(x.shape[:2], dtype=torch.bool))
        else:
            bias = self._bias(time, tokens, first, q)
            keys_of_all, values_of_all = (repeat_heads(t, self.n_heads) for t in (keys, values))
            y = self.read(q, keys_of_all, values_of_all, bias[None])
        gone = max(0, self.oldest(time + tokens) - first)
        return self.out(merge_heads(y)), (keys[:, :, gone:], values[:, :, gone:], state[2] + tokens)

    def _bias(self, time: int, tokens: int, first: int, like: Tensor) -> Tensor:
        """Bias of queries from position `time` to the keys from `first` up to the last query: (H, tokens, t)."""
        i = torch.arange(time, time + tokens, device=like.device)[:, None]
        j = torch.arange(first, time + tokens, device=like.device)
        bias = like.new_zeros(self.n_heads, tokens, len(j))
        if self.slopes is not None:
            bias = bias - (self.slopes[:, None, None] * (i - j)).to(bias.dtype)
        rows = [self.sees(time + row, j) for row in range(tokens)]
        everything = torch.ones_like(j, dtype=torch.bool).expand(self.n_heads, -1)
        seen = torch.stack([everything if r is None else r.expand(self.n_heads, -1) for r in rows], dim=1)
        return bias.masked_fill(~seen | (j > i), -torch.inf)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, causal: bool = False, slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """softmax(q k' / sqrt(d) + bias) v over real keys, fused: q, k, v: (B, H, L, d), mask: (B, L) -> (B, H, L, d).

    slopes: (H,) of ALiBi. Under a causal mask no real query reaches right padding, so no padding mask is built.
    """
    if slopes is None:
        padding = None if causal else attention_mask(mask)
        return fused_attention(q, k, v, padding, dropout, is_causal=causal)
    scale, width = q.shape[-1] ** -0.5, v.shape[-1]
    if not causal:
        # the padding rides as one more feature of q and k, so that the bias has no batch dimension: B times less memory
        hidden = torch.where(mask, 0.0, -3e4).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
        q, v = F.pad(F.pad(q, (0, 1), value=1.0), (0, SPARE - 1)), F.pad(v, (0, SPARE))
        k = F.pad(torch.cat([k, hidden], dim=-1), (0, SPARE - 1))
    bias = alibi_bias(slopes, mask.shape[1], causal).to(q.dtype)
    return fused_attention(q, k, v, bias[None], dropout, scale=scale)[..., :width]


def alibi_slopes(heads: int) -> Tensor:
    """arXiv:2108.12409: 2^(-8 i / H), i = 1..H; for H not a power of two, those of the power p below, then every
    second one of the series of 2p. -> (H,) float64."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)][: heads - power]
    return torch.tensor(slopes, dtype=torch.float64)


def alibi_bias(slopes: Tensor, length: int, causal: bool) -> Tensor:
    """-slope |i - j|, and -inf ahead of the query when causal: (H,) -> (H, L, L). Symmetric distance is how the
    authors of ALiBi extend it to encoders."""
    i = torch.arange(length, device=slopes.device)
    bias = -slopes[:, None, None] * (i[:, None] - i).abs()
    return bias.masked_fill(i[:, None] < i, -torch.inf) if causal else bias


def rope(x: Tensor, start: int = 0, *, base: float = 10000.0, interleaved: bool = False) -> Tensor:
    """Rotary positions of arXiv:2104.09864: rotate feature pairs by (start + t) base^(-2j/d): (..., L, d), d even.

    Pairs are (j, j + d/2) as in GPT-NeoX and LLaMA; `interleaved`: (2j, 2j + 1) as in the paper. The two differ by a
    fixed permutation of the rows of the query and key maps.
    """
    half = x.shape[-1] // 2
    # float64 angles: float32 is off by 1e-3 rad at position 16,384
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device)[:, None] * rate
    kind = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)
