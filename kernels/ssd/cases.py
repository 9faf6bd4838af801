"""Inputs of `ssd`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, *, steps: tuple[float, ...] = (),
    state: bool = False, **more: Any,
) -> Make:  # fmt: skip
    """Random inputs, step sizes as of Mamba-2's initialisation and A in [-16, -1]; steps: every third step size takes
    the next of these values instead."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        drawn = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        dt = torch.nn.functional.softplus(normal(batch, length, heads) - 3)
        if steps:
            chosen = dt.view(-1)[::3]
            chosen.copy_(torch.tensor(steps, dtype=drawn, device=device).repeat(len(chosen))[: len(chosen)])
        given = {
            "x": normal(batch, length, heads, width).to(dtype),
            "dt": dt.to(dtype),
            "A": -(1 + 15 * torch.sigmoid(normal(heads))).to(dtype),
            "B": normal(batch, length, groups, states).to(dtype),
            "C": normal(batch, length, groups, states).to(dtype),
        }
        if state:
            given["h0"] = normal(batch, heads, width, states).to(dtype)
        return given | more

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """x, B and C cut from the output of one convolution, (B, L, channels), as in the Mamba-2 block."""
    given = _inputs(2, 9, 2, 3, 1, 6)(generator, dtype, device)
    joined = torch.cat([given["x"].flatten(2), given["B"].flatten(2), given["C"].flatten(2)], dim=-1)
    x, B, C = joined.split(6, dim=-1)
    return given | {"x": x.unflatten(-1, (2, 3)), "B": B.unsqueeze(2), "C": C.unsqueeze(2)}


CASES = [
    Case("one group", "small", _inputs(1, 5, 2, 2, 1, 3, chunk=2, state=True, return_state=True)),
    Case("groups", "small", _inputs(1, 4, 4, 2, 2, 2, chunk=4)),
    Case("length 1", "edge", _inputs(2, 1, 2, 4, 1, 3, state=True)),
    Case("length 63", "edge", _inputs(1, 63, 2, 4, 2, 6)),
    Case("length 64", "edge", _inputs(1, 64, 2, 4, 1, 6)),
    Case("length 65", "edge", _inputs(1, 65, 2, 17, 1, 33, state=True, return_state=True)),
    Case("length 1000", "edge", _inputs(1, 1000, 2, 4, 1, 5), interpreted=False),
    Case("extreme steps", "edge", _inputs(1, 70, 2, 4, 1, 3, steps=(0.0, 60.0, 1e-30, 5.0), state=True)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 1, 3, 1, 4)),
    Case("B8 L2048 H8 P64 N64", "bench", _inputs(8, 2048, 8, 64, 1, 64)),
]
