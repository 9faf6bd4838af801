"""Softmax attention with learned relative positions: T5's buckets of distances, and the vectors of Shaw et al."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._softmax import SoftmaxMixer
from lra.attention import attention_mask, fused_attention
from lra.encoder import Cost


def buckets(ago: Tensor, causal: bool, number: int = 32, farthest: int = 128) -> Tensor:
    """T5's bucket of each distance `ago` = i - j, int64: one bucket a distance for half of them, then in the logarithm
    up to `farthest`. Causal, distances below 0 are 0; otherwise half of the `number` buckets are theirs."""
    number = number if causal else number // 2
    sign = torch.zeros_like(ago) if causal else (ago < 0).long() * number
    distance = ago.clamp_min(0) if causal else ago.abs()
    exact = number // 2
    far = torch.log(distance.clamp_min(1).double() / exact) / math.log(farthest / exact) * (number - exact)
    return sign + torch.where(distance < exact, distance, (exact + far.long()).clamp_max(number - 1))


class T5Mixer(SoftmaxMixer):
    """softmax(q k' + b) v without a scale, b_ij = table[bucket(i - j)], one number a head: (B, L, D) -> (B, L, D).

    table: (buckets, H), one parameter of all layers. Initialisation, T5's: normal, W_q of deviation (D d)^-1/2, which
    takes the place of the scale, W_k, W_v and the table D^-1/2, W_o (H d)^-1/2.
    """

    scale = 1.0

    def __init__(
        self, d_model: int, n_heads: int, *, width: int, causal: bool, table: nn.Parameter, farthest: int,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=width, positions="none", causal=causal, dropout=dropout)
        self.relative_attention_bias, self.farthest = table, farthest
        q, k, v = self.qkv.weight.split(self.widths)
        for weight, inputs in ((q, d_model * self.head), (k, d_model), (v, d_model), (self.out.weight, width)):
            nn.init.normal_(weight, std=inputs**-0.5)

    def bias(self, tokens: int, keys: int) -> Tensor:
        """b of the last `tokens` of so many keys: (H, tokens, keys)."""
        ago = torch.arange(keys - 1, -tokens - 1, -1, device=self.out.weight.device)
        table = self.relative_attention_bias
        of_distances = table[buckets(ago, self.causal, len(table), self.farthest)].T
        # rows that each start one distance earlier than the row before: cut from copies of all, one after the other
        rows, distances = of_distances.unsqueeze(1).expand(-1, tokens, -1).flatten(1), keys + tokens
        rows = rows[:, tokens - 1 : tokens * distances - 1]
        return rows.unflatten(1, (tokens, distances - 1))[..., :keys]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        allowed = attention_mask(mask, causal=self.causal)
        bias = self.bias(q.shape[2], k.shape[2]).to(q.dtype).masked_fill(~allowed, -torch.inf)
        return fused_attention(q, k, v, bias, self.rate, scale=self.scale)

    def cost(self, length: int) -> Cost:
        return super().cost(length) + Cost(other=2.0 * self.pairs(length))

    def _bias(self, time: int, tokens: int, first: int, like: Tensor) -> Tensor:
        return super()._bias(time, tokens, first, like) + self.bias(tokens, time + tokens - first).to(like.dtype)


class ShawMixer(SoftmaxMixer):
    """Keys and values moved by learned vectors of the distance, c = clip(j - i, -K, K): (B, L, D) -> (B, L, D).

        A_ij = softmax_j(q_i (k_j + a^K_c)' / sqrt(d)),   y_i = sum_j A_ij (v_j + a^V_c)

    a^K, a^V: (2 K + 1, d), row 0 for the farthest to the left, shared by the heads of a layer; Xavier uniform. The
    products with them are one per clipped distance, not one per pair. Causal, no distance is positive: (K + 1, d).
    """

    def __init__(
        self, d_model: int, n_heads: int, *, width: int, causal: bool, farthest: int, dropout: float = 0.0
    ) -> None:
        super().__init__(d_model, n_heads, width=width, positions="none", causal=causal, dropout=dropout)
        self.left, self.right = farthest, 0 if causal else farthest
        self.rel_k_embed, self.rel_v_embed = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.left + 1 + self.right, self.head))) for _ in "kv"
        )

    def related(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """Of the last queries to all keys: (B, H, C, d), (B, H, t, d) twice, (..., C, t) bool -> (B, H, C, d)."""
        tokens, keys = q.shape[2], k.shape[2]
        i = torch.arange(keys - tokens, keys, device=q.device).unsqueeze(1)
        c = (torch.arange(keys, device=q.device) - i).clamp(-self.left, self.right) + self.left
        c = c.expand(*q.shape[:2], -1, -1)
        scores = q @ k.mT + (q @ self.rel_k_embed.T).gather(-1, c)
        a = (scores * self.head**-0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        a = F.dropout(a, self.rate)
        of_distances = a.new_zeros(*q.shape[:3], len(self.rel_v_embed)).scatter_add(-1, c, a)
        return a @ v + of_distances @ self.rel_v_embed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.related(q, k, v, attention_mask(mask, causal=self.causal))

    def cost(self, length: int) -> Cost:
        vectors = len(self.rel_k_embed) * self.head
        return super().cost(length) + Cost(4.0 * self.n_heads * length * vectors, 2.0 * self.pairs(length))

    def read(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return self.related(q, k, v, bias > -torch.inf)
