"""Dropout whose mask may be shared by all tokens of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Like nn.Dropout: (B, L, D) or (B, D). If `tied` is set, a channel of a sequence is dropped at all of its tokens
    or at none: one mask (B, 1, D) for each call."""

    tied = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.tied and self.training and x.dim() == 3):
            return super().forward(x)
        return x * F.dropout(torch.ones_like(x[:, :1]), self.p)


def tie_dropout(module: nn.Module, tied: bool) -> None:
    """Set `tied` of every Dropout inside."""
    for part in module.modules():
        if isinstance(part, Dropout):
            part.tied = tied
