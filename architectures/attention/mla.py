"""MLA: keys and values of all heads are computed from one small latent vector per token; only this is cached.

DeepSeek-AI 2024, arXiv:2405.04434, section 2.1. H heads of d = D / H features, d_R = rope_dim of them turned by rotary
positions beside, r = kv_rank, r' = q_rank:

    Q = rms(x W_qa) W_qb                  (B, H, L, d + d_R)     the last d_R turned; x W_q where r' is 0
    c, k_R = split(x W_kva)               (B, L, r), (B, L, d_R)  k_R turned, one for all heads
    K, V = split(rms(c) W_kvb)            (B, H, L, d) each
    A = softmax((Q_C K' + Q_R k_R') / sqrt(d + d_R))              (B, H, L, L)
    y = concat_h(A V) W_o                 (B, L, D)

No map has a bias. Recurrent mode keeps rms(c) and k_R, r + d_R numbers a token where H heads of keys and values are 2
D, and never forms K and V: W_kvb goes into the queries and behind the weighted sum of latents (the paper's absorption).

Initialisation: normal of deviation 0.43 D^-1/2, the published 0.006 at its D of 5,120; gains 1.

Departures: r and r' are D / 2 unless told, as a tenth and three tenths of D leave nothing at these widths; d_R is d /
2, as published. The bidirectional form, without the causal mask, is ours. Blocks have RMS norm and SwiGLU, without
experts.

Checked against: tensors of Hugging Face's DeepseekV3Attention, both directions, every gradient, forward and by steps
through the absorbed maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import attend, checked_width, rope
from lra.architectures._norm import RMSNorm
from lra.architectures._stack import Block, Stack
from lra.attention import fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer

State = tuple[Tensor, Tensor]


class MLAMixer(Mixer):
    """(B, L, D) -> (B, L, D). head, value: widths of a head's keys without the turned part, and of its values."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        kv_rank: int,
        q_rank: int,
        rope_dim: int,
        head: int,
        value: int,
        causal: bool,
    ) -> None:
        super().__init__()
        self.n_heads, self.rope_dim, self.head, self.value, self.causal = n_heads, rope_dim, head, value, causal
        queries = n_heads * (head + rope_dim)
        if q_rank:
            self.q_a_proj = nn.Linear(d_model, q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(q_rank, queries, bias=False)
        else:
            self.q_proj = nn.Linear(d_model, queries, bias=False)
        self.q_rank, self.kv_rank = q_rank, kv_rank
        self.kv_a_proj_with_mqa = nn.Linear(d_model, kv_rank + rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(kv_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_rank, n_heads * (head + value), bias=False)
        self.o_proj = nn.Linear(n_heads * value, d_model, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.43 * d_model**-0.5)

    def queries(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Q_C (B, H, L, d) and Q_R (B, H, L, d_R)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_rank else self.q_proj(x)
        q, turned = split_heads(q, self.n_heads).split([self.head, self.rope_dim], dim=-1)
        return q, rope(turned, start, interleaved=True)

    def latents(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """rms(c) (B, L, r) and k_R (B, L, d_R)."""
        c, turned = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope_dim], dim=-1)
        return self.kv_a_layernorm(c), rope(turned, start, interleaved=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        c, turned = self.latents(x)
        k, v = split_heads(self.kv_b_proj(c), self.n_heads).split([self.head, self.value], dim=-1)
        k = torch.cat([k, turned.unsqueeze(1).expand(-1, self.n_heads, -1, -1)], dim=-1)
        return self.o_proj(merge_heads(attend(torch.cat(self.queries(x), dim=-1), k, v, mask, causal=self.causal)))

    def cost(self, length: int) -> Cost:
        total, pairs = Cost(), self.n_heads * length**2
        for module in self.modules():
            if isinstance(module, nn.Linear):
                total += Cost.linear(length, module.in_features, module.out_features, bias=False)
        width = self.head + self.rope_dim
        other = 6.0 * length * (self.n_heads + 1) * self.rope_dim + 5.0 * length * (self.q_rank + self.kv_rank)
        return total + Cost(2.0 * pairs * (width + self.value), 5.0 * pairs + other)

    def init_state(self, batch: int) -> State:
        weight = self.o_proj.weight
        return weight.new_zeros(batch, 0, self.kv_rank), weight.new_zeros(batch, 0, self.rope_dim)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: rms(c) (B, t, r) and k_R (B, t, d_R). All heads read one key, [rms(c), k_R], and one value, rms(c)."""
        time, tokens = state[0].shape[1], x.shape[1]
        c, turned = (torch.cat(parts, dim=1) for parts in zip(state, self.latents(x, time), strict=True))
        of_keys, of_values = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)).split(
            [self.head, self.value], dim=1
        )
        q, turned_q = self.queries(x, time)
        q, k = torch.cat([q @ of_keys, turned_q], dim=-1), torch.cat([c, turned], dim=-1)
        k, v = (t.unsqueeze(1).expand(-1, self.n_heads, -1, -1) for t in (k, c))
        allowed = torch.ones(tokens, time + tokens, dtype=torch.bool, device=x.device).tril(time)
        y = fused_attention(q, k, v, allowed, scale=(self.head + self.rope_dim) ** -0.5)
        return self.o_proj(merge_heads(y @ of_values.mT)), (c, turned)


class MLA(Stack):
    """n_heads: H, a divisor of d_model. kv_rank: r, q_rank: r', d_model / 2 unless given; q_rank 0: queries are not
    compressed. rope_dim: d_R, even, half of a head unless given."""

    card = Card(
        title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        year=2024,
        url="https://arxiv.org/abs/2405.04434",
        scaling="L^2",
        causal=False,
        variants={"lite": {"q_rank": 0}},
    )
    block = Block(norm="rms", ffn="swiglu", expand=8 / 3)

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        rope_dim: int | None = None,
        **stack: Any,
    ) -> None:
        head = checked_width(d_model, n_heads, None, "none") // n_heads
        latent, of_queries = (max(1, d_model // 2) if rank is None else rank for rank in (kv_rank, q_rank))
        turned = max(2, head // 4 * 2) if rope_dim is None else rope_dim
        if latent < 1 or of_queries < 0:
            raise ValueError(f"kv_rank is {latent} and q_rank {of_queries}; at least 1 and at least 0")
        if turned < 2 or turned % 2:
            raise ValueError(f"rope_dim is {turned}; an even number, as pairs of features are turned")
        super().__init__(
            lambda _: MLAMixer(
                d_model, n_heads, kv_rank=latent, q_rank=of_queries, rope_dim=turned, head=head, value=head,
                causal=direction == "causal",
            ),
            native=True, d_model=d_model, direction=direction, **stack,
        )  # fmt: skip
