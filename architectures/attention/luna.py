"""Luna: attention through a short second sequence P, which attends to the tokens and to which the tokens attend.

Ma et al. 2021, arXiv:2106.01540. P: (l, D), learned, goes with x from layer to layer. Attn(Q, K, V) is softmax(Q K' /
sqrt(d)) V with H heads of width d = D / H. Per layer:

    Y_P = Attn(P W_pq, x W_pk, x W_pv)                     (B, l, D)       pack, over real tokens
    Y_x = Attn(x W_q, Y_P W_k, Y_P W_v) W_o                (B, L, D)       unpack, over the l rows
    x, P = norm(x + Y_x), norm_P(P + Y_P)                  then x = norm(x + ffn(x)); P has no feed-forward part

tied: W_pk = W_pv and W_k = W_v. Every map has a bias; Y_P has no output map. Causally, with f(X, Y, Z)_t = X_t
(sum_{j <= t} Y_j' Z_j) / t, and per head:

    A = log2(1 + 2^(x W_pk (P W_pq)' / sqrt(d)))           (B, H, L, l)    their softplus, of base 2
    U = softmax(f(x W_q / sqrt(d), x W_k, A))              (B, H, L, l)
    Y_x = concat_h(f(U, A, x W_v)) W_o                     (B, L, D)

There nothing may enter P: every layer reads it as learned, without a norm, as the authors' decoder layers do with what
their encoder packed. The sums of f make it a recurrence.

Initialisation: Xavier uniform, of gain 2^-1/2 but for W_o, as the authors'; zero biases, where theirs are zero in W_o
alone; P standard normal (their D^-1/2, which they scale by sqrt(D)).

Departures: GELU in the feed-forward part, as the authors for LRA. They add fixed sinusoids to P, which a learned P
holds anyway, and use only n of its l rows for a sequence of n < l tokens. `luna/prenorm` has both norms before.

Checked against: tensors of the authors' LunarMultiheadAttention (tied, untied, padding) and LunarCausalAttention,
outputs and gradients; encoders written out sequence by sequence and head by head, both places of the norm, and the
causal equations token by token, every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import checked_dropout, checked_width
from lra.architectures._checks import at_least, one_of
from lra.architectures._norm import normalised
from lra.architectures._precision import own_precision, wide
from lra.architectures._stack import Block, Layer, Stack
from lra.attention import merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer, clean_padding, fill_padding
from lra.kernels.decay_attention import decay_attention

POSITIONS = ("sinusoidal", "learned", "none")
CHUNK = 64
State = tuple[Tensor, Tensor, Tensor]


def running_mean(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """f of the equations: (B, H, L, a), (B, H, L, a), (B, H, L, b) -> (B, H, L, b)."""
    stays = wide(x.new_zeros(x.shape[1]))
    x, y, z = (t.transpose(1, 2) for t in (x, y, wide(z)))
    total = decay_attention(x, y, z, stays, CHUNK, scale=1.0)
    assert isinstance(total, Tensor)
    return total.transpose(1, 2) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


class LunaMixer(Mixer):
    """(B, L, D) -> (B, L, D), from P as it was learned: memory, (l, D), one parameter of all layers."""

    def __init__(
        self, d_model: int, *, n_heads: int, pack_heads: int, tied: bool, causal: bool, memory: nn.Parameter,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.pack_heads, self.causal = n_heads, pack_heads, causal
        self.dropout = checked_dropout(dropout)
        self.memory = memory
        self.pq_proj, self.pk_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.pv_proj = None if tied or causal else nn.Linear(d_model, d_model)
        self.q_proj, self.k_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.v_proj = None if tied else nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        for linear in (self.pq_proj, self.pk_proj, self.pv_proj, self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight, gain=1.0 if linear is self.out_proj else 2**-0.5)
                nn.init.zeros_(linear.bias)

    def pack(self, x: Tensor, mask: Tensor, p: Tensor) -> Tensor:
        """Y_P: (B, L, D), (B, L), (B, l, D) -> (B, l, D)."""
        q, k = split_heads(self.pq_proj(p), self.pack_heads), split_heads(self.pk_proj(x), self.pack_heads)
        v = k if self.pv_proj is None else split_heads(self.pv_proj(x), self.pack_heads)
        dropout = self.dropout if self.training else 0.0
        return merge_heads(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :], dropout))

    def unpack(self, x: Tensor, packed: Tensor) -> Tensor:
        """Y_x: (B, L, D), (B, l, D) -> (B, L, D)."""
        q, k, v = self._heads(x, packed)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(merge_heads(y))

    def _heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of context, by head."""
        q, k = split_heads(self.q_proj(x), self.n_heads), split_heads(self.k_proj(context), self.n_heads)
        return q, k, k if self.v_proj is None else split_heads(self.v_proj(context), self.n_heads)

    def _weights(self, x: Tensor) -> Tensor:
        """A of the equations: (B, L, D) -> (B, H, L, l)."""
        q, k = (
            split_heads(self.pq_proj(self.memory).unsqueeze(0), self.n_heads),
            split_heads(self.pk_proj(x), self.n_heads),
        )
        return F.softplus(wide((k * k.shape[-1] ** -0.5) @ q.mT), beta=math.log(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.causal:
            return self.unpack(x, self.pack(x, mask, self.memory.expand(x.shape[0], -1, -1)))
        packing = F.dropout(self._weights(x), self.dropout, self.training)
        q, k, v = self._heads(x, x)
        unpacking = running_mean(q * q.shape[-1] ** -0.5, k, packing).softmax(dim=-1)
        y = running_mean(F.dropout(unpacking, self.dropout, self.training), packing, v)
        return self.out_proj(merge_heads(y))

    def cost(self, length: int) -> Cost:
        rows, d_model = self.memory.shape
        head, own = d_model // self.n_heads, 1 if self.v_proj is None else 2
        of_tokens, of_memory = 3 if self.pv_proj is None else 4, 1
        if self.causal:
            # the queries of P are the same for all sequences
            maps = Cost.linear((of_tokens + own) * length, d_model, d_model)
            maps += Cost.linear(of_memory * rows, d_model, d_model).per_batch
            sums = 4.0 * (CHUNK * (head + rows) + 2 * head * rows)
            return maps + Cost(2.0 * length * rows * d_model, length * self.n_heads * (sums + 12.0 * rows))
        maps = Cost.linear(of_tokens * length + (of_memory + own) * rows, d_model, d_model)
        return maps + Cost(8.0 * length * rows * d_model, 5.0 * length * rows * (self.n_heads + self.pack_heads))

    def init_state(self, batch: int) -> State:
        rows, d_model = self.memory.shape
        sums = self.memory.new_zeros(batch, self.n_heads, d_model // self.n_heads, rows)
        return torch.zeros((), dtype=torch.int64, device=sums.device), sums, sums.mT.contiguous()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: how many tokens, the sums of k' A (B, H, d, l) and of A' v (B, H, l, d)."""
        x, count = x.unsqueeze(1), state[0] + 1
        packing = self._weights(x)
        q, k, v = self._heads(x, x)
        keys, values = state[1] + k.mT @ packing, state[2] + packing.mT @ v
        unpacking = ((q * q.shape[-1] ** -0.5) @ keys / count).softmax(dim=-1)
        return self.out_proj(merge_heads(unpacking @ values / count)).squeeze(1), (count, keys, values)


class Luna(Stack):
    """memory: l, rows of P. n_heads: H, a divisor of d_model. pack_heads: heads of the pack, n_heads unless given.
    tied: keys and values share a map. attention_dropout: on the weights of both attentions."""

    card = Card(
        title="Luna: Linear Unified Nested Attention",
        year=2021,
        url="https://arxiv.org/abs/2106.01540",
        scaling="L",
        causal=False,
        variants={"untied": {"tied": False}, "prenorm": {"block": {"prenorm": True}}},
    )
    block = Block(prenorm=False)

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        direction: str = "bidirectional",
        memory: int = 16,
        n_heads: int = 4,
        pack_heads: int | None = None,
        tied: bool = True,
        attention_dropout: float = 0.0,
        positions: str = "sinusoidal",
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        checked_width(d_model, n_heads, None, "none")
        at_least(1, memory=memory)
        one_of(POSITIONS, positions=positions)
        packing, causal = n_heads if pack_heads is None else pack_heads, direction == "causal"
        if packing < 1 or d_model % packing:
            raise ValueError(f"pack_heads is {packing}; a divisor of the attention's width {d_model}")
        if causal and packing != n_heads:
            raise ValueError(f"pack_heads is {packing}; the causal form has n_heads, {n_heads}, for both attentions")
        of_all = nn.Parameter(torch.randn(memory, d_model))
        super().__init__(
            lambda _: LunaMixer(
                d_model, n_heads=n_heads, pack_heads=packing, tied=tied, causal=causal, memory=of_all,
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, n_layers=n_layers, direction=direction,
            block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
        shape = type(self).block.updated(block)
        self.memory = of_all
        # where norms come after, the last would be of a P that nobody reads
        of_memory = [shape.make_norm(d_model) for _ in range(n_layers - (not shape.prenorm))]
        self.memory_norms = nn.ModuleList([] if causal else [*of_memory, nn.Identity()][:n_layers])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.causal:
            return super().forward(x, mask)
        x, mask = clean_padding(x, mask)
        x = self.enter(x)
        p = self.memory.expand(x.shape[0], -1, -1)
        for layer, norm in zip(self.blocks, self.memory_norms, strict=True):
            x, p = own_precision(x, partial(both, layer, norm, x, p, mask))
        return normalised(self.norm, x, mask)


def both(layer: Layer, memory_norm: nn.Module, x: Tensor, p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A layer on both sequences: x (B, L, D), P (B, l, D)."""
    mixer, ffn = layer.mixer, layer.ffn
    assert isinstance(mixer, LunaMixer)
    rows = torch.ones(p.shape[:2], dtype=torch.bool, device=p.device)
    h, m = (normalised(layer.norm, x, mask), normalised(memory_norm, p, rows)) if layer.prenorm else (x, p)
    h = fill_padding(h, mask)
    packed = mixer.pack(h, mask, m)
    x, p = x + layer.dropout(mixer.unpack(h, packed)), p + layer.dropout(packed)
    if not layer.prenorm:
        x, p = normalised(layer.norm, x, mask), normalised(memory_norm, p, rows)
    if ffn is not None and layer.ffn_norm is not None:
        x = layer._around(x, layer.ffn_norm, lambda h: ffn(h, mask), mask)
    return x, p
