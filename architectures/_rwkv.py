"""Shared by RWKV-4, 6 and 7: the token shift, the ramp of initial coefficients, and the stack of two parts a layer.

h = norm_0(x);  in each layer  h = h + time mix(norm(h)),  h = h + channel mix(norm(h));  last, norm(h)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._norm import normalised
from lra.architectures._stack import Bidirectional, Stack
from lra.encoder import Cost, Mixer, clean_padding


def shifted(x: Tensor, before: Tensor | None = None) -> Tensor:
    """The token before each one, `before` (B, D) or 0 before the first: (B, L, D) -> (B, L, D)."""
    if before is None:
        return F.pad(x[:, :-1], (0, 0, 1, 0))
    return torch.cat([before.unsqueeze(1), x[:, :-1]], dim=1)


def ramp(d_model: int, layer: int, n_layers: int, power: float = 1.0) -> Tensor:
    """(i / D)^(power (1 - layer / n_layers)) for the channels i: (D,). Deeper layers look less at the token before."""
    return (torch.arange(d_model) / d_model) ** (power * (1 - layer / n_layers))


def depth(layer: int, n_layers: int) -> float:
    """0 in the first layer, 1 in the last."""
    return layer / max(n_layers - 1, 1)


def along(width: int) -> Tensor:
    """From 0 to 1 over the channels: (width,)."""
    return torch.arange(width) / max(width - 1, 1)


class RWKVStack(Stack):
    """n_layers layers of a time mix and a channel mix, which `time_mix(layer)` and `channel_mix(layer)` make. A layer
    is two blocks of the stack, without a feed-forward part of the stack's own."""

    def __init__(
        self,
        time_mix: Callable[[int], Mixer],
        channel_mix: Callable[[int], Mixer],
        *,
        d_model: int,
        n_layers: int,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        at_least(1, d_model=d_model, n_layers=n_layers)
        shape = type(self).block.updated(block)
        if shape.ffn != "none":
            raise ValueError(f"block.ffn is {shape.ffn!r}; 'none', as the channel mix stands in its place")
        super().__init__(
            lambda place: (channel_mix if place % 2 else time_mix)(place // 2),
            d_model=d_model, n_layers=2 * n_layers, block=block, **stack,
        )  # fmt: skip
        for layer in self.blocks:
            if isinstance(layer.mixer, Bidirectional) and layer.mixer.project is not None:
                # zero from both ways must stay zero, so that a layer starts as the identity here too
                nn.init.zeros_(layer.mixer.project.bias)
        self.n_layers = n_layers
        self.norm_0 = shape.make_norm(d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        return super().forward(normalised(self.norm_0, x, mask), mask)

    def cost(self, length: int) -> Cost:
        return super().cost(length) + Cost(other=5.0 * length * self.d_model)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().step(self.norm_0(x), state)

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().chunk(self.norm_0(x), state)
