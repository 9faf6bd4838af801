"""Synthesizer: attention weights that do not compare tokens: learned per position, or computed from one token.

Tay et al. 2020, arXiv:2005.00743. With d = qkv_dim / H, N = `length`, logits B: (B, H, L, L) and per head:

    V = x W_v + b_v                                        (B, L, D) -> (B, H, L, d)
    y = softmax(B) V,  out = concat_h(y) W_o + b_o         (B, L, D)

`logits` names what is added up to B (sequences of L tokens use the first L of N rows and columns):

    "dense"        B_i = relu(x_i W_1 + b_1) W_2 + b_2     W_1: (D, H d), W_2: (d, N) for all heads    section 3.1
    "random"       B = R                                   R: (H, N, N), trained                       section 3.2
    "factorised"   B = R_1 R_2                             R_1: (H, N, k), R_2: (H, k, N)              section 3.2
    "dot"          B = Q K' / sqrt(d)                      for mixtures such as "random+dot"           section 3.3

All but "random" are products of a few features and go through the fused softmax; no L x L matrix is stored for them.

Initialisation: Xavier uniform for W_v, W_o, W_1, W_2, W_q and W_k, zero biases. R, R_1 and R_2 are normal with logits
of variance 1: soft weights, other in every head; the paper gives none, the LRA code draws them Xavier uniform.

Departures: norms come before each part, and W_2 serves all heads, as in the LRA code, which reads the dense logits in
the wrong order of heads and positions, and without "dot" attends to padding; here padding is never attended to. The
parts of a mixture are added without the learned weights of section 3.3, as in the LRA code.

Checked against: tensors of LRA's layer in five modes, outputs and gradients, the dense ones with the order put right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import checked_dropout
from lra.architectures._checks import at_least, one_of
from lra.architectures._stack import Stack
from lra.attention import merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer

LOGITS = ("dense", "random", "factorised", "dot")
POSITIONS = ("sinusoidal", "learned", "none")
ALIGNED = 8


class SynthesizerMixer(Mixer):
    """(B, L, D) -> (B, L, D). parts: of LOGITS; size: N; k: rank of the factorised logits."""

    def __init__(
        self, d_model: int, *, n_heads: int, qkv_dim: int, parts: tuple[str, ...], size: int, k: int, causal: bool,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dropout = checked_dropout(dropout)
        self.n_heads, self.parts, self.size, self.causal = n_heads, parts, size, causal
        head = qkv_dim // n_heads
        self.value = nn.Linear(d_model, qkv_dim)
        self.out = nn.Linear(qkv_dim, d_model)
        self.dense_syn = nn.Linear(d_model, qkv_dim) if "dense" in parts else None
        self.dense_syn_len = nn.Linear(head, size) if "dense" in parts else None
        self.query_key = nn.Linear(d_model, 2 * qkv_dim) if "dot" in parts else None
        for layer in (self.value, self.out, self.dense_syn, self.dense_syn_len, self.query_key):
            if layer is not None:
                for weight in layer.weight.chunk(2 if layer is self.query_key else 1):
                    nn.init.xavier_uniform_(weight)
                nn.init.zeros_(layer.bias)
        factors = "factorised" in parts
        self.random1 = nn.Parameter(torch.randn(n_heads, size, k) * k**-0.25) if factors else None
        self.random2 = nn.Parameter(torch.randn(n_heads, k, size) * k**-0.25) if factors else None
        self.random = nn.Parameter(torch.randn(n_heads, size, size)) if "random" in parts else None
        used = head * (("dense" in parts) + ("dot" in parts)) + ("dense" in parts) + (k if factors else 0) + 1
        self.width = -(-max(head, used) // ALIGNED) * ALIGNED

    def _features(self, x: Tensor, start: int, known: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features whose products are the logits: of queries (B, H, n, W) at `start`, ..., of all keys (B, H, t, W),
        and the keys of "dot", those of earlier tokens, `known`, included; mask: (B, t) real keys."""
        batch, total, heads = x.shape[0], mask.shape[1], self.n_heads
        # the padding rides as a feature: a mask would keep the kernel from sharing one bias over the batch
        hidden = torch.where(mask, 0.0, -3e4).to(x.dtype)[:, None, :, None].expand(-1, heads, -1, -1)
        queries, keys = [x.new_ones(batch, heads, x.shape[1], 1)], [hidden]
        dots = x.new_zeros(batch, heads, total, 0)
        if self.dense_syn is not None and self.dense_syn_len is not None:
            queries.append(F.pad(split_heads(F.relu(self.dense_syn(x)), heads), (0, 1), value=1.0))
            wanted = torch.cat([self.dense_syn_len.weight, self.dense_syn_len.bias.unsqueeze(1)], dim=1)[:total]
            keys.append(wanted.expand(batch, heads, -1, -1))
        if self.random1 is not None and self.random2 is not None:
            queries.append(self.random1[:, start : start + x.shape[1]].expand(batch, -1, -1, -1))
            keys.append(self.random2[..., :total].mT.expand(batch, -1, -1, -1))
        if self.query_key is not None:
            q, dots = (split_heads(part, heads) for part in self.query_key(x).chunk(2, dim=-1))
            dots = dots if known is None else torch.cat([known, dots], dim=2)
            queries.append(q * q.shape[-1] ** -0.5)
            keys.append(dots)
        one, two = (torch.cat([t.to(x.dtype) for t in parts], dim=-1) for parts in (queries, keys))
        return F.pad(one, (0, self.width - one.shape[-1])), F.pad(two, (0, self.width - two.shape[-1])), dots

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        """(B, H, n, W), (B, H, t, W), (B, H, t, d) -> (B, n, D)."""
        head = v.shape[-1]
        v = F.pad(v.to(q.dtype), (0, self.width - head))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=causal, scale=1.0)
        return self.out(merge_heads(y[..., :head]))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.size:
            raise ValueError(f"length {length} exceeds the {self.size} positions this encoder has logits for")
        q, k, _ = self._features(x, 0, None, mask)
        bias = None
        if self.random is not None:
            bias = self.random[:, :length, :length].to(q.dtype)[None]
            if self.causal:
                ahead = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
                bias = bias.masked_fill(ahead, -torch.inf)
        return self._attend(q, k, split_heads(self.value(x), self.n_heads), bias, self.causal and bias is None)

    def cost(self, length: int) -> Cost:
        qkv_dim, d_model = self.out.in_features, self.out.out_features
        maps = 2 + ("dense" in self.parts) + 2 * ("dot" in self.parts)
        linear = Cost.linear(length, d_model, qkv_dim) * maps
        softmax = (5.0 if self.random is None else 6.0) * self.n_heads * length**2
        return linear + Cost(4.0 * length**2 * self.n_heads * self.width, softmax)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        empty = self.out.weight.new_zeros(batch, self.n_heads, 0, self.out.in_features // self.n_heads)
        return empty, (empty if "dot" in self.parts else empty[..., :0])

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: values so far (B, H, t, d), and keys of "dot", of width 0 without it."""
        time = state[0].shape[2]
        x = x.unsqueeze(1)
        q, k, dots = self._features(x, time, state[1], x.new_ones(x.shape[0], time + 1, dtype=torch.bool))
        values = torch.cat([state[0], split_heads(self.value(x), self.n_heads)], dim=2)
        bias = None if self.random is None else self.random[None, :, time : time + 1, : time + 1].to(q.dtype)
        return self._attend(q, k, values, bias, causal=False).squeeze(1), (values, dots)


class Synthesizer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. logits: of LOGITS, with
    "+" between; "random" has H length^2 parameters a layer. k: rank of the factorised logits.
    attention_dropout: on the attention weights."""

    gaps = True
    card = Card(
        title="Synthesizer: Rethinking Self-Attention in Transformer Models",
        year=2020,
        url="https://arxiv.org/abs/2005.00743",
        scaling="L^2",
        causal=False,
        variants={
            "dense": {"logits": "dense"},
            "random": {"logits": "random"},
            "factorised": {"logits": "factorised"},
            "mixed": {"logits": "factorised+dot"},
        },
        exempt={
            "exports": "torch.export makes a case of its own of the full length",
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        logits: str = "factorised",
        k: int = 8,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = d_model if qkv_dim is None else qkv_dim
        if n_heads < 1 or width < 1 or width % n_heads:
            raise ValueError(f"n_heads is {n_heads}; a divisor of the attention's width {width}")
        parts = tuple(logits.split("+"))
        if len(set(parts)) < len(parts) or not set(parts) <= set(LOGITS):
            raise ValueError(f"logits is {logits!r}; some of {', '.join(LOGITS)}, each once, with + between")
        one_of(POSITIONS, positions=positions)
        at_least(1, k=k)
        causal = direction == "causal"
        super().__init__(
            lambda _: SynthesizerMixer(
                d_model, n_heads=n_heads, qkv_dim=width, parts=parts, size=length, k=k, causal=causal,
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, length=length, direction=direction,
            block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
