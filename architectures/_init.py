"""Initialisation of gates."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def chrono(bias: Tensor, horizon: int) -> Tensor:
    """Fill the biases of forget gates with log(u), u uniform in [1, horizon - 1], and return them: such a gate forgets
    over some u + 1 tokens, so that memories of every length up to `horizon` are there (arXiv:1804.11188)."""
    return bias.uniform_(1, max(horizon - 1, 1)).log_()
