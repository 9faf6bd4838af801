"""`expert_mlp` against published mixtures of experts, and what only it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor

from lra.kernels.expert_mlp import expert_mlp

both = pytest.mark.parametrize("impl", ["reference", "cpu"])


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-12)


@both
def test_switch_transformer(impl: str) -> None:
    """Top-1 routing with a capacity per sequence: tokens over it come out as 0, the gate trains the router."""
    z = golden("switch_moe")
    x = z["x"].requires_grad_()
    probabilities = torch.softmax(x @ z["param.router.classifier.weight"].T + z["param.router.classifier.bias"], -1)
    gate, choice = probabilities.max(-1)
    dropped = z["mid.dispatch"].sum(-1) == 0
    assert dropped.any(), "nothing dropped: the test shows less than it says"
    weights = [torch.stack([z[f"param.experts.expert_{e}.{w}.weight"].T for e in range(4)]) for w in ("wi", "wo")]
    index = choice.masked_fill(dropped, -1).view(-1, 1)
    y = expert_mlp(x.flatten(0, 1), index, gate.view(-1, 1), *weights, activation="relu", impl=impl).view_as(x)
    close(y, z["y"])
    assert not y[dropped].any()
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


@both
def test_noisy_top_k(impl: str) -> None:
    """Experts with biases, carried by a constant input and a constant hidden unit. The source's experts end in a
    softmax, so every choice is asked for by itself and mixed here."""
    z = golden("noisy_topk_moe")
    x = z["x"].requires_grad_()
    experts, k = int(z["cfg.E"]), int(z["cfg.k"])
    noise = torch.nn.functional.softplus(x @ z["param.w_noise"]) + 0.01
    probabilities = torch.softmax(x @ z["param.w_gate"] + z["mid.noise"] * noise, -1)
    top, index = probabilities.topk(k, -1)
    gate = top / (top.sum(-1, keepdim=True) + 1e-6)
    inside, outside = [], []
    for e in range(experts):
        w1, b1, w2, b2 = (z[f"param.experts.{e}.fc{n}.{part}"] for n in (1, 2) for part in ("weight", "bias"))
        unit = torch.zeros(1, x.shape[1] + 1, dtype=x.dtype)
        unit[0, -1] = 1
        inside.append(torch.cat([torch.cat([w1, b1[:, None]], dim=1), unit]).T)
        outside.append(torch.cat([w2, b2[:, None]], dim=1).T)
    w1, w2 = torch.stack(inside), torch.stack(outside)
    known = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    y = torch.zeros_like(z["y"])
    for j in range(k):
        chosen = expert_mlp(
            known, index[:, j : j + 1], torch.ones_like(known[:, :1]), w1, w2, activation="relu", impl=impl
        )
        y = y + gate[:, j : j + 1] * torch.softmax(chosen, -1)
    close(y, z["y"])
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


def arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(6, 4),
        "expert_index": torch.tensor([[0, 2], [2, 0], [-1, 2], [-1, -1], [2, 2], [0, -1]]),
        "gate": torch.rand(6, 2),
        "w1": torch.randn(3, 4, 5),
        "w2": torch.randn(3, 5, 4),
    }


@both
def test_what_is_not_chosen_takes_no_part(impl: str) -> None:
    """Expert 1 has no tokens, token 3 no experts: NaNs there touch nothing on the fast path, gradients are 0."""
    given = arguments()
    if impl == "cpu":
        given["w1"][1], given["w2"][1], given["x"][3] = float("nan"), float("nan"), float("nan")
    names = ("x", "gate", "w1", "w2")
    for name in names:
        given[name].requires_grad_()
    y = expert_mlp(**given, impl=impl)
    x, gate, w1, w2 = torch.autograd.grad(y.square().sum(), [given[name] for name in names])
    assert y.isfinite().all()
    assert not y[3].any()
    assert not x[3].any()
    assert not gate[given["expert_index"] < 0].any()
    assert not w1[1].any()
    assert not w2[1].any()
    assert w1[[0, 2]].isfinite().all()
    assert w1[[0, 2]].any()


def test_everything_dropped() -> None:
    given = arguments() | {"expert_index": torch.full((6, 2), -1)}
    given["w1"].requires_grad_()
    y = expert_mlp(**given)
    assert torch.equal(y, torch.zeros(6, 4))
    assert not torch.autograd.grad(y.sum(), given["w1"])[0].any()


def test_the_order_of_tokens_does_not_matter() -> None:
    given, order = arguments(), torch.tensor([4, 0, 5, 2, 1, 3])
    y = expert_mlp(**given)
    shuffled = expert_mlp(**given | {name: given[name][order] for name in ("x", "expert_index", "gate")})
    torch.testing.assert_close(shuffled, y[order])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of gelu, relu"),
        ({"expert_index": torch.zeros(6, 2)}, "expert_index is torch.float32 on cpu; expected int64 on cpu"),
        ({"expert_index": torch.zeros(6, dtype=torch.int64)}, r"expert_index is \(6,\); expected \(6, k\) with k > 0"),
        ({"expert_index": torch.full((6, 2), 3)}, r"expert_index is 3 somewhere; expected -1 \(dropped\) to 2"),
        ({"expert_index": torch.full((6, 2), -2)}, "expert_index is -2 somewhere"),
        ({"x": torch.zeros(6, 4, dtype=torch.complex64)}, "x is torch.complex64; expected a real dtype"),
        ({"gate": torch.rand(6, 1)}, r"gate is \(6, 1\); expected \(6, 2\)"),
        ({"w1": torch.randn(3, 5, 4)}, r"w1 is \(3, 5, 4\); expected \(E, 4, F\)"),
        ({"w2": torch.randn(3, 4, 5)}, r"w2 is \(3, 4, 5\); expected \(3, 5, D_out\)"),
        ({"x": torch.zeros(0, 4)}, r"x is \(0, 4\); expected \(T, D\) with T > 0"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"expert_mlp: {message}"):
        expert_mlp(**arguments() | changes)
