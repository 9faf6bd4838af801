"""Inputs of `delta_rule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int, length: int, heads: int, keys: int, values: int, *, gated: bool = True, state: bool = False,
    rates: tuple[float, ...] = (), log_gates: tuple[float, ...] = (), **more: Any,
) -> Make:  # fmt: skip
    """Random inputs with keys of unit length; every third rate and log decay takes the next of `rates`, `log_gates`."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        drawn = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        def mixed(x: Tensor, values: tuple[float, ...]) -> Tensor:
            chosen = x.view(-1)[::3]
            if values:
                chosen.copy_(torch.tensor(values, dtype=drawn, device=device).repeat(len(chosen))[: len(chosen)])
            return x.to(dtype)

        given = {
            "q": normal(batch, length, heads, keys).to(dtype),
            "k": F.normalize(normal(batch, length, heads, keys), dim=-1).to(dtype),
            "v": normal(batch, length, heads, values).to(dtype),
            "beta": mixed(torch.sigmoid(normal(batch, length, heads)), rates),
        }
        if gated:
            given["log_decay"] = mixed(F.logsigmoid(normal(batch, length, heads) + 3), log_gates)
        if state:
            given["h0"] = normal(batch, heads, keys, values).to(dtype)
        return given | more

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """q, k, v cut from one projection, rates and log decays stored heads first."""
    given = _inputs(2, 9, 2, 5, 5)(generator, dtype, device)
    q, k, v = torch.cat([given["q"], given["k"], given["v"]], dim=-1).split(5, dim=-1)
    late = {name: given[name].mT.contiguous().mT for name in ("beta", "log_decay")}
    return {"q": q, "k": k, "v": v} | late


def _one_key(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Every step writes under nearly the same key at full rate: the triangular systems are at their stiffest."""
    given = _inputs(1, 70, 1, 4, 3, gated=False, rates=(1.0,))(generator, dtype, device)
    return given | {"k": F.normalize(given["k"][:, :1] + 0.1 * given["k"], dim=-1)}


CASES = [
    Case("gated", "small", _inputs(1, 5, 2, 3, 2, chunk=4, state=True, return_state=True)),
    Case("ungated", "small", _inputs(1, 5, 2, 2, 3, gated=False, chunk=2)),
    Case("length 1", "edge", _inputs(2, 1, 2, 4, 3, state=True)),
    Case("length 63", "edge", _inputs(1, 63, 2, 4, 6, gated=False)),
    Case("length 64", "edge", _inputs(1, 64, 1, 4, 6, scale=1.0)),
    Case("length 65", "edge", _inputs(1, 65, 2, 17, 33, state=True, return_state=True), interpreted=False),
    Case("length 1000", "edge", _inputs(1, 1000, 2, 4, 5), interpreted=False),
    Case("chunk 24", "edge", _inputs(2, 70, 2, 3, 5, chunk=24), interpreted=False),
    Case(
        "extreme gates", "edge",
        _inputs(1, 70, 2, 4, 3, rates=(0.0, 1.0), log_gates=(-float("inf"), 0.0, -87.0, -700.0), state=True),
    ),
    Case("one key", "edge", _one_key),
    Case("wide", "edge", _inputs(1, 20, 1, 80, 70, state=True)),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 1, 4, 3)),
    Case("K27", "gpu", _inputs(2, 130, 2, 27, 27)),
    Case("K256", "gpu", _inputs(1, 70, 1, 256, 256)),
    Case("B8 L2048 H4 K64 V64", "bench", _inputs(8, 2048, 4, 64, 64)),
]  # fmt: skip
