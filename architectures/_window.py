"""A short causal convolution continued from the tokens before."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels.causal_conv1d import causal_conv1d


def continued_conv1d(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of x: (B, C, D) that follows before: (B, K - 1, D); weight: (D, K) -> (B, C, D), and the last
    K - 1 inputs."""
    inputs = torch.cat([before, x], dim=1)
    y = causal_conv1d(inputs, weight, bias, activation)
    return y[:, before.shape[1] :], inputs[:, x.shape[1] :]
