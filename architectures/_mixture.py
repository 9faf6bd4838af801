"""The Transformer around a mixture of experts: softmax attention, and experts in the place of the feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lra.architectures._attention import added_positions, checked_width
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Stack


class MixtureStack(Stack):
    """ffn: a name of MIXTURES in `_moe.py`; experts: its options. The rest is that of `transformer`."""

    def __init__(
        self, ffn: str, experts: Mapping[str, Any], *, d_model: int, n_layers: int, length: int, dropout: float,
        direction: str, n_heads: int, qkv_dim: int | None, positions: str, attention_dropout: float,
        block: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        width = checked_width(d_model, n_heads, qkv_dim, positions)
        super().__init__(
            lambda _: SoftmaxMixer(
                d_model, n_heads, width, positions, direction == "causal", dropout=attention_dropout
            ),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout, direction=direction, native=True,
            block={"positions": added_positions(positions), "ffn": ffn, "experts": experts, **(block or {})},
        )  # fmt: skip
