"""Sinkhorn Transformer: each block of tokens attends to itself and to one block chosen by a learned soft sorting.

Tay et al. 2020, arXiv:2002.11296. With N blocks of W = `size` tokens, per head, d = qkv_dim / H:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, N, W, d)
    R_u = relu(relu(psi_u W_P + b_P) W_B + b_B)            psi: sum of x over block u, (B, N, D) -> (B, H, N, N)
    S = exp(R' / T), R' = R + Gumbel noise when training; then `iterations` times: divide rows, then columns, by their
        sums, so that S tends to a doubly stochastic matrix, a soft permutation of the blocks
    K_S, V_S = S K, S V                                    mixed block by block
    y = concat_h(softmax(Q [K_S, K]' / sqrt(d)) [V_S, V]) W_o + b_o       within each block u; (B, L, D)

Without `size`, W = round(sqrt(length)): the sorting costs L^2 / W, the attention L W, so work and memory grow with
L sqrt(L). No L x L matrix is formed.

SortCut (section 3.4), `sortcut` = n: every block is brought the same n blocks, the first of the sorted sequence.

Causal (section 3.3), a block is brought earlier blocks only, and the first one none: psi of block u is the sum of all x
up to its first token, S is 0 where v >= u, a row is divided by its sum and an entry by the sum of its column up to its
row. Within its own block a query sees no later key.

Initialisation: Xavier uniform maps and zero biases (see AttentionMixer), W_P and W_B too.

Departures: noise is drawn in training only. Blocks of padding alone are sorted among themselves, and a block that
brings mostly padding hides it (the mask of a mixed block is that of its largest share, as in the package). SortCut sees
the own block too, as in the package, and has no causal form: the blocks that it brings stand anywhere. A column's sum
over later rows would tell an output of later tokens, so that the causal form stops at the row. alibi has no meaning for
mixed keys. The LRA code multiplies a sum over all blocks instead of sorting them, and adds two softmaxes. No recurrent
mode.

The causal form did not learn to recall the first of 256 tokens in 1,100 steps; the bidirectional one takes 150.

Checked against: tensors of the package sinkhorn-transformer (balancing; the layer with its values, and with its values
mended, outputs and gradients); a loop over blocks, causal and SortCut too, outputs and gradients; softmax attention
under the explicit L x L mask of a hard permutation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._checks import at_least
from lra.architectures._precision import wide
from lra.attention import fused_attention, merge_heads
from lra.encoder import Card, Cost

HIDDEN = -1e4
"""Logit of a share that is 0: unlike -inf it has a logarithm of sums with a gradient."""


def balanced(logits: Tensor, iterations: int, *, causal: bool = False) -> Tensor:
    """exp(logits) with rows, then columns, divided by their sums, `iterations` times: (..., N, N). causal: 0 where
    v >= u, and a column's sum is that up to the row; the first row is 0."""
    if causal:
        # row u - 1 of the rest is row u, which has at least one earlier block
        later = torch.ones_like(logits[..., 1:, :-1], dtype=torch.bool).triu(1)
        logits = logits[..., 1:, :-1].masked_fill(later, HIDDEN)
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        if causal:
            logits = logits.masked_fill(later, HIDDEN)
            logits = (logits - logits.logcumsumexp(dim=-2)).masked_fill(later, HIDDEN)
        else:
            logits = logits - logits.logsumexp(dim=-2, keepdim=True)
    return F.pad(logits.exp(), (0, 1, 1, 0)) if causal else logits.exp()


def brought(sort: Tensor, blocks: Tensor) -> Tensor:
    """Mixtures of blocks: (B, H, M, N), (B, H, N, W, d) -> (B, H, M, W, d)."""
    return torch.matmul(sort, blocks.flatten(3)).unflatten(3, blocks.shape[3:])


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, sort: Tensor, dropout: float = 0.0, *, causal: bool = False,
    shared: bool = False,
) -> Tensor:  # fmt: skip
    """q, k, v: (B, H, N, W, d); real: (B, N, W) bool; sort: (B, H, N, N), row u = the shares of what block u is brought
    -> (B, H, N, W, d). shared: sort is (B, H, M, N), and every block is brought all M; causal: no key is later."""
    batch, heads, blocks, size, _ = q.shape
    given = [brought(sort, t) for t in (k, v)]
    known = real[torch.arange(batch, device=q.device)[:, None, None], sort.argmax(dim=-1)]
    if shared:
        given = [t.flatten(2, 3).unsqueeze(2).expand(-1, -1, blocks, -1, -1) for t in given]
        known = known.flatten(2).unsqueeze(2).expand(-1, -1, blocks, -1)
    # a block of padding alone sees itself: its rows are never read, but must not be a softmax over nothing
    own = (real | ~real.any(dim=-1, keepdim=True))[:, None].expand(-1, heads, -1, -1).unsqueeze(-2)
    known = known.unsqueeze(-2)
    if causal:
        known = known & (torch.arange(blocks, device=q.device) > 0)[:, None, None]
        known, own = known.expand(-1, -1, -1, size, -1), own & real.new_ones(size, size).tril()
    keys, values = (torch.cat([t, part], dim=3) for t, part in zip(given, (k, v), strict=True))
    queries, keys, values, seen = (t.flatten(0, 1) for t in (q, keys, values, torch.cat([known, own], dim=-1)))
    return fused_attention(queries, keys, values, seen, dropout).view_as(q)


