"""`causal_conv1d` against PyTorch's own convolution, and what only it promises."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lra.kernels.causal_conv1d import causal_conv1d


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
def test_is_a_depthwise_conv1d_padded_on_the_left(impl: str, activation: str | None, taps: int) -> None:
    """The form Mamba's own module falls back to: nn.Conv1d(groups=D, padding=K-1), cut to the length of the input."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 5), (5, taps), (5,)))
    wanted = F.conv1d(x.mT, weight[:, None], bias, padding=taps - 1, groups=5)[..., :7].mT
    wanted = F.silu(wanted) if activation else wanted
    found = causal_conv1d(x, weight, bias, activation, impl=impl)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), cotangent) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_never_looks_ahead() -> None:
    x, weight = torch.randn(1, 20, 4), torch.randn(4, 4)
    before = causal_conv1d(x, weight)
    x[:, 12:] = torch.nan
    after = causal_conv1d(x, weight)
    assert torch.equal(after[:, :12], before[:, :12])
    assert after[:, 12:].isnan().all()


def test_continues_from_the_last_inputs() -> None:
    """What is left of the first half for the second is its last K - 1 inputs."""
    x, weight, bias = torch.randn(2, 30, 4), torch.randn(4, 4), torch.randn(4)
    whole = causal_conv1d(x, weight, bias, "silu")
    assert torch.equal(causal_conv1d(x[:, 17:], weight, bias, "silu")[:, 3:], whole[:, 20:])


def test_silu_keeps_its_limits() -> None:
    x = torch.tensor([-1000.0, -90.0, 0.0, 90.0, 1000.0, torch.nan])[None, :, None]
    found = causal_conv1d(x, torch.ones(1, 1), activation="silu")
    torch.testing.assert_close(found, F.silu(x), atol=1e-30, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"activation": "relu"}, "activation"),
        ({"weight": torch.randn(5, 4)}, "weight"),
        ({"weight": torch.randn(4, 0)}, "weight"),
        ({"bias": torch.randn(5)}, "bias"),
        ({"x": torch.randn(2, 9, 4, dtype=torch.complex64)}, "x"),
    ],
)
def test_bad_input(arguments: dict[str, object], named: str) -> None:
    given = {"x": torch.randn(2, 9, 4), "weight": torch.randn(4, 4), **arguments}
    with pytest.raises(ValueError, match=f"causal_conv1d: {named} is .*; expected"):
        causal_conv1d(**given)  # type: ignore[arg-type]
