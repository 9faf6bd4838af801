"""Sinkhorn Transformer: each block of tokens attends to itself and to one block that a learned soft sorting brings it.

Tay et al. 2020, arXiv:2002.11296. With N blocks of W = `size` tokens, per head, d = qkv_dim / H:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, N, W, d)
    R_u = relu(relu(psi_u W_P + b_P) W_B + b_B)            psi: sum of x over block u, (B, N, D) -> (B, H, N, N)
    S = exp(R' / T), R' = R + Gumbel noise when training; then `iterations` times: divide rows, then columns, by their
        sums, so that S tends to a doubly stochastic matrix, a soft permutation of the blocks
    K_S, V_S = S K, S V                                    mixed block by block
    y = concat_h(softmax(Q [K_S, K]' / sqrt(d)) [V_S, V]) W_o + b_o       within each block u; (B, L, D)

Without `size`, W = round(sqrt(length)): the sorting costs L^2 / W, the attention L W, so work and memory grow with
L sqrt(L). No L x L matrix is formed.

Initialisation: Xavier uniform maps and zero biases (see AttentionMixer), W_P and W_B too.

Departures: noise is drawn in training only. Blocks of padding alone are sorted among themselves, and a block that
brings mostly padding hides it (the mask of a mixed block is that of its largest share, as in the package). Causal
sorting and SortCut are not built, so there is no causal direction; alibi has no meaning for mixed keys. The LRA code
multiplies a sum over all blocks instead of sorting them, and adds two softmaxes.

Checked against: tensors of the package sinkhorn-transformer (balancing; the layer with its values, and with its values
mended, outputs and gradients); a loop over blocks, outputs and gradients; softmax attention under the explicit L x L
mask of a hard permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, added_positions, at_least, checked_width
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import fused_attention, merge_heads
from lra.encoder import Card, Cost


def balanced(logits: Tensor, iterations: int) -> Tensor:
    """exp(logits) with rows, then columns, divided by their sums, `iterations` times: (..., N, N)."""
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
    return logits.exp()


def brought(sort: Tensor, blocks: Tensor) -> Tensor:
    """For each block the mixture of blocks that the sorting brings it: (B, H, N, N), (B, H, N, W, d) -> the latter."""
    return torch.matmul(sort, blocks.flatten(3)).view_as(blocks)


def sorted_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor, sort: Tensor, dropout: float = 0.0) -> Tensor:
    """q, k, v: (B, H, N, W, d); real: (B, N, W) bool; sort: (B, H, N, N), row u = the shares of what block u is brought
    -> (B, H, N, W, d)."""
    keys, values = (torch.cat([brought(sort, t), t], dim=3) for t in (k, v))
    source = sort.argmax(dim=-1)
    batch = torch.arange(len(q), device=q.device)[:, None, None]
    # a block of padding alone sees itself: its rows are never read, but must not be a softmax over nothing
    own = (real | ~real.any(dim=-1, keepdim=True))[:, None].expand(-1, q.shape[1], -1, -1)
    seen = torch.cat([real[batch, source], own], dim=-1).unsqueeze(-2)
    queries, keys, values, seen = (t.flatten(0, 1) for t in (q, keys, values, seen))
    return fused_attention(queries, keys, values, seen, dropout).view_as(q)


class SinkhornMixer(AttentionMixer):
    """Attention to the own and to a sorted block: (B, L, D) -> (B, L, D). size: None for the root of `length`."""

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, size: int | None, iterations: int,
        temperature: float, length: int, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width, positions, causal=False, dropout=dropout)
        self.given, self.length, self.iterations, self.temperature = size, length, iterations, temperature
        self.size = self.block_size(length)
        self.pool = nn.Linear(d_model, d_model)
        self.sort = nn.Linear(d_model, n_heads * -(-length // self.size))
        for layer in (self.pool, self.sort):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def block_size(self, length: int) -> int:
        return self.given or max(1, round(length**0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError("the sorting is read from x: see forward")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length, missing = x.shape[1], -x.shape[1] % self.size
        x, mask = F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        real = mask.unflatten(1, (-1, self.size))
        sort = self.sorting(x, real).to(x.dtype)
        # what stands at padding is a bias, which would be mixed into the blocks brought to others
        q, *shared = self.heads(x)
        k, v = (t * mask[:, None, :, None] for t in shared)
        q, k, v = (t.unflatten(2, (-1, self.size)) for t in (q, k, v))
        y = sorted_attention(q, k, v, real, sort.to(q.dtype), self.rate)
        return self.out(merge_heads(y.flatten(2, 3)))[:, :length]

    def sorting(self, x: Tensor, real: Tensor) -> Tensor:
        """S: (B, L, D), (B, N, W) -> (B, H, N, N), float32 or better. Raises ValueError beyond the longest length."""
        blocks, most = real.shape[1], self.sort.out_features // self.n_heads
        if blocks > most:
            raise ValueError(f"{blocks} blocks of {self.size} tokens; this layer was built for {most}")
        with torch.autocast(x.device.type, enabled=False):
            logits = wide(x).unflatten(1, (-1, self.size)).sum(dim=2)
            for layer in (self.pool, self.sort):
                logits = F.linear(logits, wide(layer.weight), wide(layer.bias)).relu()
            logits = logits.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)[..., :blocks]
            if self.training:
                noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
                logits = logits - noise
            known = real.any(dim=-1)[:, None]
            apart = known[..., None] != known[:, :, None]
            return balanced((logits / self.temperature).masked_fill(apart, -torch.inf), self.iterations)

    def pairs(self, length: int) -> float:
        """Beyond the length the layer was built for: the pairs of one built for that."""
        size = self.block_size(max(length, self.length))
        return float(self.n_heads * -(-length // size) * size * 2 * size)

    def cost(self, length: int) -> Cost:
        d_model, size = self.out.out_features, self.block_size(max(length, self.length))
        blocks, columns = -(-length // size), -(-max(length, self.length) // size)
        maps = Cost.linear(blocks, d_model, d_model) + Cost.linear(blocks, d_model, self.n_heads * columns)
        mixing = Cost(4.0 * blocks**2 * size * self.widths[0], 10.0 * self.iterations * self.n_heads * blocks**2)
        padded = blocks * size - length
        tail = Cost.linear(padded, d_model, sum(self.widths)) + Cost.linear(padded, self.widths[0], d_model)
        return super().cost(length) + maps + mixing + tail


class Sinkhorn(Stack):
    """size: W, tokens in a block, None for round(sqrt(length)). iterations: of the balancing. temperature: T, the lower
    the harder the sorting. n_heads: must divide qkv_dim, the width of all heads together, d_model unless given.
    positions: "sinusoidal", "learned", "rope", "none". attention_dropout: on the attention weights."""

    card = Card(
        title="Sparse Sinkhorn Attention",
        year=2020,
        url="https://arxiv.org/abs/2002.11296",
        scaling="L sqrt L",
        causal=False,
    )
    refuses_causal = True

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "bidirectional",
        n_heads: int = 4,
        size: int | None = None,
        iterations: int = 7,
        temperature: float = 0.75,
        qkv_dim: int | None = None,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, positions)
        if positions == "alibi":
            raise ValueError("positions is 'alibi'; a sorted key is a mixture and has no distance: take another")
        if direction == "causal":
            raise ValueError("direction is 'causal'; the sorting looks at the whole sequence: bidirectional only")
        at_least(1, size=1 if size is None else size, iterations=iterations, length=length)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; more than 0")
        self.follows_length = size is None
        super().__init__(
            lambda _: SinkhornMixer(
                d_model, n_heads=n_heads, width=width, positions=positions, size=size, iterations=iterations,
                temperature=temperature, length=length, dropout=attention_dropout,
            ),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout,
            direction=direction, native=True, block={"positions": added_positions(positions), **(block or {})},
        )  # fmt: skip

    @property
    def scaling(self) -> str:
        return "L sqrt L" if self.follows_length else "L^2"
