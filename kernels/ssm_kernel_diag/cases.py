"""Inputs of `ssm_kernel_diag`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case, complex_of

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    channels: int, width: int, states: int, length: int, discretization: str = "zoh", *, step: float = 0.1
) -> Make:
    """S4D-Lin: A = -1/2 + i pi n (the real part perturbed), dt log-uniform in [step / 100, step]."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        wide = torch.promote_types(dtype, torch.float32)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=wide, device=device)

        frequency = math.pi * torch.arange(states, dtype=wide, device=device).expand(width, states)
        A = torch.complex(-0.25 - draw(width, states) / 2, frequency)
        C = torch.complex(draw(channels, width, states) - 0.5, draw(channels, width, states) - 0.5)
        dt = (step * torch.exp(-math.log(100) * draw(width))).to(dtype)
        kind = complex_of(dtype)
        return {"A": A.to(kind), "C": C.to(kind), "dt": dt, "length": length, "discretization": discretization}

    return make


def _with(real: float, dt: float, discretization: str = "zoh") -> Make:
    """Every eigenvalue `real` + 0.1 i n and every step `dt`: how fast the powers vanish, or that they do not."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        given = _inputs(1, 3, 5, 200, discretization)(generator, dtype, device)
        given["A"] = torch.complex(torch.full_like(given["A"].real, real), given["A"].imag / (10 * math.pi))
        return given | {"dt": torch.full_like(given["dt"], dt)}

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    given = _inputs(2, 6, 8, 70)(generator, dtype, device)
    return given | {"A": given["A"][::2, ::2].conj(), "C": given["C"][:, ::2, ::2], "dt": given["dt"][::2]}


CASES = [
    Case("zoh", "small", _inputs(2, 3, 2, 7)),
    Case("bilinear", "small", _inputs(1, 2, 3, 6, "bilinear")),
    Case("no discretization", "small", _inputs(1, 2, 3, 5, "none")),
    Case("length 1", "edge", _inputs(1, 3, 4, 1)),
    Case("length 63", "edge", _inputs(2, 3, 4, 63)),
    Case("length 64", "edge", _inputs(1, 3, 5, 64, "bilinear")),
    Case("length 65", "edge", _inputs(3, 2, 20, 65, "none")),
    Case("length 1000", "edge", _inputs(1, 3, 33, 1000)),
    Case("undamped", "edge", _with(0.0, 0.1, "bilinear")),
    Case("step 1e-20", "edge", _with(-0.5, 1e-20, "bilinear")),
    Case("step 1e-3", "edge", _with(-0.5, 1e-3)),
    Case("powers that underflow", "edge", _with(-0.5, 2.0)),
    Case("bilinear power near 0", "edge", _with(-2.0, 1.0, "bilinear")),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 4, 32, 16384, step=0.01)),
    Case("length 16384 bilinear", "long", _inputs(1, 4, 32, 16384, "bilinear", step=0.01)),
    Case("H256 N32 L2048", "bench", _inputs(1, 256, 32, 2048)),
    Case("H512 N64 L16384", "bench", _inputs(1, 512, 64, 16384)),
]
