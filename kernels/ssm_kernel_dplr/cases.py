"""Inputs of `ssm_kernel_dplr`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case, complex_of

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    channels: int,
    width: int,
    states: int,
    length: int,
    *,
    rank: int = 1,
    damping: float = 0.5,
    step: float = 0.1,
    transformed: bool = True,
) -> Make:
    """A = -damping + i pi n, dt log-uniform in [step / 10, step], the rest normal."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        wide = torch.promote_types(dtype, torch.float32)
        kind = complex_of(dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=kind, device=device)

        frequency = math.pi * torch.arange(states, dtype=wide, device=device).expand(width, states)
        ratio = torch.rand(width, generator=generator, dtype=wide, device=device)
        return {
            "A": torch.complex(torch.full_like(frequency, -damping), frequency).to(kind),
            "P": normal(rank, width, states),
            "B": normal(width, states),
            "C": normal(channels, width, states),
            "dt": (step * torch.exp(-math.log(10) * ratio)).to(dtype),
            "length": length,
            "transformed": transformed,
        }

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    given = _inputs(2, 6, 8, 33)(generator, dtype, device)
    halved = {name: given[name][..., ::2, ::2] for name in ("A", "P", "B", "C")}
    return given | halved | {"A": halved["A"].conj(), "dt": given["dt"][::2]}


CASES = [
    Case("transformed", "small", _inputs(2, 2, 2, 6)),
    Case("true output vector", "small", _inputs(1, 2, 2, 7, transformed=False)),
    Case("rank 2", "small", _inputs(1, 2, 3, 5, rank=2)),
    Case("length 1", "edge", _inputs(1, 3, 4, 1, transformed=False)),
    Case("length 63", "edge", _inputs(2, 3, 4, 63)),
    Case("length 64", "edge", _inputs(1, 3, 5, 64, transformed=False)),
    Case("length 65", "edge", _inputs(3, 2, 20, 65, rank=3)),
    Case("length 1000", "edge", _inputs(1, 3, 8, 1000)),
    Case("hardly damped", "edge", _inputs(1, 2, 4, 500, damping=1e-2, transformed=False)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 2, 8, 16384, step=0.01, transformed=False)),
    Case("H256 N32 L2048", "bench", _inputs(1, 256, 32, 2048)),
    Case("H256 N32 L16384", "bench", _inputs(1, 256, 32, 16384)),
]
