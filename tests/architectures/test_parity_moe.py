"""moe against tensors of a mixture of the paper's equations, the mixture expert by expert, and the dense layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F

from lra.architectures import _experts
from lra.architectures._moe import NoisyTopK, cv_squared
from lra.architectures._stack import FeedForward
from lra.architectures.mixture.moe import MoE
from lra.kernels.expert_mlp import expert_mlp

MASK = torch.arange(12) < torch.tensor([[12], [7]])


def test_gates_and_losses_are_the_paper_s() -> None:
    """The source's own gates differ by 1e-6 in a denominator; its variance divides by one less."""
    g = golden("noisy_topk_moe")
    gate = NoisyTopK(6, 1.0, n_experts=5, k=2).double()
    gate.w_gate.data, gate.w_noise.data = g["param.w_gate"], g["param.w_noise"]
    x = g["x"].unsqueeze(0)
    clean, sd = x @ gate.w_gate, F.softplus(x @ gate.w_noise) + 0.01
    mask = torch.ones(1, 12, dtype=torch.bool)
    for noise, key in ((g["mid.noise"].unsqueeze(0), "mid.paper_gates"), (None, "mid.gates_no_noise")):
        index, gates, importance, load = gate.gates(clean, sd, noise, mask)
        spread = torch.zeros(1, 12, 5, dtype=torch.float64).scatter(-1, index, gates)[0]
        torch.testing.assert_close(spread, g[key], rtol=0, atol=1e-12 if noise is not None else 1e-5)
        if noise is not None:
            torch.testing.assert_close(importance, g["mid.paper_importance"], rtol=0, atol=1e-12)
            torch.testing.assert_close(load, g["mid.paper_load"], rtol=0, atol=1e-12)
            for found, name in ((importance, "importance"), (load, "load")):
                torch.testing.assert_close(cv_squared(found) * 5 / 4, g[f"mid.paper_{name}_loss"], rtol=0, atol=1e-9)


