"""Transformer: every token attends to every other through softmax attention over several heads.

Vaswani et al. 2017, arXiv:1706.03762. With d = qkv_dim / H and per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)       section 3.2.2
    A = softmax(Q K' / sqrt(d) + bias)                     (B, H, L, L), 0 at padded keys  section 3.2.1
    y = concat_h(A V) W_o + b_o                            (B, L, D)

Positions: "sinusoidal" (section 3.5) or "learned", added to the input; "rope" (arXiv:2104.09864) turns Q and K by an
angle growing with position; "alibi" (arXiv:2108.12409) is bias = -slope_h |i - j|; "t5" (arXiv:1910.10683) is a learned
number for each head and bucket of distances, one table for all layers, and scores without 1 / sqrt(d); "shaw"
(arXiv:1803.02155) adds to keys and values a learned vector of the distance, clipped; "none". See `_relative.py`.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases, as tensor2tensor and the LRA code do, so
that Q K' / sqrt(d) has unit variance for normalised inputs and the softmax starts soft at any width; "t5" starts as
T5 does.

Departures: norms come before each part and the feed-forward is GELU (the paper: after, ReLU), as in the LRA code;
`transformer/original` restores both. T5's maps have no biases. `transformer/llama` is the recent form: rotary, RMS
norm, SwiGLU of hidden width 2.6875 D (LLaMA 7B). The causal direction adds a mask, and `step` keeps keys and values (a
cache of 2 L qkv_dim numbers a layer); the cost counts the full L x L product then too, as FLOP counters do.

Checked against: torch.nn.TransformerEncoderLayer with copied weights (pre and post norm, ReLU and GELU, padding,
outputs and gradients); tensors of Hugging Face's LlamaAttention (rope), Llama and GPT-J rotary functions, BLOOM's
ALiBi, T5Attention and T5's buckets, both directions; fairseq2's attention of Shaw et al.; the sinusoids of the paper's
formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import POSITIONS, added_positions, checked_width
from lra.architectures._checks import at_least
from lra.architectures._published import first_prefix, number_of_layers
from lra.architectures._relative import ShawMixer, T5Mixer
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Stack
from lra.encoder import Card, Mixer, Published

FARTHEST = {"t5": 128, "shaw": 16}
"""Distance from which on all are alike, as published."""

LLAMA = {
    "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mixer.out": ("self_attn.o_proj",),
    "norm": ("input_layernorm",), "ffn_norm": ("post_attention_layernorm",),
    "ffn.up": ("mlp.gate_proj", "mlp.up_proj"), "ffn.down": ("mlp.down_proj",),
}  # fmt: skip
BERT = {
    "mixer.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "mixer.out": ("attention.output.dense",), "norm": ("attention.output.LayerNorm",),
    "ffn.up": ("intermediate.dense",), "ffn.down": ("output.dense",), "ffn_norm": ("output.LayerNorm",),
}  # fmt: skip
"""Module of a layer -> modules of Hugging Face's layer, whose rows it holds one after the other."""


class Transformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. attention_dropout: on
    the attention weights; it rules out the fused kernel on a CPU. buckets: of the positions "t5". max_distance: from
    which on distances are alike, 128 for "t5" and 16 for "shaw" unless given."""

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
            "t5": {"positions": "t5"},
            "shaw": {"positions": "shaw"},
            "nope": {"positions": "none"},
            "original": {"block": {"prenorm": False, "ffn": "relu"}},
            "llama": {"positions": "rope", "block": {"norm": "rms", "ffn": "swiglu", "expand": 2.6875}},
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        positions: str = "sinusoidal",
        buckets: int = 32,
        max_distance: int | None = None,
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, positions, (*POSITIONS, *FARTHEST))
        causal, farthest = direction == "causal", FARTHEST.get(positions, 0) if max_distance is None else max_distance
        if max_distance is not None and positions not in FARTHEST:
            raise ValueError(f"max_distance is {max_distance}, but positions is {positions!r}; {' or '.join(FARTHEST)}")
        if positions == "t5":
            at_least(4, buckets=buckets)
            at_least(buckets // 2 + 1, max_distance=farthest)
        elif positions == "shaw":
            at_least(1, max_distance=farthest)
        table = nn.Parameter(torch.randn(buckets, n_heads) * d_model**-0.5) if positions == "t5" else None

        def mixer(_: int) -> Mixer:
            if table is not None:
                return T5Mixer(
                    d_model,
                    n_heads,
                    width=width,
                    causal=causal,
                    table=table,
                    farthest=farthest,
                    dropout=attention_dropout,
                )
            if positions == "shaw":
                return ShawMixer(
                    d_model, n_heads, width=width, causal=causal, farthest=farthest, dropout=attention_dropout
                )
            return SoftmaxMixer(
                d_model, n_heads, width=width, positions=positions, causal=causal, dropout=attention_dropout
            )

        super().__init__(
            mixer,
            native=True, d_model=d_model, direction=direction,
            block={"positions": added_positions(positions), **(block or {})}, **stack,
        )  # fmt: skip

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        """Of Hugging Face's Llama, whose map of a linear layer without bias is one with a bias of 0 here, and of its
        BERT and RoBERTa, whose embeddings, with their norm, come before the encoder. The tensors do
        not show the epsilon of the norms, 1e-6 for a Llama and 1e-5 for a BERT unless `block={"norm_eps": ...}` gives
        that of their configuration (rms_norm_eps, layer_norm_eps)."""
        if any(".self_attn." in name for name in tensors):
            return _of_llama(tensors)
        if any(".attention.self." in name for name in tensors):
            return _of_bert(tensors)
        raise ValueError("neither a Llama (model.layers.0.self_attn.q_proj.weight) nor a BERT")


def _of_llama(tensors: Mapping[str, Tensor]) -> Published:
    base = first_prefix(tensors, "model.", "")
    hidden, d_model = tensors[f"{base}layers.0.mlp.gate_proj.weight"].shape
    width = len(tensors[f"{base}layers.0.self_attn.q_proj.weight"])
    if len(tensors[f"{base}layers.0.self_attn.k_proj.weight"]) != width:
        raise ValueError("its heads share keys and values; only one with a key head for every head of queries does")
    n_layers = number_of_layers(tensors, f"{base}layers.")
    options = {
        "d_model": d_model, "n_layers": n_layers, "qkv_dim": width, "positions": "rope", "direction": "causal",
        "block": {"norm": "rms", "ffn": "swiglu", "expand": hidden / d_model},
    }  # fmt: skip
    names = {"norm.weight": (f"{base}norm.weight",)} | _layers(tensors, f"{base}layers.", n_layers, LLAMA)
    ignored = (f"{base}embed_tokens.weight", "lm_head.weight", "*.rotary_emb.inv_freq")
    return Published(options, names, ignored=ignored, undetermined=("n_heads",))


def _of_bert(tensors: Mapping[str, Tensor]) -> Published:
    base = first_prefix(tensors, "bert.encoder.", "roberta.encoder.", "encoder.")
    hidden, d_model = tensors[f"{base}layer.0.intermediate.dense.weight"].shape
    n_layers = number_of_layers(tensors, f"{base}layer.")
    options = {
        "d_model": d_model, "n_layers": n_layers, "positions": "none",
        "block": {"prenorm": False, "ffn": "gelu", "expand": hidden / d_model},
    }  # fmt: skip
    ignored = ("*embeddings.*", "*pooler.*", "cls.*", "lm_head.*", "classifier.*")
    names = _layers(tensors, f"{base}layer.", n_layers, BERT)
    return Published(options, names, ignored=ignored, undetermined=("n_heads",))


def _layers(
    tensors: Mapping[str, Tensor], base: str, n_layers: int, modules: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Own parameter -> published tensors; a bias that a linear map does not have is made of none."""
    names = {}
    for i in range(n_layers):
        for own, theirs in modules.items():
            for kind in ("weight", "bias"):
                sources = tuple(f"{base}{i}.{module}.{kind}" for module in theirs)
                has_bias = any(source in tensors for source in sources)
                if kind == "weight" or has_bias or "norm" not in own:
                    names[f"layers.{i}.{own}.{kind}"] = sources if kind == "weight" or has_bias else ()
    return names
