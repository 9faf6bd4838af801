"""The residual stack around multi-head attention, with the options that its architectures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lra.architectures._attention import added_positions, checked_width
from lra.architectures._stack import Stack
from lra.encoder import Mixer


class AttentionStack(Stack):
    """make(layer, **heads): the mixer of a layer; heads: the arguments d_model, n_heads, width, positions, causal and
    dropout of an AttentionMixer.

    n_heads: must divide qkv_dim, the width of all heads together, d_model unless given. positions: "sinusoidal",
    "learned", "rope", "alibi" or "none". attention_dropout: on the attention weights.
    """

    def __init__(
        self,
        make: Callable[..., Mixer],
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        heads = {
            "d_model": d_model, "n_heads": n_heads, "width": checked_width(d_model, n_heads, qkv_dim, positions),
            "positions": positions, "causal": direction == "causal", "dropout": attention_dropout,
        }  # fmt: skip
        super().__init__(
            lambda layer: make(layer, **heads), native=True, d_model=d_model, direction=direction,
            block={"positions": added_positions(positions), **(block or {})}, **stack,
        )  # fmt: skip
