"""soft_moe against tensors of the authors' router, and sequences with padding one by one."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, everything, golden
from refusals import refuses
from torch import Tensor

from lra.architectures._moe import SoftMoE
from lra.architectures.mixture.soft_moe import SoftMoE as SoftMoETransformer

NAMES = {"mu": "mu", "scale": "scale", "w1": "wi", "b1": "bi", "w2": "wo", "b2": "bo"}


def loaded(g: dict[str, Tensor]) -> SoftMoE:
    experts = SoftMoE(6, 8 / 6, n_experts=3, slots=2).double()
    experts.load_state_dict({own: g[f"param.{n}"].view_as(experts.get_parameter(own)) for own, n in NAMES.items()})
    return experts


def test_layer_equals_that_of_the_authors() -> None:
    g = golden("soft_moe")
    experts, x = loaded(g), g["x"].requires_grad_()
    logits = experts.logits(x)
    assert_near(logits.softmax(1).view(2, 9, 3, 2), g["mid.dispatch_weights"], "dispatch")
    assert_near(logits.softmax(-1).view(2, 9, 3, 2), g["mid.combine_weights"], "combine")
    y = experts(x, everything(x))
    assert_near(y, g["y"], "y")
    wanted = {own: (experts.get_parameter(own), g[f"grad.{n}"]) for own, n in NAMES.items()}
    assert_gradients(y, g, x, {own: (p, grad.view_as(p)) for own, (p, grad) in wanted.items()})
    found = experts.diagnostics()
    shares = g["mid.combine_weights"].sum((0, 1, 3)) / 18
    assert [found[f"load_{e}"] for e in range(3)] == pytest.approx(shares.tolist())
    assert found["dropped"] == 0


def test_padding_is_in_no_slot() -> None:
    g = golden("soft_moe")
    experts, x = loaded(g), g["x"]
    y = experts(x, torch.arange(9) < torch.tensor([[9], [4]]))
    assert_near(y[0], g["y"][0], "a whole row")
    assert_near(y[1:, :4], experts(x[1:, :4]), "a shorter row")


def test_there_are_as_many_slots_as_tokens() -> None:
    encoder = SoftMoETransformer(d_model=8, n_layers=1, length=60, n_experts=8)
    assert isinstance(part := encoder.experts[0], SoftMoE)
    assert part.mu.shape == (8, 8, 8)


test_bad_arguments = refuses(SoftMoETransformer, d_model=8, n_layers=1, length=8)(
    ({"slots": 0}, "slots is 0; at least 1"),
    ({"n_experts": 0}, "n_experts is 0; at least 1"),
    ({"direction": "causal"}, "direction is 'causal', but the mixture 'soft_moe' looks at all tokens"),
)
