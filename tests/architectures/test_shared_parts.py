"""The parts of the residual stack that have a faster form on a CPU: the same numbers as PyTorch's own operators."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.architectures._norm import RMSNorm, rms_norm
from lra.architectures._ssm import weighted_sum
from lra.architectures._stack import flip
from lra.encoder import fill_padding
from lra.registry import architectures

MASK = torch.arange(6) < torch.tensor([[6], [4], [1]])


def _sequence() -> torch.Tensor:
    return torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_that_of_torch_with_its_gradients(weighted: bool) -> None:
    x, norm = _sequence(), RMSNorm(5, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    weight, by = (norm.weight, (x, norm.weight)) if weighted else (None, (x,))
    own = norm(x) if weighted else rms_norm(x, 1e-3)
    theirs = F.rms_norm(x, (5,), weight, 1e-3)
    torch.testing.assert_close(own, theirs, rtol=1e-13, atol=1e-13)
    w = torch.randn_like(own)
    for one, other in zip(torch.autograd.grad(own, by, w), torch.autograd.grad(theirs, by, w), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    x = _sequence().detach().bfloat16().requires_grad_()
    y = rms_norm(x, 1e-6)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.rms_norm(x.float(), (5,), None, 1e-6).bfloat16())
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_padding_is_filled_whatever_stood_there() -> None:
    x = _sequence()
    given = torch.where(MASK.unsqueeze(-1), x, torch.nan)
    y = fill_padding(given, MASK)
    torch.testing.assert_close(y, x.masked_fill(~MASK.unsqueeze(-1), 0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, MASK.unsqueeze(-1).expand_as(x).double())
    assert torch.isneginf(fill_padding(given, MASK, -torch.inf)[~MASK]).all()
    assert fill_padding(x, torch.ones_like(MASK)) is x


def test_flip_reverses_the_real_tokens_and_so_does_its_gradient() -> None:
    x, w = _sequence(), torch.randn(3, 6, 5, dtype=torch.float64)
    y = flip(x, MASK)
    for row, length in enumerate((6, 4, 1)):
        assert torch.equal(y[row, :length], x[row, :length].flip(0))
        assert torch.equal(y[row, length:], x[row, length:])
    assert torch.equal(torch.autograd.grad(y, x, w)[0], flip(w, MASK))
    assert torch.autograd.gradgradcheck(lambda t: flip(t, MASK).square(), x)


class ComplexNumbers(TorchDispatchMode):
    """Counts the complex numbers that operators return."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_complex():
            self.made += result.numel()
        return result


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 1000])
def test_a_weighted_sum_over_tokens(tokens: int) -> None:
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    ratio = torch.polar(torch.rand(3, 4, dtype=torch.float64) ** 0.01, torch.randn(3, 4, dtype=torch.float64))
    places = ratio.unsqueeze(-1) ** torch.arange(tokens)
    torch.testing.assert_close(weighted_sum(x, ratio), torch.einsum("hml,blh->bhm", places, x.to(ratio.dtype)))


def test_a_weighted_sum_lays_out_no_power_of_every_token() -> None:
    ratio = torch.polar(torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    with ComplexNumbers() as counted:
        weighted_sum(torch.randn(1, 4096, 3), ratio)
    assert counted.made < ratio.numel() * 4096 / 2


def test_no_function_of_its_own_context_takes_any_number_of_arguments() -> None:
    """torch.compile passes such a forward its arguments one place late where no gradient is asked for, silently."""
    for name in architectures.names():
        architectures.get(name)
    functions = [
        kind for kind in Function.__subclasses__()
        if kind.__module__.startswith("lra.architectures") and "setup_context" in vars(kind)
    ]  # fmt: skip
    assert len(functions) > 5
    variadic = {
        kind.__qualname__ for kind in functions
        if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(kind.forward).parameters.values())
    }  # fmt: skip
    assert variadic == set()
