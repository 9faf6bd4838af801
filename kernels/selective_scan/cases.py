"""Inputs of `selective_scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(batch: int, length: int, width: int, size: int, *, options: str = "", step: float | None = None) -> Make:
    """Inputs as a Mamba block has them: steps from a softplus, A_n = -(n + 1). options: of "D", "z", "h" (state in and
    out); step: every other third of the steps has this size."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            drawn = torch.promote_types(dtype, torch.float32)
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        delta = F.softplus(normal(batch, length, width) - 2)
        if step is not None:
            delta[:, : length // 3] = step
            delta[:, 2 * length // 3 :] = step
        A = -(torch.arange(1.0, size + 1, device=device) * torch.exp(0.1 * normal(width, size)))
        given = {"u": normal(batch, length, width), "delta": delta, "A": A}
        given |= {"B": normal(batch, length, size), "C": normal(batch, length, size)}
        if "D" in options:
            given["D"] = normal(width)
        if "z" in options:
            given["z"] = normal(batch, length, width)
        if "h" in options:
            given["h0"] = normal(batch, width, size)
        return {name: t.to(dtype) for name, t in given.items()} | ({"return_state": True} if "h" in options else {})

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """u and delta as halves of one projection, B and C likewise, z as the transpose of a (B, D, L) tensor."""
    given = _inputs(2, 9, 6, 4, options="Dz")(generator, dtype, device)
    return given | {
        "u": given["u"][..., :3],
        "delta": given["delta"][..., :3],
        "A": given["A"][::2, ::2],
        "B": given["B"][..., :2],
        "C": given["B"][..., 2:],
        "D": given["D"][::2],
        "z": given["z"][..., 3:].mT.contiguous().mT,
    }


CASES = [
    Case("bare", "small", _inputs(2, 4, 3, 2)),
    Case("skip and gate", "small", _inputs(2, 4, 3, 2, options="Dz")),
    Case("state in and out", "small", _inputs(2, 4, 2, 2, options="Dzh")),
    Case("length 1", "edge", _inputs(2, 1, 5, 3, options="Dzh")),
    Case("length 63", "edge", _inputs(1, 63, 5, 3, options="Dz")),
    Case("length 64", "edge", _inputs(1, 64, 3, 1, options="h")),
    Case("length 65", "edge", _inputs(1, 65, 3, 4, options="Dzh")),
    Case("length 1000", "edge", _inputs(2, 1000, 7, 4, options="Dz"), interpreted=False),
    Case("two blocks of channels", "edge", _inputs(2, 40, 150, 3, options="Dz"), interpreted=False),
    Case("steps of 0", "edge", _inputs(2, 20, 3, 2, options="Dh", step=0.0)),
    Case("steps that underflow the decay", "edge", _inputs(2, 20, 3, 2, options="Dh", step=87.5)),
    Case("steps that forget everything", "edge", _inputs(2, 20, 3, 2, options="Dh", step=1e4)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 4, 4, options="Dz")),
    Case("D124", "gpu", _inputs(2, 130, 124, 16, options="Dz")),
    Case("B4 L2048 D256 N16", "bench", _inputs(4, 2048, 256, 16, options="D")),
]
