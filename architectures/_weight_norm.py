"""Weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868) of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightNormConv1d(nn.Module):
    """nn.Conv1d whose kernel is g v / |v|, with one norm for each output channel: (B, in, L) -> (B, out, L').

    Starts as nn.Conv1d. A module with PyTorch's own `weight_norm` cannot be pickled.
    """

    def __init__(self, d_in: int, d_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        plain = nn.Conv1d(d_in, d_out, kernel)
        self.in_channels, self.dilation, self.bias = d_in, dilation, plain.bias
        self.weight_g = nn.Parameter(torch.norm_except_dim(plain.weight.detach(), 2, 0))
        self.weight_v = nn.Parameter(plain.weight.detach())

    @property
    def weight(self) -> Tensor:
        """The kernel: (out, in, K)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, dilation=self.dilation)
