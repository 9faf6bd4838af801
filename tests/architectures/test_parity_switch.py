"""switch against tensors of Hugging Face's sparse layer and its losses, and the dense layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import golden
from stepping import stepped
from torch import Tensor

from lra.architectures._moe import Switch
from lra.architectures._stack import FeedForward
from lra.architectures.mixture.switch import SwitchTransformer


def loaded(g: dict[str, Tensor]) -> Switch:
    """Without the bias of its router, which a constant input stands in for; without the gain of losses."""
    factor = g["cfg.capacity"].item() / 10 * 4  # of 10 tokens and 4 experts
    experts = Switch(7, 9 / 7, n_experts=4, capacity=factor, balance_weight=1.0, z_weight=0.0).double().eval()
    for target, name in ((experts.w1, "wi"), (experts.w2, "wo")):
        weights = torch.stack([g[f"param.experts.expert_{e}.{name}.weight"].T for e in range(4)])
        target.data = torch.nn.functional.pad(weights, (0, 0, 0, 1) if name == "wi" else (0, 1))
    bias = g["param.router.classifier.bias"].unsqueeze(1)
    experts.router.weight.data = torch.cat([g["param.router.classifier.weight"], bias], dim=1)
    return experts


def test_layer_equals_hugging_face() -> None:
    g = golden("switch_moe")
    experts, x = loaded(g), g["x"].requires_grad_()
    one = torch.cat([x, torch.ones(2, 10, 1)], dim=-1)
    mask = torch.ones(2, 10, dtype=torch.bool)
    y = experts(one, mask)[..., :6]
    dropped = g["mid.dispatch"].sum(-1) == 0
    assert dropped.any(), "nothing dropped: the test shows less than it says"
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((y * g["w"]).sum(), x)[0], g["grad.x"], rtol=0, atol=1e-12)
    assert experts.diagnostics()["dropped"] == pytest.approx(dropped.double().mean().item())
    index, gate, _ = experts.route(one, mask)
    assert torch.equal(index.squeeze(-1), g["mid.expert_choice"])
    torch.testing.assert_close(gate.squeeze(-1), g["mid.gate"], rtol=0, atol=1e-12)


def test_losses_equal_hugging_face() -> None:
    """Its f is float32."""
    g = golden("switch_moe")
    experts, x = loaded(g), g["x"].requires_grad_()
    logits = experts.router(torch.cat([x, torch.ones(2, 10, 1)], dim=-1))
    torch.testing.assert_close(logits, g["mid.router_logits"], rtol=0, atol=1e-12)
    mask = torch.ones(2, 10, dtype=torch.bool)
    balance, z = experts.losses(logits, g["mid.expert_choice"].unsqueeze(-1), mask)
    for loss, name, tolerance in ((balance, "aux", 1e-7), (z, "z", 1e-12)):
        torch.testing.assert_close(loss, g[f"mid.{name}_loss"].to(loss.dtype), rtol=0, atol=tolerance)
        grad = torch.autograd.grad(loss, x, retain_graph=True)[0]
        torch.testing.assert_close(grad, g[f"mid.grad_{name}_x"], rtol=0, atol=tolerance)


def test_losses_leave_padding_out() -> None:
    experts = Switch(8, 1.0, n_experts=4, balance_weight=0.5, z_weight=0.25).double().eval()
    x, mask = torch.randn(2, 9, 8, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [4]])
    experts(x, mask)
    found, parts = experts.aux_loss(), []
    for row, n in ((0, 9), (1, 4)):
        logits = experts.router(x[row : row + 1, :n])
        parts.append(experts.losses(logits, logits.argmax(-1, keepdim=True), mask[row : row + 1, :n]))
    balance, z = (parts[0][0] + parts[1][0]) / 2, (9 * parts[0][1] + 4 * parts[1][1]) / 13
    assert found is not None
    torch.testing.assert_close(found, 0.5 * balance + 0.25 * z)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.25, 0.0])
def test_capacity_is_filled_by_the_first_real_tokens(capacity: float) -> None:
    """One token at a time: an expert that has had ceil(capacity n / E) of the n real ones takes no more."""
    torch.manual_seed(0)
    experts = Switch(8, 1.0, n_experts=3, capacity=capacity).double().eval()
    x, mask = torch.randn(4, 11, 8, dtype=torch.float64), torch.arange(11) < torch.tensor([[11], [7], [1], [4]])
    chosen = experts.route(x, mask)[0].masked_fill(~mask.unsqueeze(-1), -1)
    kept = experts.within_capacity(chosen, mask)
    dropped = 0
    for row, n in enumerate(mask.sum(1).tolist()):
        room = [math.ceil(capacity * n / 3) if capacity else n] * 3
        for t in range(11):
            e = int(chosen[row, t, 0])
            if e >= 0 and not room[e]:
                dropped, e = dropped + 1, -1
            elif e >= 0:
                room[e] -= 1
            assert kept[row, t, 0] == e
    assert experts.diagnostics()["dropped"] == pytest.approx(dropped / 23)
    assert (dropped > 0) == (capacity > 0)


def test_one_expert_is_the_dense_layer() -> None:
    """Whose gate is 1, and which takes every token at a capacity of 1."""
    experts = Switch(8, 2.0, n_experts=1, capacity=1.0).double().eval()
    dense = FeedForward("relu", 8, 2.0, 0.0).double()
    dense.load_state_dict({
        "up.weight": experts.w1[0].T, "up.bias": torch.zeros(16), "down.weight": experts.w2[0].T,
        "down.bias": torch.zeros(8),
    })  # fmt: skip
    x, mask = torch.randn(2, 12, 8, dtype=torch.float64), torch.arange(12) < torch.tensor([[12], [7]])
    torch.testing.assert_close(experts(x, mask)[mask], dense(x)[mask], rtol=0, atol=1e-12)


def test_jitter_only_when_training() -> None:
    experts = Switch(8, 1.0, jitter=0.5).double()
    x, mask = torch.randn(2, 50, 8, dtype=torch.float64), torch.ones(2, 50, dtype=torch.bool)
    assert not torch.equal(experts.train().route(x, mask)[1], experts.route(x, mask)[1])
    assert torch.equal(experts.eval().route(x, mask)[1], experts.route(x, mask)[1])


def test_start_is_small_and_truncated() -> None:
    experts = Switch(64, 4.0, n_experts=16)
    for weight, inputs in ((experts.router.weight, 64), (experts.w1, 64), (experts.w2, 256)):
        std = (0.1 / inputs) ** 0.5
        assert weight.abs().max() <= 2 * std * (1 + 1e-6)
        # a normal cut at two deviations keeps 0.88 of its own
        assert (weight.std() / std).item() == pytest.approx(0.88, abs=0.03)


def test_recurrent_mode_is_refused_where_a_capacity_rules_it_out() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8, "direction": "causal"}
    with pytest.raises(NotImplementedError, match="no recurrent mode with a capacity"):
        SwitchTransformer(**shape).init_state(2)
    encoder, x = SwitchTransformer(**shape, capacity=0.0).double().eval(), torch.randn(2, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(stepped(encoder, x), encoder(x, torch.ones(2, 8, dtype=torch.bool)))
