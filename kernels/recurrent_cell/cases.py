"""Inputs of `recurrent_cell`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case
from lra.kernels.recurrent_cell import GATES

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    cell: str, batch: int, length: int, width: int, *, state: bool = True, peephole: bool = False, depth: int = 1,
    scale: float = 1.0, b: bool = True, **more: Any,
) -> Make:  # fmt: skip
    """Random arguments; recurrent weights that keep the size of h; scale: standard deviation of x_gates."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        drawn = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        gates = GATES[cell]
        rows = gates * width * depth
        U = 0.5 * torch.tanh(normal(width)) if cell == "indrnn" else normal(rows, width) * (0.5 / width**0.5)
        given = {"x_gates": scale * normal(batch, length, gates * width), "U": U, "b": normal(rows) if b else None}
        if state:
            given["h0"] = normal(batch, width)
            if cell.startswith("lstm"):
                given["c0"] = normal(batch, width)
        if peephole:
            given["peephole"] = normal(gates - 1, width)
        if cell.startswith("lstm_layernorm"):
            given["norm"] = 1 + 0.3 * normal(6, width)
        return {k: None if t is None else t.to(dtype) for k, t in given.items()} | {"cell": cell} | more

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """x_gates cut from a wider projection, channels first; U transposed."""
    given = _inputs("gru", 3, 9, 5)(generator, dtype, device)
    wide = torch.cat([given["x_gates"], given["x_gates"]], dim=-1).mT.contiguous().mT
    return given | {"x_gates": wide[..., 15:], "U": given["U"].T.contiguous().T}


CASES = [
    Case("gru", "small", _inputs("gru", 2, 4, 3, return_state=True)),
    Case("gru coupled", "small", _inputs("gru_coupled", 2, 4, 3)),
    Case("gru reset first", "small", _inputs("gru_reset_first", 2, 4, 3)),
    Case("mgu", "small", _inputs("mgu", 2, 4, 3)),
    Case("lstm", "small", _inputs("lstm", 2, 4, 3, return_state=True)),
    Case("lstm peephole", "small", _inputs("lstm", 2, 4, 3, peephole=True)),
    Case("lstm coupled", "small", _inputs("lstm_coupled", 2, 4, 3, return_state=True)),
    Case("lstm coupled peephole", "small", _inputs("lstm_coupled", 2, 4, 3, peephole=True)),
    Case("lstm layernorm", "small", _inputs("lstm_layernorm", 2, 4, 3, return_state=True)),
    Case("lstm layernorm carried", "small", _inputs("lstm_layernorm_carried", 2, 4, 3, return_state=True)),
    Case("elman", "small", _inputs("elman", 2, 4, 3)),
    Case("elman relu", "small", _inputs("elman_relu", 2, 4, 3)),
    Case("indrnn", "small", _inputs("indrnn", 2, 4, 3, return_state=True)),
    Case("rhn", "small", _inputs("rhn", 2, 3, 3, depth=3)),
    Case("length 1", "edge", _inputs("lstm", 5, 1, 5, peephole=True)),
    Case("length 63", "edge", _inputs("mgu", 2, 63, 5), interpreted=False),
    Case("length 64", "edge", _inputs("rhn", 1, 64, 7, depth=2), interpreted=False),
    Case("length 65", "edge", _inputs("gru", 19, 65, 70, return_state=True), interpreted=False),
    Case("length 65 lstm", "edge", _inputs("lstm_coupled", 19, 65, 70, return_state=True), interpreted=False),
    Case("length 65 layernorm", "edge", _inputs("lstm_layernorm", 19, 65, 40, return_state=True), interpreted=False),
    Case("17 rows", "edge", _inputs("gru", 17, 6, 70, return_state=True)),
    Case("17 rows lstm", "edge", _inputs("lstm_coupled", 17, 6, 70, return_state=True)),
    Case("17 rows layernorm", "edge", _inputs("lstm_layernorm_carried", 17, 6, 33)),
    Case("length 65 elman", "edge", _inputs("elman", 6, 65, 33, b=False, state=False)),
    Case("length 65 relu", "edge", _inputs("elman_relu", 6, 65, 33), interpreted=False),
    Case("length 65 indrnn", "edge", _inputs("indrnn", 6, 65, 33), interpreted=False),
    Case("length 1000", "edge", _inputs("gru", 3, 1000, 20), interpreted=False),
    Case("gates 0 and 1", "edge", _inputs("gru", 3, 40, 6, scale=30.0), interpreted=False),
    Case("gates 0 and 1 lstm", "edge", _inputs("lstm", 3, 40, 6, scale=30.0, peephole=True)),
    Case("near underflow", "edge", _inputs("elman", 3, 40, 6, scale=1e-30, b=False, state=False)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs("gru", 1, 16384, 8)),
    Case("H108", "gpu", _inputs("lstm", 17, 6, 108)),
    *(
        Case(f"B16 L1024 H128 {cell}", "bench", _inputs(cell, 16, 1024, 128, state=False))
        for cell in ("lstm", "gru", "elman", "mgu", "indrnn", "lstm_layernorm")
    ),
    Case("B16 L1024 H128 rhn", "bench", _inputs("rhn", 16, 1024, 128, depth=2, state=False)),
]
