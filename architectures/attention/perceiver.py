"""Perceiver: a small array of latents attends to the tokens and to itself; output queries attend to the latents.

Jaegle et al. 2021, arXiv:2103.03206, and Perceiver IO, arXiv:2107.14795. z: (N, D), learned latents. With
attend(q, kv) = W_o concat_h(softmax(Q K' / sqrt(d)) V), Q from norm(q), K and V from norm(kv), over real tokens:

    cross(q, kv):  q = q + attend(q, kv);  q = q + ffn(norm(q))
    `repeats` times:  z = cross(z, x);  n_layers times z = layer(z)         (B, N, D)     2103.03206, section 3.1
    y = cross(x, z), x the output queries                                   (B, L, D)     2107.14795, section 2.2

A layer is pre-norm self-attention and feed-forward. The latent layers are the same in each repeat, and so is cross from
the second repeat on (section 3.2). `perceiver/io` reads the tokens once. The work is linear in L.

Initialisation: z truncated normal of deviation 0.02; maps of cross LeCun normal with zero biases.

Departures: the Perceiver has one output, the mean of its latents (`perceiver/pooled`, alike at all tokens); an output
for every token is the decoder of Perceiver IO, whose queries are here the tokens with their positions. Their sum with
what they read is an option of the source (query_residual), on here. Positions are sinusoids added to the tokens, where
the paper joins Fourier features. N is 64 unless told, and a last norm follows, as in all stacks here.

Checked against: tensors of Hugging Face's PerceiverAttention and of an independent PerceiverDecoder, with the query
residual and without, gradients of inputs and parameters; the encoder from its equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import checked_dropout, checked_width
from lra.architectures._checks import at_least, one_of
from lra.architectures._dropout import Dropout, tie_dropout
from lra.architectures._norm import normalised
from lra.architectures._precision import own_precision
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Block, Stack, feed_forward
from lra.attention import fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost, clean_padding

OUTPUTS = ("queries", "mean")


class Cross(nn.Module):
    """cross of the equations. d_query, d_input: widths of q and kv; qk_dim, v_dim: of all heads together."""

    def __init__(
        self, d_query: int, *, d_input: int, qk_dim: int, v_dim: int, n_heads: int, block: Block, dropout: float,
        attention_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.attention_dropout = n_heads, checked_dropout(attention_dropout)
        self.q_norm, self.kv_norm = block.make_norm(d_query), block.make_norm(d_input)
        self.q_proj, self.k_proj = nn.Linear(d_query, qk_dim), nn.Linear(d_input, qk_dim)
        self.v_proj, self.o_proj = nn.Linear(d_input, v_dim), nn.Linear(v_dim, d_query)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        self.ffn = feed_forward(block, d_query, dropout)
        self.ffn_norm = None if self.ffn is None else block.make_norm(d_query)
        self.dropout = Dropout(dropout)

    def forward(self, q: Tensor, kv: Tensor, q_mask: Tensor, kv_mask: Tensor, *, residual: bool = True) -> Tensor:
        """q: (B, N, d_query), kv: (B, M, d_input), masks of both -> (B, N, d_query). residual: whether q is added."""
        h, inputs = normalised(self.q_norm, q, q_mask), normalised(self.kv_norm, kv, kv_mask)
        queries, keys = split_heads(self.q_proj(h), self.n_heads), split_heads(self.k_proj(inputs), self.n_heads)
        values = split_heads(self.v_proj(inputs), self.n_heads)
        rate = self.attention_dropout if self.training else 0.0
        read = fused_attention(queries, keys, values, kv_mask[:, None, None], rate)
        y = self.dropout(self.o_proj(merge_heads(read)))
        y = q + y if residual else y
        if self.ffn is not None and self.ffn_norm is not None:
            y = y + self.dropout(self.ffn(normalised(self.ffn_norm, y, q_mask), q_mask))
        return y

    def cost(self, queries: int, inputs: int) -> Cost:
        maps = Cost.linear(queries, self.q_proj.in_features, self.q_proj.out_features)
        maps += Cost.linear(queries, self.o_proj.in_features, self.o_proj.out_features)
        for linear in (self.k_proj, self.v_proj):
            maps += Cost.linear(inputs, linear.in_features, linear.out_features)
        pairs = float(queries * inputs)
        products = 2.0 * pairs * (self.q_proj.out_features + self.v_proj.out_features)
        other = 5.0 * pairs * self.n_heads + 12.0 * (queries + inputs) * self.q_proj.in_features
        return maps + Cost(products, other) + (Cost() if self.ffn is None else self.ffn.cost(queries))


class Perceiver(Stack):
    """n_latents: N. repeats: how often the latents read the tokens. output: "queries" or "mean". query_residual: the
    output queries are added to what they read. n_heads: must divide d_model. attention_dropout: on the weights of all
    attentions."""

    card = Card(
        title="Perceiver: General Perception with Iterative Attention",
        year=2021,
        url="https://arxiv.org/abs/2103.03206",
        scaling="L",
        causal=False,
        variants={"io": {"repeats": 1}, "pooled": {"output": "mean"}},
    )
    refuses_causal = True
    block = Block(expand=1.0, positions="sinusoidal")

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        direction: str = "bidirectional",
        n_latents: int = 64,
        repeats: int = 2,
        output: str = "queries",
        query_residual: bool = True,
        n_heads: int = 4,
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        checked_width(d_model, n_heads, None, "none")
        at_least(1, n_latents=n_latents, repeats=repeats)
        one_of(OUTPUTS, output=output)
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; bidirectional, latents read all tokens")
        super().__init__(
            lambda _: SoftmaxMixer(
                d_model, n_heads, width=d_model, positions="none", causal=False, dropout=attention_dropout
            ),
            native=True, d_model=d_model, dropout=dropout, direction=direction, block=block, **stack,
        )  # fmt: skip
        shape = type(self).block.updated(block)
        self.repeats, self.query_residual = repeats, query_residual
        self.latents = nn.Parameter(nn.init.trunc_normal_(torch.empty(n_latents, d_model), std=0.02))

        def cross() -> Cross:
            return Cross(
                d_model,
                d_input=d_model,
                qk_dim=d_model,
                v_dim=d_model,
                n_heads=n_heads,
                block=shape,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )

        self.first, self.again = cross(), cross() if repeats > 1 else None
        self.decoder = cross() if output == "queries" else None
        tie_dropout(self, shape.tie_dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        x = self.enter(x)
        return normalised(self.norm, own_precision(x, lambda: self._output(x, mask)), mask)

    def _output(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        all_latents = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        for repeat in range(self.repeats):
            cross = self.first if repeat == 0 or self.again is None else self.again
            z = cross(z, x, all_latents, mask)
            for layer in self.blocks:
                z = layer(z, all_latents)
        if self.decoder is None:
            return z.mean(1, keepdim=True).expand_as(x)
        return self.decoder(x, z, mask, all_latents, residual=self.query_residual)

    def cost(self, length: int) -> Cost:
        number = len(self.latents)
        total = Cost(other=5.0 * length * self.d_model) + self.first.cost(number, length)
        total += self.repeats * super().cost(number)
        if self.again is not None:
            total += (self.repeats - 1) * self.again.cost(number, length)
        return total if self.decoder is None else total + self.decoder.cost(length, number)
