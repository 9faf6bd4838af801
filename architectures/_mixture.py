"""The Transformer around a mixture of experts: softmax attention, and experts in the place of the feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lra.architectures._attention_stack import AttentionStack
from lra.architectures._softmax import SoftmaxMixer


class MixtureStack(AttentionStack):
    """ffn: a name of MIXTURES in `_moe.py`; experts: its options. The rest is that of `transformer`."""

    def __init__(
        self, ffn: str, experts: Mapping[str, Any], *, block: Mapping[str, Any] | None = None, **attention: Any
    ) -> None:
        super().__init__(
            lambda _, **heads: SoftmaxMixer(**heads),
            block={"ffn": ffn, "experts": experts, **(block or {})},
            **attention,
        )