def test_layer_equals_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What theirs has beside the paper's equations is put in. Each expert ends with a softmax over its outputs, and has
    biases (one more input that is 1, one more unit that puts it out). Gates have 1e-6 in a denominator. The load
    compares logits with thresholds that are probabilities. The variance of the losses divides by one less."""
    g = golden("noisy_topk_moe")
    weight = g["cfg.coef"].item() * 5 / 4
    experts = NoisyTopK(7, 8 / 7, n_experts=5, k=2, importance_weight=weight, load_weight=weight).double()
    first = [
        torch.cat([g[f"param.experts.{e}.fc1.weight"].T, g[f"param.experts.{e}.fc1.bias"][None]]) for e in range(5)
    ]
    second = [
        torch.cat([g[f"param.experts.{e}.fc2.weight"].T, g[f"param.experts.{e}.fc2.bias"][None]]) for e in range(5)
    ]
    pass_on = F.one_hot(torch.tensor(6), 7).double()[:, None]  # the constant, through a unit of its own
    experts.w1.data = torch.stack([torch.cat([w, pass_on], dim=1) for w in first])
    experts.w2.data = F.pad(torch.stack(second), (0, 2))
    experts.w_gate.data, experts.w_noise.data = (F.pad(g[f"param.{n}"], (0, 0, 0, 1)) for n in ("w_gate", "w_noise"))
    monkeypatch.setattr(torch, "randn_like", lambda t: g["mid.noise"].view_as(t))

    def with_softmax(x: Tensor, index: Tensor, gate: Tensor, *weights: Tensor, **options: Any) -> Tensor:
        one = torch.ones_like(gate[:, :1])
        parts = [expert_mlp(x, index[:, j : j + 1], one, *weights, **options)[:, :5].softmax(-1) for j in range(2)]
        return F.pad(torch.stack(parts, dim=-1) @ gate.unsqueeze(-1), (0, 0, 0, 2)).squeeze(-1)

    own_gates = experts.gates

    def their_gates(clean: Tensor, sd: Tensor, noise: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        noisy = clean + noise * sd
        p = noisy.softmax(-1)
        index, gate, _, _ = own_gates(clean, sd, noise, mask)
        best = p.gather(-1, index).sum(-1, keepdim=True)
        gate = gate * best / (best + 1e-6)
        spread = torch.zeros_like(clean).scatter(-1, index, gate)[0]
        last, beyond = p.topk(3).values[..., 1:].split(1, dim=-1)
        load = torch.special.ndtr((clean - torch.where(noisy > beyond, beyond, last)) / sd).sum((0, 1))
        for found, name in ((spread, "gates"), (spread.sum(0), "importance"), (load, "load")):
            torch.testing.assert_close(found, g[f"mid.{name}"], rtol=0, atol=1e-12)
        return index, gate, spread.sum(0), load

    monkeypatch.setattr(_experts, "expert_mlp", with_softmax)
    monkeypatch.setattr(experts, "gates", their_gates)
    x = g["x"].requires_grad_()
    given = F.pad(x, (0, 1), value=1.0).unsqueeze(0)
    y, loss = experts.train()(given, torch.ones(1, 12, dtype=torch.bool))[0, :, :5], experts.aux_loss()
    assert loss is not None
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-13)
    torch.testing.assert_close(loss, g["mid.loss"], rtol=0, atol=1e-12)
    for one, weights, key in ((y, g["w"], "grad.x"), (loss, None, "mid.grad_loss_x")):
        torch.testing.assert_close(
            torch.autograd.grad(one, x, weights, retain_graph=True)[0], g[key], rtol=0, atol=1e-12
        )


def filled(**options: Any) -> NoisyTopK:
    experts = NoisyTopK(8, 2.0, **options).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


@pytest.mark.parametrize("k", [1, 2, 4])
def test_outputs_and_gradients_equal_the_definition(k: int) -> None:
    """Every expert on every token, the gates pick; padding comes out as 0."""
    experts = filled(n_experts=4, k=k).eval()
    x = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    logits = x @ experts.w_gate
    kept = logits >= logits.topk(k).values[..., -1:]
    weights = logits.masked_fill(~kept, -torch.inf).softmax(-1) * MASK.unsqueeze(-1)
    outputs = torch.einsum("bled,edf->blef", x.unsqueeze(2).expand(-1, -1, 4, -1), experts.w1).relu()
    expected = torch.einsum("ble,blef,efd->bld", weights, outputs, experts.w2)
    y, w = experts(x, MASK), torch.randn(2, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    inputs = [x, experts.w1, experts.w2, *([experts.w_gate] if k > 1 else [])]
    for a, b in zip(*(torch.autograd.grad((t * w).sum(), inputs) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_load_is_the_chance_over_fresh_noise() -> None:
    """P(e among the k) with the noise of the other experts kept and that of e drawn anew, by counting."""
    torch.manual_seed(0)
    experts = filled(n_experts=4, k=2)
    clean, sd = torch.randn(1, 1, 4, dtype=torch.float64), torch.rand(1, 1, 4, dtype=torch.float64) + 0.5
    noise = torch.randn(1, 1, 4, dtype=torch.float64)
    load = experts.gates(clean, sd, noise, torch.ones(1, 1, dtype=torch.bool))[3]
    for e in range(4):
        noisy = (clean + noise * sd).expand(20000, 1, 4).clone()
        noisy[:, 0, e] = clean[0, 0, e] + torch.randn(20000, dtype=torch.float64) * sd[0, 0, e]
        share = (noisy.topk(2).indices == e).any(-1).double().mean()
        assert abs(share - load[e]) < 0.02


def test_padding_is_in_no_loss_and_in_no_count() -> None:
    experts, x = filled(n_experts=4, k=2).eval(), torch.randn(2, 12, 8, dtype=torch.float64)
    experts(x, MASK)
    whole, counts = experts.aux_loss(), experts.diagnostics()
    tokens = x[MASK].unsqueeze(0)
    experts(tokens, torch.ones(1, 19, dtype=torch.bool))
    assert whole is not None
    torch.testing.assert_close(whole, experts.aux_loss())
    assert counts == experts.diagnostics()
    assert sum(value for name, value in counts.items() if "load" in name) == pytest.approx(1)


def test_losses_draw_towards_balance() -> None:
    """From a gate that prefers one expert, descent on the loss alone spreads the choices."""
    torch.manual_seed(0)
    experts = NoisyTopK(8, 1.0, n_experts=4, k=1)
    x = torch.randn(1, 256, 8)
    x[..., 0] = 1
    experts.w_gate.data[0] = torch.tensor([3.0, 0, 0, 0])
    everything = torch.ones(1, 256, dtype=torch.bool)
    optimizer = torch.optim.Adam([experts.w_gate, experts.w_noise], lr=0.05)
    experts(x, everything)
    before = experts.diagnostics()
    for _ in range(100):
        experts(x, everything)
        loss = experts.aux_loss()
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    experts.diagnostics()
    experts(x, everything)
    after = experts.diagnostics()
    assert before["load_0"] > 0.9
    assert after["load_0"] < 0.45


def test_one_expert_is_the_dense_layer() -> None:
    experts, dense = filled(n_experts=1, k=1), FeedForward("relu", 8, 2.0, 0.0).double()
    dense.load_state_dict({
        "up.weight": experts.w1[0].T, "up.bias": torch.zeros(16), "down.weight": experts.w2[0].T,
        "down.bias": torch.zeros(8),
    })  # fmt: skip
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(experts(x, MASK)[MASK], dense(x)[MASK], rtol=0, atol=1e-12)
    assert experts.aux_loss() == 0


def test_start_has_no_signal_and_some_noise() -> None:
    experts = NoisyTopK(64, 4.0, n_experts=8, k=2)
    assert not experts.w_gate.any()
    assert not experts.w_noise.any()
    for weight, inputs in ((experts.w1, 64), (experts.w2, 256)):
        assert (weight.std() * inputs**0.5).item() == pytest.approx(1, abs=0.02)
    experts.train()(torch.randn(4, 256, 64), torch.ones(4, 256, dtype=torch.bool))
    loads = [value for name, value in experts.diagnostics().items() if "load" in name]
    assert max(loads) < 0.2


def test_training_is_the_same_for_one_seed_and_copies_leave_the_loss() -> None:
    torch.manual_seed(0)
    encoder, x = MoE(d_model=16, n_layers=1, length=12), torch.randn(2, 12, 16)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        loss = (encoder(x, MASK).sum(), encoder.aux_loss())[1]
        assert loss is not None
        runs.append((loss.item(), encoder.diagnostics()))
    assert runs[0] == runs[1]
    assert copy.deepcopy(encoder).aux_loss() is None


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"k": 9}, "n_experts is 8 and k 9; k from 1 to n_experts"),
        ({"capacity": -1.0}, "capacity is -1.0; at least 0"),
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
    ):
        with pytest.raises(ValueError, match=said):
            MoE(**shape, **wrong)
