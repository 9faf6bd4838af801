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

from lra.architectures._attention import added_positions, checked_width
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Stack
from lra.encoder import Card


class Transformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. attention_dropout: on
    the attention weights; it rules out the fused kernel on a CPU."""

    gaps = True
    card = Card(
        title="Attention Is All You Need",
        year=2017,
        url="https://arxiv.org/abs/1706.03762",
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
        width = checked_width(d_model, n_heads, qkv_dim, positions)
        super().__init__(
            lambda _: SoftmaxMixer(
                d_model, n_heads, width, positions, direction == "causal", dropout=attention_dropout
            ),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout,
            direction=direction, native=True, block={"positions": added_positions(positions), **(block or {})},
        )  # fmt: skip
