"""Inputs of `causal_conv1d`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int, length: int, width: int, taps: int, *, bias: bool = True, scale: float = 1.0, silu: bool = False
) -> Make:
    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            drawn = torch.promote_types(dtype, torch.float32)
            return torch.randn(shape, generator=generator, dtype=drawn, device=device).to(dtype)

        given: dict[str, Any] = {"x": scale * normal(batch, length, width), "weight": normal(width, taps)}
        if bias:
            given["bias"] = normal(width)
        return given | ({"activation": "silu"} if silu else {})

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """x as the transpose of a (B, D, L) tensor, weight as every second channel of a wider one."""
    given = _inputs(2, 11, 6, 4, silu=True)(generator, dtype, device)
    x = given["x"][:, :, :3].mT.contiguous().mT
    return given | {"x": x, "weight": given["weight"][::2], "bias": given["bias"][::2]}


CASES = [
    Case("linear", "small", _inputs(2, 6, 3, 4)),
    Case("silu", "small", _inputs(2, 6, 3, 4, silu=True)),
    Case("one tap, no bias", "small", _inputs(2, 4, 3, 1, bias=False)),
    Case("more taps than steps", "small", _inputs(1, 3, 2, 5, bias=False, silu=True)),
    Case("length 1", "edge", _inputs(2, 1, 5, 4, silu=True)),
    Case("length 63", "edge", _inputs(2, 63, 5, 3, silu=True)),
    Case("length 64", "edge", _inputs(1, 64, 40, 2)),
    Case("length 65", "edge", _inputs(2, 65, 80, 4, bias=False, silu=True)),
    Case("length 1000", "edge", _inputs(3, 1000, 70, 4, silu=True), interpreted=False),
    Case("saturated activation", "edge", _inputs(2, 20, 5, 4, scale=60.0, silu=True)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(2, 16384, 8, 4, silu=True)),
    Case("D124", "gpu", _inputs(2, 130, 124, 4, silu=True)),
    Case("B16 L2048 D256 K4", "bench", _inputs(16, 2048, 256, 4, silu=True)),
]
