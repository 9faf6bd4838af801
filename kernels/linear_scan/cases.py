"""Inputs of `linear_scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case, complex_of

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int, length: int, width: int, *, complex_: bool = False, h0: bool = False, shared: bool = False, **more: Any
) -> Make:
    """Arguments of random gates and inputs; shared: one factor per channel for every row and step."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        kind = complex_of(dtype) if complex_ else dtype
        drawn = torch.promote_types(kind, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        a = normal(*((1, 1) if shared else (batch, length)), width)
        # magnitudes in (0, 1): gates of a stable recurrence, any phase
        a = a / a.abs() * torch.sigmoid(a.real + 2) if complex_ else torch.sigmoid(a + 2)
        given = {"a": a.to(kind), "b": normal(batch, length, width).to(kind)}
        if h0:
            given["h0"] = normal(batch, width).to(kind)
        return given | more

    return make


def _gates(value: float) -> Make:
    """Every factor `value`, except a middle third that keeps its random gates."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        given = _inputs(2, 65, 3, h0=True)(generator, dtype, device)
        given["a"][:, :20] = value
        given["a"][:, 40:] = value
        return given

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """a as every second channel, b as the transpose of a (B, D, L) tensor, complex and conjugated lazily."""
    given = _inputs(2, 9, 6, complex_=True)(generator, dtype, device)
    return {"a": given["a"][:, :, ::2], "b": given["b"][:, :, :3].mT.contiguous().mT.conj()}


CASES = [
    Case("real", "small", _inputs(2, 5, 3, h0=True)),
    Case("complex", "small", _inputs(2, 4, 2, complex_=True, h0=True)),
    Case("reverse", "small", _inputs(2, 5, 3, h0=True, reverse=True)),
    Case("complex reverse", "small", _inputs(1, 4, 2, complex_=True, reverse=True)),
    Case("shared", "small", _inputs(2, 5, 3, h0=True, shared=True)),
    Case("shared complex", "small", _inputs(2, 4, 2, complex_=True, shared=True, reverse=True)),
    Case("length 1", "edge", _inputs(2, 1, 5, h0=True)),
    Case("length 63", "edge", _inputs(2, 63, 5)),
    Case("length 64", "edge", _inputs(1, 64, 1, h0=True)),
    Case("length 65", "edge", _inputs(1, 65, 80, complex_=True, h0=True)),
    Case("length 65 reverse", "edge", _inputs(2, 65, 5, h0=True, reverse=True)),
    Case("length 1000", "edge", _inputs(3, 1000, 70), interpreted=False),
    Case("gates 0", "edge", _gates(0.0)),
    Case("gates 1", "edge", _gates(1.0)),
    Case("gates near underflow", "edge", _gates(1e-38)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 8, h0=True)),
    Case("length 16384 shared complex", "long", _inputs(1, 16384, 4, complex_=True, shared=True)),
    Case("length 65536 shared", "gpu", _inputs(1, 65536, 32, shared=True)),
    Case("D124", "gpu", _inputs(2, 130, 124)),
    Case("B16 L2048 D256", "bench", _inputs(16, 2048, 256)),
    Case("B16 L2048 D128 complex", "bench", _inputs(16, 2048, 128, complex_=True)),
]
