"""`delta_rule` against published recurrences, and what only it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F

from lra.kernels.delta_rule import delta_rule

IMPLEMENTATIONS = ["reference", "cpu"]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_deltanet(impl: str) -> None:
    """flash-linear-attention's recurrence without decay, heads first."""
    z = golden("deltanet")
    names = ("q", "k", "v", "beta", "initial_state")
    inputs = [z[f"in.{name}"].requires_grad_() for name in names]
    q, k, v, beta = (x.transpose(1, 2) for x in inputs[:4])
    o, state = delta_rule(q, k, v, beta, chunk=8, h0=inputs[4], return_state=True, impl=impl)
    close(o.transpose(1, 2), z["y"])
    close(state, z["mid.final_state"])
    for name, found in zip(names, torch.autograd.grad(o.transpose(1, 2), inputs, z["w"]), strict=True):
        close(found, z[f"grad.{name}"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gated_deltanet(impl: str) -> None:
    z = golden("gated_deltanet")
    names = ("q", "k", "v", "beta", "g", "initial_state")
    inputs = [z[f"in.{name}"].requires_grad_() for name in names]
    q, k, v, beta, gate, h0 = inputs
    o, state = delta_rule(q, k, v, beta, gate, chunk=8, h0=h0, return_state=True, impl=impl)
    close(o, z["y"])
    close(state, z["mid.final_state"])
    for name, found in zip(names, torch.autograd.grad(o, inputs, z["w"]), strict=True):
        close(found, z[f"grad.{name}"])


@pytest.fixture
def inputs() -> dict[str, Any]:
    """B 2, L 40, H 2, K 5, V 3, keys of unit length."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 40, 2, *shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(5), F.normalize(normal(5), dim=-1), normal(3)
    return {"q": q, "k": k, "v": v, "beta": normal().sigmoid(), "log_decay": F.logsigmoid(normal() + 2)}


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_the_chunk_has_no_influence(inputs: dict[str, Any], chunk: int) -> None:
    given = {name: t.requires_grad_() for name, t in inputs.items()}
    wanted, found = (delta_rule(**given, chunk=size) for size in (64, chunk))
    close(found, wanted)
    cotangent = torch.ones_like(wanted).cumsum(1)
    for a, b in zip(*(torch.autograd.grad(o, list(given.values()), cotangent) for o in (found, wanted)), strict=True):
        close(a, b)


def test_a_sequence_may_be_cut_anywhere(inputs: dict[str, Any]) -> None:
    """Running on from the returned state equals one run, in values and in gradients through the state."""
    given = {name: t.requires_grad_() for name, t in inputs.items()}

    def run(*cuts: int) -> tuple[Tensor, Tensor]:
        outputs, state = [], None
        for start, stop in zip((0, *cuts), (*cuts, 40), strict=True):
            part = {name: t[:, start:stop] for name, t in given.items()}
            o, state = delta_rule(**part, chunk=8, h0=state, return_state=True)
            outputs.append(o)
        assert state is not None
        return torch.cat(outputs, dim=1), state

    whole, parts = run(), run(1, 19)
    for a, b in zip(whole, parts, strict=True):
        close(b, a)
    grads = (torch.autograd.grad(x[0].sin().sum() + x[1].sin().sum(), list(given.values())) for x in (whole, parts))
    for a, b in zip(*grads, strict=True):
        close(b, a)


def test_a_full_write_is_read_back(inputs: dict[str, Any]) -> None:
    """At rate 1 the memory holds exactly v_t under the unit key k_t, whatever was there."""
    given = inputs | {"q": inputs["k"], "beta": torch.ones_like(inputs["beta"])}
    close(delta_rule(**given, scale=1.0), inputs["v"])


def test_a_rate_of_zero_writes_nothing(inputs: dict[str, Any]) -> None:
    given = inputs | {"beta": torch.zeros_like(inputs["beta"])}
    close(delta_rule(**given), torch.zeros_like(inputs["v"]))


def test_no_decay_is_a_log_decay_of_zero(inputs: dict[str, Any]) -> None:
    decayed = delta_rule(**inputs | {"log_decay": torch.zeros_like(inputs["beta"])})
    close(delta_rule(**inputs | {"log_decay": None}), decayed)
    assert not torch.allclose(delta_rule(**inputs), decayed)
