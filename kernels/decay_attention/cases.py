"""Inputs of `decay_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int, length: int, heads: int, keys: int, values: int, decay: str = "step", *, state: bool = False,
    log_gate: tuple[float, ...] = (), **more: Any,
) -> Make:  # fmt: skip
    """Random inputs. decay: "head" (H,), "step" (B, L, H) or "channel" (B, L, H, K); log_gate: every third log decay
    takes the next of these values instead of a random one, or every one where there is one value."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        drawn = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn, device=device)

        shape = {"head": (heads,), "step": (batch, length, heads), "channel": (batch, length, heads, keys)}[decay]
        log_decay = torch.nn.functional.logsigmoid(normal(*shape) + 2)
        if log_gate:
            chosen = log_decay.view(-1)[:: 3 if len(log_gate) > 1 else 1]
            chosen.copy_(torch.tensor(log_gate, dtype=drawn, device=device).repeat(len(chosen))[: len(chosen)])
        given = {
            "q": normal(batch, length, heads, keys).to(dtype),
            "k": normal(batch, length, heads, keys).to(dtype),
            "v": normal(batch, length, heads, values).to(dtype),
            "log_decay": log_decay.to(dtype),
        }
        if state:
            given["h0"] = normal(batch, heads, keys, values).to(dtype)
        return given | more

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """q, k, v cut from one projection, and log decays stored heads first."""
    given = _inputs(2, 9, 2, 5, 5)(generator, dtype, device)
    q, k, v = torch.cat([given["q"], given["k"], given["v"]], dim=-1).split(5, dim=-1)
    return {"q": q, "k": k, "v": v, "log_decay": given["log_decay"].mT.contiguous().mT}


EXTREME = (-float("inf"), 0.0, -87.0, -3.0, -700.0)

CASES = [
    Case("head", "small", _inputs(2, 5, 2, 3, 2, "head", chunk=2, state=True, return_state=True)),
    Case("step", "small", _inputs(2, 5, 2, 3, 2, chunk=4, state=True, return_state=True)),
    Case("channel", "small", _inputs(2, 5, 2, 3, 2, "channel", chunk=4, state=True, return_state=True)),
    Case("scale 1", "small", _inputs(1, 4, 1, 2, 3, scale=1.0)),
    Case("length 1", "edge", _inputs(2, 1, 2, 4, 3, "channel", state=True)),
    Case("length 63", "edge", _inputs(1, 63, 2, 4, 6)),
    Case("length 64 channel", "edge", _inputs(1, 64, 1, 4, 6, "channel"), interpreted=False),
    Case("length 65", "edge", _inputs(1, 65, 2, 17, 33, state=True, return_state=True)),
    Case(
        "length 65 channel", "edge", _inputs(1, 65, 1, 17, 33, "channel", state=True, return_state=True),
        interpreted=False,
    ),
    Case("length 1000", "edge", _inputs(1, 1000, 2, 4, 5), interpreted=False),
    Case("length 1000 channel", "edge", _inputs(1, 1000, 2, 4, 5, "channel"), interpreted=False),
    Case("chunk 24", "edge", _inputs(2, 70, 2, 3, 5, "head", chunk=24)),
    Case("extreme gates", "edge", _inputs(1, 70, 2, 4, 3, log_gate=EXTREME, state=True)),
    Case("extreme gates channel", "edge", _inputs(1, 70, 1, 4, 3, "channel", log_gate=EXTREME, state=True)),
    Case("no decay", "edge", _inputs(1, 33, 1, 3, 2, log_gate=(0.0,))),
    Case("wide", "edge", _inputs(1, 20, 1, 80, 70, state=True)),
    Case("wide channel", "edge", _inputs(1, 20, 1, 60, 70, "channel", state=True)),
    Case("too wide channel", "edge", _inputs(1, 20, 1, 80, 70, "channel", state=True), interpreted=False),
    Case("strided", "edge", _strided),
    Case("length 16384", "long", _inputs(1, 16384, 1, 4, 3)),
    Case("length 16384 channel", "long", _inputs(1, 16384, 1, 4, 3, "channel")),
    Case("K27", "gpu", _inputs(2, 130, 2, 27, 27)),
    Case("K27 channel", "gpu", _inputs(2, 130, 2, 27, 27, "channel")),
    Case("K256", "gpu", _inputs(1, 130, 1, 256, 256)),
    Case("K128 channel", "gpu", _inputs(1, 70, 1, 128, 128, "channel")),
    Case("B8 L2048 H4 K64 V64", "bench", _inputs(8, 2048, 4, 64, 64)),
    Case("B8 L2048 H4 K64 V64 channel", "bench", _inputs(8, 2048, 4, 64, 64, "channel")),
]  # fmt: skip
