"""gshard against tensors of a transcription of tensor2tensor's gating, and a loop that fills the capacity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, everything, golden
from torch import Tensor

from lra.architectures._experts import balance_loss
from lra.architectures._moe import TopTwo
from lra.architectures.mixture.gshard import GShard


def loaded(g: dict[str, Tensor]) -> TopTwo:
    """Its capacity of 5 is rounded down from 1.45 * 14 / 4."""
    experts = TopTwo(6, 8 / 6, n_experts=4, capacity=5 * 4 / (2 * 14), balance_weight=1.0).double()
    experts.load_state_dict({
        "w1": g["param.experts.w1"], "w2": g["param.experts.w2"], "router.weight": g["param.gate.w_gating"].T,
    })  # fmt: skip
    return experts


@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_the_transcription(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g = golden("gshard_top2")
    experts, x = loaded(g).train(training), g["x"].requires_grad_()
    monkeypatch.setattr(torch, "rand_like", lambda _: g["mid.second_uniform"])
    index, gate, loss = experts.route(x, everything(x))
    kept = experts.within_capacity(index, everything(x))
    combine = torch.zeros_like(g["mid.combine"]).scatter_add(-1, kept.clamp(min=0), gate * (kept >= 0))
    assert_near(combine, g["mid.combine" if training else "mid.combine_all"], "gates", 1e-12)
    assert_near(loss, g["mid.aux_loss"], "loss", 1e-12)
    to_router = torch.autograd.grad(loss, experts.router.weight)[0]
    assert_near(to_router.T, g["mid.aux_grad_w_gating"], "gradient of the loss", 1e-12)
    y = experts(x, everything(x))
    assert_near(y, g["y" if training else "mid.y_all"], "y", 1e-12)
    if training:
        assert torch.equal(combine > 0, g["mid.dispatch"] > 0)
        assert_gradients(y, g, x, {
            "w1": (experts.w1, g["grad.experts.w1"]), "w2": (experts.w2, g["grad.experts.w2"]),
            "router": (experts.router.weight, g["grad.gate.w_gating"].T),
        })  # fmt: skip


@pytest.mark.parametrize("capacity", [0.5, 1.0, 0.0])
def test_first_choices_fill_the_capacity_first(capacity: float) -> None:
    torch.manual_seed(0)
    experts = TopTwo(8, 1.0, n_experts=3, capacity=capacity).double()
    x, mask = torch.randn(3, 11, 8, dtype=torch.float64), torch.arange(11) < torch.tensor([[11], [7], [1]])
    chosen = experts.route(x, mask)[0].masked_fill(~mask.unsqueeze(-1), -1)
    kept, dropped = experts.within_capacity(chosen, mask), 0
    for row, n in enumerate(mask.sum(1).tolist()):
        room = [math.ceil(capacity * 2 * n / 3) if capacity else n] * 3
        for choice in range(2):
            for t in range(n):
                e = int(chosen[row, t, choice])
                if e >= 0 and not room[e]:
                    dropped, e = dropped + 1, -1
                elif e >= 0:
                    room[e] -= 1
                assert kept[row, t, choice] == e
    assert experts.diagnostics()["dropped"] == pytest.approx(dropped / (chosen >= 0).sum().item())
    assert (dropped > 0) == (capacity == 0.5)


def test_the_second_expert_is_asked_as_often_as_its_gate_says() -> None:
    experts = TopTwo(8, 1.0, n_experts=4)
    p = torch.tensor([0.6, 0.2, 0.15, 0.05]).expand(1, 20_000, 4)
    index, gate = experts.gates(p, torch.rand(1, 20_000))
    assert gate[0, 0].tolist() == pytest.approx([0.75, 0.25])
    assert (index[..., 1] >= 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(index[..., 0], torch.zeros(1, 20_000, dtype=torch.int64))


def test_balance_leaves_padding_out() -> None:
    p = torch.rand(2, 7, 4, dtype=torch.float64).softmax(-1)
    index, mask = p.topk(2, -1).indices, torch.arange(7) < torch.tensor([[7], [3]])
    rows = [balance_loss(p[r : r + 1, :n], index[r : r + 1, :n], mask[r : r + 1, :n]) for r, n in ((0, 7), (1, 3))]
    assert_near(balance_loss(p, index, mask), torch.stack(rows).mean(), "balance")


@pytest.mark.parametrize("capacity", [1.0, 0.0])
def test_causal_only_without_a_capacity(capacity: float) -> None:
    shape: dict[str, Any] = {"d_model": 8, "n_layers": 1, "length": 8, "direction": "causal", "capacity": capacity}
    if capacity:
        with pytest.raises(ValueError, match="direction is 'causal', but the mixture 'gshard' looks at all tokens"):
            GShard(**shape)
    else:
        GShard(**shape).init_state(2)
