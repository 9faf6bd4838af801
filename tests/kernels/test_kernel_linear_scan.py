"""`linear_scan` against the recurrences of published code, and what only it promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F

from lra.kernels.linear_scan import linear_scan

IMPLEMENTATIONS = ["reference", "cpu"]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hgrn(impl: str) -> None:
    """flash-linear-attention's HGRN recurrence: h_t = exp(g_t) h_{t-1} + x_t, with an initial state."""
    z = golden("hgrn_op")
    x, g, h0 = (z[f"in.{name}"].requires_grad_() for name in ("x", "g", "initial_state"))
    h = linear_scan(g.exp(), x, h0, impl=impl)
    close(h, z["y"])
    close(h[:, -1], z["mid.final_state"])
    for name, found in zip(("x", "g", "initial_state"), torch.autograd.grad(h, (x, g, h0), z["w"]), strict=True):
        close(found, z[f"grad.{name}"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_mingru(impl: str) -> None:
    """minGRU-pytorch computes h_t = (1 - z_t) h_{t-1} + z_t g(c_t) in log space; the plain scan gives the same."""
    z = golden("mingru")
    names = ("x", "param.to_hidden_and_gate.weight", "param.to_out.weight")
    x, w_in, w_out = (z[name].requires_grad_() for name in names)
    hidden, gate = F.linear(x, w_in).chunk(2, dim=-1)
    gate = torch.sigmoid(gate)
    candidate = torch.where(hidden >= 0, hidden + 0.5, torch.sigmoid(hidden))
    h = linear_scan(1 - gate, gate * candidate, impl=impl)
    close(h[:, -1], z["mid.final_state"])
    y = F.linear(h, w_out)
    close(y, z["y"])
    for name, found in zip(names, torch.autograd.grad(y, (x, w_in, w_out), z["w"]), strict=True):
        close(found, z[f"grad.{name}"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lru(impl: str) -> None:
    """minimal-LRU: a constant complex factor per channel, shared by every row and step."""
    z = golden("lru")
    x = z["x"].requires_grad_()
    factor = torch.exp(torch.complex(-z["param.nu_log"].exp(), z["param.theta_log"].exp()))
    b, c = (torch.complex(z[f"param.{m}_re"], z[f"param.{m}_im"]) for m in "BC")
    drive = (x.to(b.dtype) @ b.T) * z["param.gamma_log"].exp()
    y = (linear_scan(factor[None, None], drive, impl=impl) @ c.T).real + x * z["param.D"]
    close(y, z["y"])
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


def test_state_passes_from_one_half_to_the_other() -> None:
    a, b, h0 = torch.rand(2, 50, 7), torch.randn(2, 50, 7), torch.randn(2, 7)
    whole = linear_scan(a, b, h0)
    first = linear_scan(a[:, :20], b[:, :20], h0)
    second = linear_scan(a[:, 20:], b[:, 20:], first[:, -1])
    assert torch.equal(torch.cat((first, second), dim=1), whole)


def test_reverse_is_the_flipped_scan() -> None:
    a, b, h0 = torch.rand(2, 50, 7), torch.randn(2, 50, 7), torch.randn(2, 7)
    flipped = linear_scan(a.flip(1), b.flip(1), h0).flip(1)
    assert torch.equal(linear_scan(a, b, h0, reverse=True), flipped)


@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 1, 6), (1, 40, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_shared_factor_equals_the_expanded_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = (0.5 * torch.randn(shape, dtype=dtype)).requires_grad_()
    b, w = torch.randn(3, 40, 6, dtype=dtype), torch.randn(3, 40, 6, dtype=dtype)
    shared, expanded = linear_scan(a, b), linear_scan(a.expand(3, 40, 6).contiguous(), b)
    torch.testing.assert_close(shared, expanded)
    torch.testing.assert_close(torch.autograd.grad(shared, a, w), torch.autograd.grad(expanded, a, w))


def test_a_real_factor_meets_a_complex_input() -> None:
    a, b = torch.rand(2, 9, 3, requires_grad=True), torch.randn(2, 9, 3, dtype=torch.complex64)
    h = linear_scan(a, b)
    assert h.dtype == torch.complex64
    h.abs().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32


@pytest.mark.parametrize(("a", "b", "h0"), [((2, 8, 3), (2, 9, 3), (2, 3)), ((2, 9, 3), (2, 9, 3), (3, 2))])
def test_shapes_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...], h0: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"linear_scan: (a|h0) is \(.*\); expected"):
        linear_scan(torch.rand(a), torch.rand(b), torch.rand(h0))


def test_products_that_overflow_leave_what_is_zero(interpreted: Callable[..., Any]) -> None:
    assert interpreted("growth")
