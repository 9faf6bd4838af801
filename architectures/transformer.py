"""Transformer: every token attends to every other through softmax attention over several heads.

Vaswani et al. 2017, arXiv:1706.03762. With d = qkv_dim / H and per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)       section 3.2.2
    A = softmax(Q K' / sqrt(d) + bias)                     (B, H, L, L), 0 at padded keys  section 3.2.1
    y = concat_h(A V) W_o + b_o                            (B, L, D)

Positions: "sinusoidal" (section 3.5) or "learned", added to the input; "rope" (arXiv:2104.09864) turns Q and K by an
angle growing with position; "alibi" (arXiv:2108.12409) is bias = -slope_h |i - j|; "none".

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases, as tensor2tensor and the LRA code do, so
that Q K' / sqrt(d) has unit variance for normalised inputs and the softmax starts soft at any width.

Departures: norms come before each part and the feed-forward is GELU (the paper: after, ReLU), as in the LRA code;
`transformer/original` restores both. `transformer/llama` is the recent form: rotary, RMS norm, SwiGLU of hidden width
2.6875 D (LLaMA 7B). The causal direction adds a mask, and `step` keeps keys and values (a cache of 2 L qkv_dim numbers
a layer); the cost counts the full L x L product then too, which is what FLOP counters report.

Checked against: torch.nn.TransformerEncoderLayer with copied weights (pre and post norm, ReLU and GELU, padding,
outputs and gradients); tensors of Hugging Face's LlamaAttention (rope), Llama and GPT-J rotary functions, BLOOM's
ALiBi, and the sinusoids of the paper's formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import SPARE, alibi_slopes, attend, merge_heads, rope, split_heads
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer

POSITIONS = ("sinusoidal", "learned", "rope", "alibi", "none")


class TransformerMixer(Mixer):
    """Multi-head softmax attention: (B, L, D) -> (B, L, D). `positions` of POSITIONS; only rope and alibi act here."""

    slopes: Tensor | None

    def __init__(
        self, d_model: int, n_heads: int, qkv_dim: int, positions: str, causal: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_heads, self.causal, self.dropout = n_heads, causal, dropout
        self.rotary = positions == "rope"
        self.qkv = nn.Linear(d_model, 3 * qkv_dim)
        self.out = nn.Linear(qkv_dim, d_model)
        for weight in (*self.qkv.weight.chunk(3), self.out.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        slopes = alibi_slopes(n_heads).float() if positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return (rope(q, start), rope(k, start), v) if self.rotary else (q, k, v)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._heads(x, 0)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(attend(q, k, v, mask, causal=self.causal, slopes=self.slopes, dropout=dropout)))

    def cost(self, length: int) -> Cost:
        width, d_model = self.out.in_features, self.out.out_features
        linear = Cost.linear(length, d_model, 3 * width) + Cost.linear(length, width, d_model)
        turning = 12.0 * length * width if self.rotary else 0.0
        softmax = (5.0 if self.slopes is None else 8.0) * self.n_heads * length**2
        spare = 0 if self.slopes is None or self.causal else SPARE * self.n_heads
        return linear + Cost(4.0 * length**2 * (width + spare), softmax + turning)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        empty = self.out.weight.new_zeros(batch, self.n_heads, 0, self.out.in_features // self.n_heads)
        return empty, empty

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: keys and values so far, two (B, H, t, d)."""
        time = state[0].shape[2]
        q, k, v = self._heads(x.unsqueeze(1), time)
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        bias = None
        if self.slopes is not None:
            ago = torch.arange(time, -1, -1, device=x.device)
            bias = (-self.slopes[:, None, None] * ago).to(q.dtype)[None]
        y = F.scaled_dot_product_attention(q, keys, values, bias)
        return self.out(merge_heads(y)).squeeze(1), (keys, values)


class Transformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. attention_dropout: on
    the attention weights; it rules out the fused kernel on a CPU."""

    card = Card(
        title="Attention Is All You Need",
        year=2017,
        url="https://arxiv.org/abs/1706.03762",
        family="attention",
        scaling="L^2",
        causal=False,
        variants={
            "learned": {"positions": "learned"},
            "rope": {"positions": "rope"},
            "alibi": {"positions": "alibi"},
            "nope": {"positions": "none"},
            "original": {"block": {"prenorm": False, "ffn": "relu"}},
            "llama": {"positions": "rope", "block": {"norm": "rms", "ffn": "swiglu", "expand": 2.6875}},
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        width = d_model if qkv_dim is None else qkv_dim
        if n_heads < 1 or width < 1 or width % n_heads:
            raise ValueError(f"n_heads is {n_heads}; a divisor of the attention's width {width}")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; one of {', '.join(POSITIONS)}")
        if positions == "rope" and width // n_heads % 2:
            raise ValueError(f"positions 'rope' turns pairs of features; a head has {width // n_heads}, an odd number")
        added = positions if positions in ("sinusoidal", "learned") else "none"
        super().__init__(
            lambda _: TransformerMixer(d_model, n_heads, width, positions, direction == "causal", attention_dropout),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout,
            direction=direction, native=True, block={"positions": added, **(block or {})},
        )  # fmt: skip
