"""expert_choice against tensors of the released router, and a loop over the experts."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._moe import ExpertChoice
from lra.architectures.mixture.expert_choice import ExpertChoiceTransformer


def loaded(g: dict[str, Tensor]) -> ExpertChoice:
    experts = ExpertChoice(6, 8 / 6, n_experts=4, capacity=1.5, activation="relu").double()
    experts.load_state_dict({
        "w1": g["param.wi"], "w2": g["param.wo"], "router.weight": g["param.router_kernel"].T,
        "router.bias": g["param.router_bias"],
    })  # fmt: skip
    return experts


def test_layer_equals_the_released_router() -> None:
    g = golden("expert_choice")
    experts, x = loaded(g), g["x"].requires_grad_()
    token, gate, takes = experts.route(x, everything(x))
    assert takes.all()
    assert torch.equal(token.mT, g["mid.chosen_tokens"])
    assert_near(gate.mT, g["mid.gates"], "gates")
    y = experts(x, everything(x))
    assert_near(y, g["y"], "y")
    router = experts.router
    assert_gradients(y, g, x, {
        "w1": (experts.w1, g["grad.wi"]), "w2": (experts.w2, g["grad.wo"]),
        "router": (router.weight, g["grad.router_kernel"].T), "bias": (router.bias, g["grad.router_bias"]),
    })  # fmt: skip
    assert experts.aux_loss() is None
    unwanted = (g["mid.dispatch"].sum(-1) == 0).double().mean()
    assert experts.diagnostics()["dropped"] == pytest.approx(unwanted.item())


def test_padding_is_taken_by_no_expert() -> None:
    """Theirs has as much room for a shorter sequence, so that experts take more of its tokens; here a loop."""
    g = golden("expert_choice")
    experts, x = loaded(g), g["x"]
    mask = torch.arange(12) < torch.tensor([[9], [1]])
    y = experts(x, mask)
    for row, n in ((0, 9), (1, 1)):
        given = x[row, :n]
        p = experts.router(given).softmax(-1)
        wanted = torch.zeros_like(given)
        for e in range(4):
            for t in p[:, e].argsort(descending=True)[: max(int(1.5 * n / 4), 1)]:
                wanted[t] += p[t, e] * (F.relu(given[t] @ experts.w1[e]) @ experts.w2[e])
        assert_near(y[row, :n], wanted, f"row {row}")
        assert not y[row, n:].any()


def test_every_expert_has_the_same_load() -> None:
    experts = ExpertChoice(8, 1.0, n_experts=4, capacity=2.0)
    experts(torch.randn(3, 16, 8))
    found = experts.diagnostics()
    assert [found[f"load_{e}"] for e in range(4)] == [0.25] * 4
    assert found["entropy"] == pytest.approx(1)


test_bad_arguments = refuses(ExpertChoiceTransformer, d_model=8, n_layers=1, length=8)(
    ({"capacity": 0.0}, r"capacity is 0\.0; more than 0 and at most the 8 experts"),
    ({"capacity": 9.0}, r"capacity is 9\.0"),
    ({"n_experts": 0}, "n_experts is 0; at least 1"),
    ({"direction": "causal"}, "direction is 'causal', but the mixture 'expert_choice' looks at all tokens"),
)
