"""entmax against tensors of the authors' package, gradcheck, and the layer written out from the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, golden
from torch import Tensor

from lra.architectures.attention.entmax import Entmax, EntmaxMixer, entmax
from lra.attention import merge_heads


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax_bisect"])
def test_equals_the_authors_package(name: str) -> None:
    g = golden(name)
    x, alpha = g["x"].requires_grad_(), float(g["mid.alpha"])
    y = entmax(x, alpha)
    assert_close(y, g["y"], 1e-12)
    assert torch.equal((y > 0).sum(-1), g["mid.support_size"])
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"], 1e-11)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_gradients_and_normalisation(alpha: float) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 9, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: entmax(t, alpha), x)
    assert_close(entmax(x, alpha).sum(-1), torch.ones(3, dtype=torch.float64), 1e-14)
    # hidden places take no weight and change none, however large the others are
    hidden = torch.cat([1e4 * x, torch.full((3, 2), -torch.inf, dtype=torch.float64)], -1)
    assert_close(entmax(hidden, alpha)[:, :9], entmax(1e4 * x, alpha), 1e-14)
    assert not entmax(hidden, alpha)[:, 9:].any()


def test_exact_thresholds_are_those_of_bisection() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 40, dtype=torch.float64) * torch.logspace(-2, 2, 50, dtype=torch.float64)[:, None]
    for alpha in (1.5, 2.0):
        assert_close(entmax(x, alpha), entmax(x, alpha + 1e-13), 1e-8)
    assert_close(entmax(x / 100, 1 + 1e-5), (x / 100).softmax(-1), 1e-4)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_supports_of_any_size_are_found(alpha: float) -> None:
    """Beyond the values that are sorted first: equal values share the weight."""
    x = torch.zeros(3, 500, dtype=torch.float64)
    x[1, 200:], x[2, 1:] = -torch.inf, -torch.inf
    for row, size in enumerate((500, 200, 1)):
        expected = torch.cat([torch.full((size,), 1 / size), torch.zeros(500 - size)]).double()
        assert_close(entmax(x, alpha)[row], expected, 1e-8)


@pytest.mark.parametrize("causal", [False, True])
def test_layer_equals_its_definition(causal: bool) -> None:
    """Weights by the closed form of sparsemax, token by token: the largest set whose members stay positive."""
    torch.manual_seed(0)
    mixer = EntmaxMixer(8, 2, width=8, positions="none", causal=causal, alpha=2.0, dropout=0.0).double()
    torch.nn.init.normal_(mixer.qkv.weight)
    x, real = torch.randn(2, 7, 8, dtype=torch.float64), (7, 4)
    y = mixer(x, torch.arange(7) < torch.tensor(real)[:, None])
    q, k, v = mixer.heads(x)
    for row, length in enumerate(real):
        o = torch.zeros(2, length, 4, dtype=torch.float64)
        for h in range(2):
            for i in range(length):
                seen = i + 1 if causal else length
                p = projected(k[row, h, :seen] @ q[row, h, i] / 2)
                o[h, i] = p @ v[row, h, :seen]
        assert_close(y[row, :length], mixer.out(merge_heads(o[None])[0]), 1e-12)


def projected(s: Tensor) -> Tensor:
    """The point of the simplex nearest to s."""
    ordered = sorted(s.tolist(), reverse=True)
    size = max(n for n in range(1, len(s) + 1) if 1 + n * ordered[n - 1] > sum(ordered[:n]))
    return (s - (sum(ordered[:size]) - 1) / size).clamp_min(0)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_wrong_arguments_are_named(alpha: float) -> None:
    wrong: dict[str, Any] = {"alpha": alpha}
    with pytest.raises(ValueError, match=f"alpha is {alpha}; above 1"):
        Entmax(d_model=16, n_layers=1, length=8, **wrong)
