"""Inputs of `wkv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int, length: int, width: int, *, state: bool = False, spread: float = 1.0, rate: float = -1.0, **more: Any
) -> Make:
    """Random inputs; spread: standard deviation of the keys; rate: mean of w."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        drawn = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        given = {
            "k": (spread * normal(batch, length, width)).to(dtype),
            "v": normal(batch, length, width).to(dtype),
            "w": (rate + normal(width)).to(dtype),
            "u": normal(width).to(dtype),
        }
        if state:
            found = normal(batch, 3, width)
            found[:, 1] = found[:, 1].abs() + 0.5  # a denominator is positive
            given["h0"] = found.to(dtype)
        return given | more

    return make


def _extreme(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Decays from none to complete in one step, keys whose exponentials overflow, and very large and small bonuses."""
    given = _inputs(2, 70, 8, state=True, spread=30.0)(generator, dtype, device)
    given["w"] = torch.tensor([-90.0, -20.0, 5.0, 80.0, 0.0, -3.0, 1.0, -90.0], dtype=dtype, device=device)
    given["u"] = torch.tensor([0.0, 100.0, -100.0, 0.0, 50.0, -50.0, 0.0, 0.0], dtype=dtype, device=device)
    return given


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """k and v cut from one projection, channels first; every second decay."""
    given = _inputs(2, 9, 5)(generator, dtype, device)
    k, v = torch.cat([given["k"], given["v"]], dim=-1).mT.contiguous().mT.split(5, dim=-1)
    return {"k": k, "v": v, "w": given["w"].repeat_interleave(2)[::2], "u": given["u"]}


CASES = [
    Case("plain", "small", _inputs(2, 5, 3)),
    Case("state", "small", _inputs(2, 4, 3, state=True, return_state=True)),
    Case("length 1", "edge", _inputs(2, 1, 5, state=True)),
    Case("length 63", "edge", _inputs(2, 63, 5)),
    Case("length 64", "edge", _inputs(1, 64, 1, state=True)),
    Case("length 65", "edge", _inputs(1, 65, 140, state=True, return_state=True)),
    Case("keys of spread 30", "edge", _inputs(1, 65, 2, state=True, return_state=True, spread=30.0, rate=-8.0)),
    Case("length 1000", "edge", _inputs(3, 1000, 70), interpreted=False),
    Case("extreme", "edge", _extreme),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 4, rate=-8.0)),
    Case("D124", "gpu", _inputs(2, 130, 124)),
    Case("B16 L2048 D256", "bench", _inputs(16, 2048, 256)),
]
