"""`wkv` against published code, and what only it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor

from lra.kernels.wkv import wkv
from lra.kernels.wkv.reference import reference


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rwkv4(impl: str) -> None:
    """transformers' rwkv_linear_attention_cpu; w and u are its time_decay and time_first."""
    z = golden("rwkv4_wkv")
    names = ("in.k", "in.v", "param.time_decay", "param.time_first")
    inputs = [z[name].requires_grad_() for name in names]
    o, state = wkv(*inputs, return_state=True, impl=impl)
    close(o, z["y"])
    for row, name in enumerate(("num", "den", "max")):
        close(state[:, row], z[f"mid.{name}_state"])
    for name, found in zip(names, torch.autograd.grad(o, inputs, z["w"]), strict=True):
        close(found, z["grad." + name.removeprefix("in.")])


@pytest.fixture
def inputs() -> dict[str, Any]:
    """B 2, L 40, D 6."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"k": (2, 40, 6), "v": (2, 40, 6), "w": (6,), "u": (6,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def test_it_is_the_plain_formula(inputs: dict[str, Any]) -> None:
    """The sums of the docstring, written out."""
    k, v, w, u = inputs.values()
    t = torch.arange(40, dtype=torch.float64)
    past = t[:, None] - 1 - t[None, :]
    exponents = k[:, None] - past[None, :, :, None] * w.exp()
    exponents = torch.where((past >= 0)[None, :, :, None], exponents, -torch.inf)
    diagonal = torch.eye(40, dtype=torch.bool)[None, :, :, None]
    exponents = torch.where(diagonal, (u + k)[:, None], exponents)
    close(wkv(**inputs), (exponents.softmax(2) * v[:, None]).sum(2))


def test_a_sequence_may_be_cut_anywhere(inputs: dict[str, Any]) -> None:
    """Running on from the returned state equals one run, in values and in gradients through the state."""
    given = {name: t.requires_grad_() for name, t in inputs.items()}

    def run(*cuts: int) -> Tensor:
        outputs, state = [], None
        for start, stop in zip((0, *cuts), (*cuts, 40), strict=True):
            part = {name: t[:, start:stop] if t.dim() == 3 else t for name, t in given.items()}
            o, state = wkv(**part, h0=state, return_state=True)
            outputs.append(o)
        return torch.cat(outputs, dim=1)

    whole, parts = run(), run(1, 23)
    close(parts, whole)
    for a, b in zip(*(torch.autograd.grad(o.sin().sum(), list(given.values())) for o in (whole, parts)), strict=True):
        close(b, a)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_only_differences_of_keys_matter(inputs: dict[str, Any], shift: float) -> None:
    """Exponentials of the keys alone would overflow or vanish."""
    found = wkv(**inputs | {"k": inputs["k"] + shift})
    assert torch.isfinite(found).all()
    close(found, wkv(**inputs))


def test_a_slow_decay_keeps_its_digits() -> None:
    """An exponent in float32 would round a rate between two multiples of its spacing the same way at every step."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 4096, 2, generator=generator) for _ in range(2))
    k[:, 0], v[:, 0] = 9.0, 3.0  # the largest exponent, e^9 beside some 6,500 from all other tokens
    spacing = 2.0**-20  # of float32 numbers between 8 and 16
    w, u = torch.full((2,), math.log(105.45 * spacing)), torch.zeros(2)
    wanted = reference(*(t.double() for t in (k, v, w, u)))
    assert isinstance(wanted, Tensor)
    error = wkv(k, v, w, u).double() - wanted
    assert error.square().mean().sqrt() < 1e-5 * wanted.square().mean().sqrt()
