"""Full softmax attention."""

from __future__ import annotations

from torch import Tensor

from lra.architectures._attention import SPARE, AttentionMixer, attend
from lra.encoder import Cost


class SoftmaxMixer(AttentionMixer):
    """Multi-head softmax attention, dropout on its weights: (B, L, D) -> (B, L, D)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, v, mask, causal=self.causal, slopes=self.slopes, dropout=self.rate)

    def pairs(self, length: int) -> float:
        return float(self.n_heads * length**2)

    def cost(self, length: int) -> Cost:
        spare = 0 if self.slopes is None or self.causal else SPARE
        return super().cost(length) + Cost(4.0 * self.pairs(length) * spare)
