"""Memorizing Transformer: local attention, and in one layer a look-up of the nearest of all earlier keys.

Wu, Rabe, Hutchins and Szegedy 2022, arXiv:2203.08913. The sequence is read in segments. Per head, with q, k of unit
length, s_h learnt, r a relative position bias (T5's) and d = qkv_dim / H:

    local    softmax of e^{s_h} q_i k_j + r_{i-j} over the tokens j <= i of this segment and the one before, times v_j
    memory   softmax of e^{s_h} q_i k_j over the `k` keys before those that score highest, times v_j    (B, H, L, d)
    y = g memory + (1 - g) local,  g = sigmoid(b_h)        section 3.2; local alone while the memory is empty
    out = concat_h(y) W_o + b_o                            (B, L, D)

The memory holds the keys and values that have left the local context, the latest `memory` of them. No gradient reaches
what was computed in an earlier segment. The search is exact. One layer has a memory, the one three quarters up.

Initialisation: maps as `transformer`, s = log 20, r and b 0.

Departures: a sequence is all its memory remembers; the paper carries it over from one part of a document to the next.
The paper's memory also holds the segment before, which is in the local context too. Where it says nothing: s is one
number a head, as in the code compared with. Bidirectional: two such mixers, one each way.

Checked against: tensors of a public layer, whose memories and segments were joined by the paper's gate: output; its
retrieved memories; a float64 loop over the tokens, every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, checked_width
from lra.architectures._checks import at_least
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import merge_heads
from lra.encoder import Card, Cost

BUCKETS, FARTHEST = 32, 128
State = tuple[Tensor, Tensor, Tensor]


def buckets(distance: Tensor) -> Tensor:
    """T5's bucket of a distance to an earlier token: one each up to 15, then wider ones up to FARTHEST."""
    exact = BUCKETS // 2
    ratio = (distance.clamp(min=exact) / exact).log() / math.log(FARTHEST / exact)
    return torch.where(distance < exact, distance, (exact + (ratio * exact).long()).clamp(max=BUCKETS - 1))


class MemorizingMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed. memory: 0 for local attention."""

    def __init__(
        self, d_model: int, n_heads: int, width: int, *, segment: int, k: int, memory: int, dropout: float,
        n_kv_heads: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model, n_heads, width=width, positions="none", causal=True, n_kv_heads=n_kv_heads, dropout=dropout
        )
        self.segment, self.k, self.memory = segment, k, memory
        self.log_scale = nn.Parameter(torch.full((n_heads, 1, 1), math.log(20.0)))
        self.relative = nn.Parameter(torch.zeros(n_heads, BUCKETS))
        self.gate_bias = nn.Parameter(torch.zeros(n_heads)) if memory else None

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x, start)
        return F.normalize(wide(q), dim=-1), F.normalize(wide(k), dim=-1), wide(v)

    def bias(self, queries: int, keys: int) -> Tensor:
        """Of the last `queries` of `keys` tokens to all of them, -inf ahead: (H, queries, keys)."""
        i = torch.arange(keys, device=self.relative.device)
        distance = i[keys - queries :, None] - i
        return self.relative[:, buckets(distance.clamp(min=0))].masked_fill(distance < 0, -torch.inf)

    def local(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q: (B, H, n, d); k, v: (B, H or 1, t, d); bias: (H, n, t) -> (B, H, n, d)."""
        scores = q @ k.mT * self.log_scale.exp() + bias
        return F.dropout(scores.softmax(-1), self.rate) @ v

    def nearest(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and places of the best memories: (B, H, n, d), (B, H or 1, m, d) -> two (B, H, n, min(k, m))."""
        best = (q @ k.mT * self.log_scale.exp()).topk(min(self.k, k.shape[2]), dim=-1)
        return best.values, best.indices

    def recalled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, places = self.nearest(q, k)
        weights = F.dropout(scores.softmax(-1), self.rate)
        return weights.new_zeros(*scores.shape[:3], k.shape[2]).scatter(-1, places, weights) @ v

    def joined(self, memory: Tensor, local: Tensor) -> Tensor:
        assert self.gate_bias is not None
        gate = self.gate_bias.sigmoid()[:, None, None]
        return gate * memory + (1 - gate) * local

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Of each segment that tokens `start` to `stop` touch: first and last + 1 of these tokens in it, first of its
        local context and first of its memory."""
        at = start
        while at < stop:
            until = min(stop, (at // self.segment + 1) * self.segment)
            yield at, until, (local := max(0, (at // self.segment - 1) * self.segment)), max(0, local - self.memory)
            at = until

    def oldest(self, i: int) -> int:
        return max(0, (i // self.segment - 1) * self.segment - self.memory)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.read_segments(q, k, v, 0).to(self.out.weight.dtype)

    def read_segments(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Of the last tokens of k and v, whose queries q are, the first at `start`: (B, H, n, d)."""
        stop, rows = start + q.shape[2], []
        first = stop - k.shape[2]  # position of the first key
        with torch.autocast(q.device.type, enabled=False):
            for at, until, local, memory in self.parts(start, stop):
                began = at - at % self.segment - first
                before, own = slice(local - first, began), slice(began, until - first)
                keys, values = (torch.cat([t[:, :, before].detach(), t[:, :, own]], dim=2) for t in (k, v))
                mine = q[:, :, at - start : until - start]
                y = self.local(mine, keys, values, self.bias(until - at, until - local))
                if self.memory and local > memory:
                    keys, values = (t[:, :, memory - first : local - first].detach() for t in (k, v))
                    y = self.joined(self.recalled(mine, keys, values), y)
                rows.append(y)
        return torch.cat(rows, dim=2)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        start = int(state[2])
        stop = start + x.shape[1]
        q, k, v = self.heads(x, start)
        k, v = torch.cat([state[0].to(k), k], dim=2), torch.cat([state[1].to(v), v], dim=2)
        y = self.read_segments(q, k, v, start)
        gone = max(0, self.oldest(stop) - (stop - k.shape[2]))
        return self.out(merge_heads(y.to(x.dtype))), (k[:, :, gone:], v[:, :, gone:], state[2] + x.shape[1])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def pairs(self, length: int) -> float:
        parts = self.parts(0, length)
        return float(self.n_heads * sum((stop - at) * (stop - memory) for at, stop, _, memory in parts))

    def cost(self, length: int) -> Cost:
        # the softmax, the search, and the relative bias, which sequences share
        local = self.n_heads * sum((stop - at) * (stop - place) for at, stop, place, _ in self.parts(0, length))
        return super().cost(length) + Cost(other=5.0 * self.pairs(length), batch_other=2.0 * local)


class Memorizing(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. segment: tokens of one;
    an eighth of `length` unless given, at most 512. k: memories a query reads. memory: the most that a memory holds.
    memory_layers: which layers have one, counted from 0."""

    card = Card(
        title="Memorizing Transformers",
        year=2022,
        url="https://arxiv.org/abs/2203.08913",
        scaling="L",
        causal=True,
        exempt={"exports": "a Python loop over the segments is unrolled for one length"},
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        n_heads: int = 4,
        qkv_dim: int | None = None,
        segment: int | None = None,
        k: int = 32,
        memory: int = 8192,
        memory_layers: tuple[int, ...] | None = None,
        attention_dropout: float = 0.0,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        size = min(512, max(1, length // 8)) if segment is None else segment
        at_least(1, segment=size, k=k, memory=memory)
        chosen = ((3 * n_layers - 1) // 4,) if memory_layers is None else tuple(memory_layers)
        if not all(0 <= layer < n_layers for layer in chosen):
            raise ValueError(f"memory_layers is {list(chosen)}; from 0 to {n_layers - 1}")
        super().__init__(
            lambda layer: MemorizingMixer(
                d_model, n_heads, width, segment=size, k=k, memory=memory if layer in chosen else 0,
                dropout=attention_dropout,
            ),
            d_model=d_model, n_layers=n_layers, length=length, **stack,
        )  # fmt: skip
