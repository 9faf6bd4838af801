"""Inputs of `fft_conv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(batch: int, length: int, width: int, taps: int, *, both: bool = False, skip: bool = True) -> Make:
    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            wide = torch.promote_types(dtype, torch.float32)
            return torch.randn(shape, generator=generator, dtype=wide, device=device).to(dtype)

        given: dict[str, Any] = {"u": normal(batch, length, width)}
        given["k"] = normal(*((2,) if both else ()), width, taps) / taps**0.5
        if skip:
            given["D"] = normal(width)
        return given | {"bidirectional": both}

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """u as the transpose of (B, H, L), k as every second tap."""
    given = _inputs(2, 33, 5, 40, both=True)(generator, dtype, device)
    return given | {"u": given["u"].mT.contiguous().mT, "k": given["k"][..., ::2]}


CASES = [
    Case("causal", "small", _inputs(2, 7, 3, 7)),
    Case("bidirectional", "small", _inputs(2, 6, 3, 6, both=True)),
    Case("short kernel", "small", _inputs(1, 9, 2, 3, skip=False)),
    Case("length 1", "edge", _inputs(2, 1, 5, 1, both=True)),
    Case("length 63", "edge", _inputs(2, 63, 5, 63)),
    Case("length 64", "edge", _inputs(1, 64, 3, 64, both=True)),
    Case("length 65", "edge", _inputs(2, 65, 20, 65)),
    Case("length 1000", "edge", _inputs(2, 1000, 3, 1000, both=True)),
    Case("kernel beyond the sequence", "edge", _inputs(2, 20, 3, 50, both=True, skip=False)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 1, 1024)),
    Case("B16 L2048 H256", "bench", _inputs(16, 2048, 256, 2048)),
    Case("B4 L16384 H128 bidirectional", "bench", _inputs(4, 16384, 128, 16384, both=True)),
]
