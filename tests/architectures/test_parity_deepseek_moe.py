"""deepseek_moe against tensors of Hugging Face's mixture, the papers' balance, and a loop over the tokens."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._moe import DeepSeekMoE
from lra.architectures.mixture.deepseek_moe import DeepSeekMoETransformer

NAMES = {
    "w1": "experts.gate_up_proj", "w2": "experts.down_proj", "router.weight": "gate.weight",
    "shared_down.weight": "shared_experts.down_proj.weight",
}  # fmt: skip


def loaded(g: dict[str, Tensor]) -> DeepSeekMoE:
    experts = DeepSeekMoE(
        8, 6 / 8, n_experts=8, k=3, n_shared=1, groups=4, top_groups=2, scale=2.5, balance_weight=1.0
    ).double()
    state = {own: g[f"param.{theirs}"] for own, theirs in NAMES.items()}
    state["w1"], state["w2"] = state["w1"].mT, state["w2"].mT
    state["shared_up.weight"] = torch.cat([g[f"param.shared_experts.{p}_proj.weight"] for p in ("gate", "up")])
    state["e_score_correction_bias"] = g["param.gate.e_score_correction_bias"]
    experts.load_state_dict(state)
    return experts


def test_layer_equals_hugging_face() -> None:
    g = golden("deepseek_moe")
    experts, x = loaded(g), g["x"].requires_grad_()
    index, gate, loss = experts.route(x, everything(x))
    index, order = index.sort(-1)
    assert torch.equal(index, g["mid.topk_indices"])
    assert_near(gate.gather(-1, order), g["mid.topk_weights"], "gates")
    assert_near(loss, g["mid.paper_sequence_balance_loss"], "balance")
    y = experts(x, everything(x))
    assert_near(y, g["y"], "y")
    wanted = {own: (experts.get_parameter(own), g[f"grad.{theirs}"]) for own, theirs in NAMES.items()}
    for own in ("w1", "w2"):
        wanted[own] = (wanted[own][0], wanted[own][1].mT)
    up = torch.cat([g[f"grad.shared_experts.{p}_proj.weight"] for p in ("gate", "up")])
    assert_gradients(y, g, x, wanted | {"shared_up": (experts.get_parameter("shared_up.weight"), up)})


def test_biases_move_after_a_step_as_in_the_paper() -> None:
    g = golden("deepseek_moe")
    experts, x = loaded(g).train(), g["x"]
    experts(x, everything(x))
    assert torch.equal(experts.e_score_correction_bias, g["param.gate.e_score_correction_bias"])
    experts.after_step()
    assert_near(experts.e_score_correction_bias, g["mid.paper_next_bias"], "bias", 1e-12)
    # a second step without a forward pass, and evaluation, change nothing
    experts.eval()(x, everything(x))
    experts.after_step()
    assert_near(experts.e_score_correction_bias, g["mid.paper_next_bias"], "bias", 1e-12)


def test_padding_does_not_move_biases() -> None:
    g = golden("deepseek_moe")
    one, two, x = loaded(g).train(), loaded(g).train(), g["x"]
    one(x, torch.arange(7) < torch.tensor([[5], [5]]))
    two(x[:, :5], everything(x[:, :5]))
    for experts in (one, two):
        experts.after_step()
    assert torch.equal(one.e_score_correction_bias, two.e_score_correction_bias)


def test_a_run_of_the_suite_moves_biases() -> None:
    """The encoder passes the call on to every block."""
    encoder = DeepSeekMoETransformer(d_model=8, n_layers=2, length=16, n_experts=4, k=1).train()
    x = torch.randn(2, 16, 8)
    encoder(x, everything(x))
    encoder.after_step()
    biases = [part.get_buffer("e_score_correction_bias") for part in encoder.experts]
    assert [bias.abs().max().item() for bias in biases] == pytest.approx([0.001, 0.001])


def test_layer_equals_the_equations() -> None:
    torch.manual_seed(0)
    experts = DeepSeekMoE(6, 1.0, n_experts=6, k=2, n_shared=2, groups=3, top_groups=2).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(experts.e_score_correction_bias)
    experts.requires_grad_(False)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    wanted = []
    for token in x[0]:
        s = (experts.router.weight @ token).sigmoid()
        score = s + experts.e_score_correction_bias
        best = sorted(range(3), key=lambda g: -float(score[2 * g : 2 * g + 2].sum()))[:2]
        chosen = sorted((e for g in best for e in (2 * g, 2 * g + 1)), key=lambda e: -float(score[e]))[:2]
        gate, up = (experts.get_parameter("shared_up.weight") @ token).chunk(2)
        y = experts.get_parameter("shared_down.weight") @ (F.silu(gate) * up)
        for e in chosen:
            gate, up = (token @ experts.w1[e]).chunk(2)
            y = y + s[e] / s[chosen].sum() * ((F.silu(gate) * up) @ experts.w2[e])
        wanted.append(y)
    assert_near(experts(x, everything(x))[0], torch.stack(wanted), "y")


test_bad_arguments = refuses(DeepSeekMoETransformer, d_model=8, n_layers=1, length=8)(
    ({"groups": 3}, "groups is 3 and top_groups 1; groups a divisor of the 16 experts"),
    ({"groups": 4, "top_groups": 5}, "top_groups from 1 to groups"),
    ({"groups": 8, "k": 3}, "k is 3; the 1 best groups have 2 experts"),
    ({"n_shared": -1}, "n_shared is -1; at least 0"),
)
