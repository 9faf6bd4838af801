"""Inputs of `expert_mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    tokens: int, width: int, hidden: int, experts: int, choices: int, *, used: int | None = None, dropped: float = 0.2,
    gates: float | None = None, **more: Any,
) -> Make:  # fmt: skip
    """Random routing to the first `used` experts; dropped: share of choices that are; gates: one value for all."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        drawn = torch.promote_types(dtype, torch.float32)
        parts = 2 if more.get("activation") == "swiglu" else 1

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        index = torch.randint(used or experts, (tokens, choices), generator=generator, device=device)
        index[torch.rand(tokens, choices, generator=generator, device=device) < dropped] = -1
        gate = normal(tokens, choices).sigmoid()
        return {
            "x": normal(tokens, width).to(dtype),
            "expert_index": index,
            "gate": (gate if gates is None else torch.full_like(gate, gates)).to(dtype),
            "w1": (normal(experts, width, hidden * parts) / width**0.5).to(dtype),
            "w2": (normal(experts, hidden, width) / hidden**0.5).to(dtype),
        } | more

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Every argument cut from something wider or transposed."""
    given = _inputs(9, 6, 8, 3, 2)(generator, dtype, device)
    wide = {name: torch.cat([given[name], given[name]], dim=-1) for name in ("x", "expert_index", "gate")}
    cut = {name: t[:, : given[name].shape[1]] for name, t in wide.items()}
    return cut | {name: given[name].mT.contiguous().mT for name in ("w1", "w2")}


CASES = [
    Case("two of three", "small", _inputs(5, 4, 6, 3, 2)),
    Case("relu", "small", _inputs(5, 4, 6, 3, 1, activation="relu")),
    Case("swiglu", "small", _inputs(5, 4, 6, 3, 2, activation="swiglu")),
    Case("one token", "edge", _inputs(1, 5, 7, 2, 2, dropped=0.0)),
    Case("63 tokens", "edge", _inputs(63, 5, 7, 4, 1)),
    Case("64 tokens", "edge", _inputs(64, 5, 7, 4, 3, activation="relu")),
    Case("65 tokens, one expert", "edge", _inputs(65, 5, 7, 1, 1, dropped=0.0)),
    Case("1000 tokens", "edge", _inputs(1000, 16, 32, 8, 2)),
    Case("experts without tokens", "edge", _inputs(20, 5, 7, 6, 2, used=2)),
    Case("all dropped but few", "edge", _inputs(40, 5, 7, 3, 2, dropped=0.95)),
    Case("gates 0", "edge", _inputs(12, 5, 7, 3, 2, gates=0.0)),
    Case("gates near underflow", "edge", _inputs(12, 5, 7, 3, 2, gates=1e-37)),
    Case("strided", "edge", _strided),
    Case("16384 tokens", "long", _inputs(16384, 8, 16, 4, 2)),
    Case("D124", "gpu", _inputs(300, 124, 248, 4, 2)),
    Case("T16384 D128 F512 E8 k2", "bench", _inputs(16384, 128, 512, 8, 2, dropped=0.05)),
]
