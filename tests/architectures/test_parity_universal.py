"""universal against tensors of an independent implementation of its halting, and the encoder written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from torch import Tensor

from lra.architectures.attention.universal import Universal

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 4, "length": 12}


def halting(g: dict[str, Tensor]) -> Universal:
    width, length, steps = (int(g[f"cfg.{n}"]) for n in ("D", "L", "max_hop"))
    encoder = Universal(d_model=width, n_layers=steps, length=length, n_heads=1, ponder_weight=1.0).double()
    encoder.places, encoder.steps = g["in.time_signal"], g["in.step_signal"]
    assert encoder.halt is not None
    encoder.halt.load_state_dict({kind: g[f"param.p.{kind}"] for kind in ("weight", "bias")})
    return encoder


def test_halting_equals_an_independent_implementation() -> None:
    g = golden("ut_act")
    encoder, x = halting(g), g["x"].requires_grad_()
    noted: dict[str, Tensor] = {}
    encoder.note = lambda updates, remainders, running, mask: noted.update(u=updates, r=remainders)  # type: ignore[method-assign]
    y = encoder.ponder(lambda u, _: (u @ g["in.A"].T).tanh() + 0.5 * u.roll(1, 1), x, everything(x), 0)
    assert_close(y, g["y"], 1e-12)
    assert_close(noted["u"], g["mid.n_updates"], 0)
    assert_close(noted["r"], g["mid.remainders"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"], 1e-11)


def test_loss_and_diagnostics_are_those_of_real_tokens() -> None:
    g = golden("ut_act")
    encoder, mask = halting(g), torch.arange(6) < torch.tensor([[6], [4]])
    encoder.ponder(lambda u, _: (u @ g["in.A"].T).tanh() + 0.5 * u.roll(1, 1), g["x"], mask, 0)
    assert_close(encoder.aux_loss(), g["mid.ponder_cost"][mask].mean(), 1e-12)
    halted = (g["mid.remainders"][mask] > 0).double().mean().item()
    means = {"steps": g["mid.n_updates"][mask].mean().item(), "ponder": g["mid.ponder_cost"][mask].mean().item()}
    assert encoder.diagnostics() == pytest.approx(means | {"halted": halted})
    assert encoder.diagnostics() == {}


def test_encoder_equals_its_definition() -> None:
    """Token by token, the weights as numbers; the layer is that of `transformer`, checked there."""
    torch.manual_seed(0)
    encoder = Universal(**SMALL).double()
    assert encoder.halt is not None
    torch.nn.init.normal_(encoder.halt.weight)
    x, mask = torch.randn(2, 12, 16, dtype=torch.float64), torch.arange(12) < torch.tensor([[12], [7]])
    y = encoder(x, mask)
    taken, places, steps = 0, encoder.get_buffer("places"), encoder.get_buffer("steps")
    for row, length in enumerate((12, 7)):
        state = x[row, :length]
        states, odds = [], []
        for t in range(4):
            state = state + places[:length] + steps[t]
            odds.append(encoder.halt(state).sigmoid().squeeze(-1))
            state = encoder.blocks[0](state[None], everything(state[None]))[0]
            states.append(state)
        for i in range(length):
            expected, total = torch.zeros(16, dtype=torch.float64), 0.0
            for t in range(4):
                p = odds[t][i].item()
                weight = 1 - total if total + p > 0.9 else p
                expected, total, taken = weight * states[t][i] + (1 - weight) * expected, total + weight, taken + 1
                if total == 1:
                    break
            assert_close(y[row, i], expected, 1e-12)
    assert encoder.diagnostics()["steps"] == pytest.approx(taken / 19)


def test_depth_adds_no_parameters_and_every_step_a_cache() -> None:
    sizes = {n: Universal(**SMALL | {"n_layers": n, "direction": "causal"}) for n in (1, 5)}
    assert sizes[1].active_parameters == sizes[5].active_parameters
    assert sizes[5].state_bytes(3) == 5 * sizes[1].state_bytes(3) == 5 * 3 * 2 * 16 * 4


def test_tokens_first_take_about_two_steps() -> None:
    torch.manual_seed(0)
    encoder = Universal(d_model=64, n_layers=6, length=128)
    encoder(torch.randn(2, 128, 64), torch.ones(2, 128, dtype=torch.bool))
    found = encoder.diagnostics()
    assert 1.5 < found["steps"] < 2.5
    assert found["halted"] == 1


test_wrong_arguments_are_named = refuses(Universal, **SMALL)(
    ({"epsilon": 0.0}, r"epsilon is 0\.0; above 0 and below 1"),
    ({"n_layers": 0}, "n_layers is 0; at least 1"),
    ({"n_heads": 3}, "n_heads is 3; a divisor"),
)


def test_longer_sequences_than_it_was_built_for_are_refused() -> None:
    with pytest.raises(ValueError, match="length 13 exceeds the 12 positions"):
        Universal(**SMALL)(torch.zeros(1, 13, 16), torch.ones(1, 13, dtype=torch.bool))
