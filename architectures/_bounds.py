"""Lower bounds of forget gates that rise from layer to layer, one table for a whole stack (HGRN, HGRN2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lra.architectures._precision import wide


class LowerBounds(nn.Module):
    """gamma_l = sum over 1 <= i <= l of softmax(table)_i for the layers l = 0, 1, ...; gamma_0 is 0 exactly.

    The table, (n_layers, D), starts at 1, so that the bounds rise in equal steps: gamma_l = l / n_layers.
    """

    lower_bounds: nn.Parameter

    def __init__(self, n_layers: int, d_model: int) -> None:
        super().__init__()
        # a single layer has no bound, and a parameter that is never read gets no gradient
        self.register_parameter("lower_bounds", nn.Parameter(torch.ones(n_layers, d_model)) if n_layers > 1 else None)

    def forward(self, layer: int) -> Tensor | None:
        """gamma of a layer, (D,); None for the first one."""
        if layer == 0:
            return None
        return wide(self.lower_bounds).softmax(0)[1 : layer + 1].sum(0)
