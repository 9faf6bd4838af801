"""`selective_scan` against Mamba's own reference code, and what only it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.kernels.selective_scan import selective_scan


def inputs(length: int, batch: int = 2, width: int = 6, size: int = 4) -> dict[str, Any]:
    return {
        "u": torch.randn(batch, length, width),
        "delta": F.softplus(torch.randn(batch, length, width)),
        "A": -torch.rand(width, size),
        "B": torch.randn(batch, length, size),
        "C": torch.randn(batch, length, size),
        "D": torch.randn(width),
        "z": torch.randn(batch, length, width),
    }


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_groups_of_channels_are_scans_of_their_own(impl: str) -> None:
    """selective_scan_ref with B and C: (B, G, N, L), channels in G runs; here each run is a call."""
    z = golden("mamba_selective_scan_grouped")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = {name: z[f"in.{name}"].requires_grad_() for name in names}
    groups = given["B"].shape[1]
    delta = F.softplus(given["delta"] + given["delta_bias"].unsqueeze(-1))
    streams = zip(*(t.mT.chunk(groups, dim=-1) for t in (given["u"], delta, given["z"])), strict=True)
    sizes = zip(given["A"].chunk(groups), given["D"].chunk(groups), strict=True)
    shared = zip(given["B"].unbind(1), given["C"].unbind(1), strict=True)
    found = [
        selective_scan(u, dt, A, B.mT, C.mT, D, gate, return_state=True, impl=impl)
        for (u, dt, gate), (A, D), (B, C) in zip(streams, sizes, shared, strict=True)
    ]
    y = torch.cat([own for own, _ in found], dim=-1)
    torch.testing.assert_close(y.mT, z["y"], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([s for _, s in found], 1), z["mid.last_state"], rtol=0, atol=1e-10)
    grads = torch.autograd.grad(y.mT, list(given.values()), z["w"])
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, z[f"grad.{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_mamba(impl: str) -> None:
    """selective_scan_ref takes (B, D, L), and adds the step's bias and softplus inside."""
    z = golden("mamba_selective_scan")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = {name: z[f"in.{name}"].requires_grad_() for name in names}
    u, raw, b, c, gate = (given[name].mT for name in ("u", "delta", "B", "C", "z"))
    delta = F.softplus(raw + given["delta_bias"])
    y, state = selective_scan(u, delta, given["A"], b, c, given["D"], gate, return_state=True, impl=impl)
    torch.testing.assert_close(y.mT, z["y"], rtol=0, atol=1e-10)
    torch.testing.assert_close(state, z["mid.last_state"], rtol=0, atol=1e-10)
    grads = torch.autograd.grad(y.mT, list(given.values()), z["w"])
    for name, found in zip(names, grads, strict=True):
        torch.testing.assert_close(found, z[f"grad.{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [20, 32, 64])
def test_state_passes_from_one_half_to_the_other(cut: int) -> None:
    given = inputs(70)
    whole, last = selective_scan(**given, return_state=True)
    over_time = ("u", "delta", "B", "C", "z")
    first, state = selective_scan(**(given | {k: given[k][:, :cut] for k in over_time}), return_state=True)
    rest = given | {k: given[k][:, cut:] for k in over_time}
    second, final = selective_scan(**rest, h0=state, return_state=True)
    assert torch.equal(torch.cat((first, second), dim=1), whole)
    assert torch.equal(final, last)


def test_gradient_through_the_state_alone() -> None:
    """A loss on the last state only: no gradient reaches C, D and z, and all of it h0."""
    given = {name: t.double().requires_grad_() for name, t in inputs(40).items()}
    h0 = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(
            selective_scan(**given, h0=h0, return_state=True, impl=impl)[1].sum(),
            [*given.values(), h0],
            materialize_grads=True,
        )
        for impl in ("cpu", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[4].any()


class Largest(TorchDispatchMode):
    """The largest tensor any operation returned, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.numel())
        return result


def test_stores_no_state_per_step() -> None:
    """No tensor that passes through PyTorch, forward or backward, holds more than one number per input number."""
    given = {name: t.requires_grad_() for name, t in inputs(256, batch=1, width=32, size=16).items()}
    with Largest() as seen:
        selective_scan(**given).sum().backward()
    assert seen.numbers == 256 * 32


def test_saves_nothing_without_a_gradient() -> None:
    given = inputs(64, batch=1, width=16, size=16)
    with Largest() as seen:
        selective_scan(**given)
    assert seen.numbers == 64 * 16


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"delta": torch.rand(2, 8, 6)}, "delta"),
        ({"A": -torch.rand(5, 4)}, "A"),
        ({"B": torch.randn(2, 9, 5)}, "B"),
        ({"C": torch.randn(2, 4, 9)}, "C"),
        ({"D": torch.randn(6, 1)}, "D"),
        ({"h0": torch.randn(2, 4, 6)}, "h0"),
        ({"A": -torch.rand(6, 4, dtype=torch.complex64)}, "A"),
    ],
)
def test_bad_input(arguments: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=f"selective_scan: {named} is .*; expected"):
        selective_scan(**(inputs(9) | arguments))