class SinkhornMixer(AttentionMixer):
    """Attention to the own and to sorted blocks: (B, L, D) -> (B, L, D). size: None for the root of `length`."""

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, size: int | None, iterations: int,
        temperature: float, length: int, dropout: float = 0.0, causal: bool = False, sortcut: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=width, positions=positions, causal=causal, dropout=dropout)
        self.sortcut = sortcut
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
        sort = sort[:, :, : self.sortcut or None].to(q.dtype)
        y = sorted_attention(q, k, v, real, sort, self.rate, causal=self.causal, shared=self.sortcut > 0)
        return self.out(merge_heads(y.flatten(2, 3)))[:, :length]

    def sorting(self, x: Tensor, real: Tensor) -> Tensor:
        """S: (B, L, D), (B, N, W) -> (B, H, N, N), float32 or better. Raises ValueError beyond the longest length."""
        blocks, most = real.shape[1], self.sort.out_features // self.n_heads
        if blocks > most:
            raise ValueError(f"{blocks} blocks of {self.size} tokens; this layer was built for {most}")
        with torch.autocast(x.device.type, enabled=False):
            if self.causal:
                logits = wide(x).cumsum(1)[:, :: self.size]
            else:
                logits = wide(x).unflatten(1, (-1, self.size)).sum(dim=2)
            for layer in (self.pool, self.sort):
                logits = F.linear(logits, wide(layer.weight), wide(layer.bias)).relu()
            logits = logits.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)[..., :blocks]
            if self.training:
                noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
                logits = logits - noise
            if self.causal:
                return balanced(logits / self.temperature, self.iterations, causal=True)
            known = real.any(dim=-1)[:, None]
            apart = known[..., None] != known[:, :, None]
            return balanced((logits / self.temperature).masked_fill(apart, -torch.inf), self.iterations)

    def pairs(self, length: int) -> float:
        """Beyond the length the layer was built for: the pairs of one built for that."""
        size = self.block_size(max(length, self.length))
        blocks = -(-length // size)
        return float(self.n_heads * blocks * size * size * (1 + (min(self.sortcut, blocks) or 1)))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("Sinkhorn attention has no recurrent mode")

    def cost(self, length: int) -> Cost:
        d_model, size = self.out.out_features, self.block_size(max(length, self.length))
        blocks, columns = -(-length // size), -(-max(length, self.length) // size)
        maps = Cost.linear(blocks, d_model, d_model) + Cost.linear(blocks, d_model, self.n_heads * columns)
        rows = min(self.sortcut, blocks) or blocks
        mixing = Cost(4.0 * rows * blocks * size * self.widths[0], 10.0 * self.iterations * self.n_heads * blocks**2)
        padded = blocks * size - length
        tail = Cost.linear(padded, d_model, sum(self.widths)) + Cost.linear(padded, self.widths[0], d_model)
        return super().cost(length) + maps + mixing + tail


class Sinkhorn(AttentionStack):
    """size: W, tokens in a block, None for round(sqrt(length)). iterations: of the balancing. temperature: T, the lower
    the harder the sorting. sortcut: n, or 0 to sort a block to each block. n_heads: must divide qkv_dim, the width of
    all heads together, d_model unless given. positions: "sinusoidal", "learned", "rope", "none". attention_dropout: on
    the attention weights."""

    card = Card(
        title="Sparse Sinkhorn Attention",
        year=2020,
        url="https://arxiv.org/abs/2002.11296",
        scaling="L sqrt L",
        causal=False,
        variants={"sortcut": {"sortcut": 2}},
        exempt={
            "exports": "the number of blocks follows the length",
        },
    )
    recurrent = False

    def __init__(
        self,
        *,
        length: int,
        direction: str = "bidirectional",
        size: int | None = None,
        iterations: int = 7,
        temperature: float = 0.75,
        sortcut: int = 0,
        positions: str = "sinusoidal",
        **attention: Any,
    ) -> None:
        if positions == "alibi":
            raise ValueError("positions is 'alibi'; a sorted key is a mixture and has no distance: take another")
        at_least(0, sortcut=sortcut)
        if direction == "causal" and sortcut:
            raise ValueError("direction is 'causal'; the blocks of SortCut stand anywhere: bidirectional only")
        at_least(1, size=1 if size is None else size, iterations=iterations, length=length)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; more than 0")
        self.follows_length = size is None
        super().__init__(
            lambda _, **heads: SinkhornMixer(
                size=size, iterations=iterations, temperature=temperature, length=length, sortcut=sortcut, **heads
            ),
            length=length,
            direction=direction,
            positions=positions,
            **attention,
        )

    @property
    def scaling(self) -> str:
        return "L sqrt L" if self.follows_length else "L^2"
