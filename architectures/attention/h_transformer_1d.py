"""H-Transformer-1D: near tokens attend to each other one by one, distant ones in groups that grow with distance.

Zhu and Soricut 2021, arXiv:2107.11906, sections 4 to 6. At level l = 0, 1, ... 2^l neighbouring tokens are one coarse
token, and N coarse tokens a block, so that b_l(i) = i // (2^l N) is the block of token i. A pair of tokens meets at the
first level at which their blocks are the same or adjacent:

    l(i, j) = min { l : |b_l(i) - b_l(j)| <= 1 }
    S_ij = q~_i . k~_j / sqrt(d)                at that level; q~, k~: of their coarse token, the mean of its two halves
    y_i = sum_j exp(S_ij) v_j / sum_j exp(S_ij)                      (B, H, L, d), over real tokens

A half without real tokens does not count. Products are between coarse tokens, of whose keys a coarse one counts as
often as it has real tokens: L tokens cost O(L N d) work and memory. Between neighbours of level l the quadrant that
level l - 1 has had is left out. Up to 2 N tokens this is full attention. Causally, tokens attend to blocks before
theirs, and q~ is the query of the first token of a coarse one, so that nothing later is seen. A step keeps queries,
keys and values of all tokens.

Initialisation: that of `transformer` (the authors': LeCun normal). N is 16, as in the paper.

Departures: each query has its own maximum in the exponentials, where the authors subtract that of the whole sequence,
which is the same function; the relative position bias of their later code is left out.

Checked against: the definition pair by pair, both directions, with padding, every gradient. The independent
implementation h-transformer-1d departs from the paper: its halves never meet, its levels have maxima of their own,
coarse keys count once. The definition with these three changes reproduces its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, checked_width
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import merge_heads
from lra.encoder import Card, Cost

LOWEST = -1e30
"""Stands for the maximum of no scores; its exponential is 0."""
POSITIONS = ("sinusoidal", "learned", "none")
State = tuple[Tensor, Tensor, Tensor]


class HMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D). size: N, even."""

    def __init__(self, d_model: int, n_heads: int, *, width: int, causal: bool, size: int, dropout: float) -> None:
        super().__init__(d_model, n_heads, width=width, positions="none", causal=causal, dropout=dropout)
        self.size = size

    def levels(self, length: int) -> int:
        """Levels until two blocks are left."""
        blocks = -(-length // self.size)
        return max(1, (blocks - 1).bit_length())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        length, levels = q.shape[2], self.levels(q.shape[2])
        q, k, v = (F.pad(t, (0, 0, 0, (self.size << levels) - length)) for t in (q, k, v))
        count = F.pad(mask, (0, q.shape[2] - length)).to(q.dtype)[:, None]  # real tokens of each coarse one
        parts = []
        for level in range(levels):
            parts.append(self.read_blocks(q, k, v, count, level))
            some = (count > 0).to(q.dtype)
            q = q[:, :, ::2] if self.causal else coarse(q, some)
            k, v, count = coarse(k, some), coarse(v, count), halves(count).sum(-1)
        maximum, y, norm = parts.pop()
        while parts:
            maximum, y, norm = (t.repeat_interleave(2, dim=2) for t in (maximum, y, norm))
            finer, more_y, more_norm = parts.pop()
            highest = torch.maximum(maximum, finer)
            before, now = (maximum - highest).exp(), (finer - highest).exp()
            maximum, y, norm = highest, before * y + now * more_y, before * norm + now * more_norm
        return (y / norm)[:, :, :length].to(v.dtype)

    def read_blocks(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the tokens of a level read at it: q, k, v: (B, H, n, d), count: (B, 1, n) -> the maximum of the scores,
        the weighted sum of values and the sum of weights: (B, H, n, 1 or d)."""
        q, k, v = (t.unflatten(2, (-1, self.size)) for t in (q, k, v))
        near = torch.where(count > 0, count, 0).log().unflatten(2, (-1, self.size))
        i = torch.arange(self.size, device=q.device).unsqueeze(1)
        j, half = i.mT, self.size // 2
        nowhere, everywhere = near.new_full((self.size, self.size), -torch.inf), near.new_zeros(self.size, self.size)
        rest = near.unsqueeze(-2)
        neighbours = [(1, rest + (everywhere if level == 0 else nowhere.where((i < half) & (j >= half), 0)))]
        if level == 0:
            own = rest + (nowhere.where(j > i, 0) if self.causal else everywhere)
            # every query sees itself, so that padding has a finite output
            neighbours.append((0, torch.where(i == j, 0, own)))
        if not self.causal:
            neighbours.append((-1, rest + (everywhere if level == 0 else nowhere.where((i >= half) & (j < half), 0))))
        bias = torch.cat([moved(t, by, -torch.inf) for by, t in neighbours], dim=-1)
        k, v = (torch.cat([moved(t, by, 0.0) for by, _ in neighbours], dim=3) for t in (k, v))
        scores = wide(q @ k.mT) * self.head**-0.5 + bias
        maximum = scores.detach().amax(-1, keepdim=True).clamp_min(LOWEST)
        weights = (scores - maximum).exp()
        y = F.dropout(weights, self.rate).to(v.dtype) @ v
        return maximum.flatten(2, 3), wide(y).flatten(2, 3), weights.sum(-1, keepdim=True).flatten(2, 3)

    def pairs(self, length: int) -> float:
        fine, coarse_ones = (2, 1) if self.causal else (3, 2)
        levels = self.levels(length)
        tokens = [self.size << (levels - level) for level in range(levels)]
        return float(self.n_heads * self.size * (fine * tokens[0] + coarse_ones * sum(tokens[1:])))

    def cost(self, length: int) -> Cost:
        tokens = self.size << self.levels(length)
        return super().cost(length) + Cost(other=5.0 * self.pairs(length) + 20.0 * tokens * self.widths[0])

    def init_state(self, batch: int) -> State:
        empty = self.out.weight.new_zeros(batch, self.n_heads, 0, self.head)
        return empty, empty, empty

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: queries, keys and values of all tokens, (B, H, t, d) each."""
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(state, self.heads(x), strict=True))
        y = self.attend(q, k, v, x.new_ones(x.shape[0], q.shape[2], dtype=torch.bool))
        return self.out(merge_heads(y[:, :, -x.shape[1] :])), (q, k, v)


def halves(weight: Tensor) -> Tensor:
    """(B, 1, n) -> (B, 1, n / 2, 2)."""
    return weight.unflatten(-1, (-1, 2))


def coarse(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted means of pairs: (B, H, n, d), (B, 1, n) -> (B, H, n / 2, d)."""
    share = halves(weight) / halves(weight).sum(-1, keepdim=True).clamp_min(1)
    return (x.unflatten(2, (-1, 2)) * share.unsqueeze(-1)).sum(3)


def moved(x: Tensor, by: int, value: float) -> Tensor:
    """Each block gets that of the block `by` places before it, or `value`: (B, H, blocks, ...)."""
    if by == 0:
        return x
    edge = torch.full_like(x[:, :, :1], value)
    return torch.cat([edge, x[:, :, :-1]] if by == 1 else [x[:, :, 1:], edge], dim=2)


class HTransformer1D(Stack):
    """size: N, coarse tokens of a block, even. n_heads: must divide qkv_dim. qkv_dim: width of all heads together,
    d_model unless given. attention_dropout: on the attention weights."""

    card = Card(
        title="H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences",
        year=2021,
        url="https://arxiv.org/abs/2107.11906",
        scaling="L",
        causal=False,
        exempt={"exports": "the hierarchy has as many levels as the logarithm of the length"},
    )

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        size: int = 16,
        n_heads: int = 4,
        qkv_dim: int | None = None,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, positions, POSITIONS)
        if size < 2 or size % 2:
            raise ValueError(f"size is {size}; an even number of tokens, as half a block is a quadrant's side")
        super().__init__(
            lambda _: HMixer(
                d_model, n_heads, width=width, causal=direction == "causal", size=size, dropout=attention_dropout
            ),
            native=True, d_model=d_model, direction=direction, block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
