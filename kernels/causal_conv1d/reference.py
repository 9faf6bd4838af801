"""The definition of `causal_conv1d`: a sum over shifted copies."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x: (B, L, D); weight: (D, K); bias: (D,) -> y: (B, L, D), y_t = f(bias + sum_k w_k x_{t-K+1+k})."""
    length, taps = x.shape[1], weight.shape[1]
    x = F.pad(x, (0, 0, taps - 1, 0))
    y = sum(weight[:, k] * x[:, k : k + length] for k in range(taps))
    assert isinstance(y, Tensor)
    y = y if bias is None else y + bias
    return F.silu(y) if activation == "silu" else y
