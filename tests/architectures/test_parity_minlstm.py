"""minlstm against tensors of an independent implementation, its recurrence, and the memories it starts with."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from stepping import assert_steps_equal_forward, run
from torch import Tensor

from lra.architectures.recurrent.minlstm import MinLSTM, MinLSTMMixer

NAMES = ("to_hidden_and_f_i_gate.weight", "to_out.weight")


def loaded(g: dict[str, Tensor]) -> MinLSTMMixer:
    """A mixer with the stored weights; the source has no biases."""
    mixer = MinLSTMMixer(6, expand=1.5, horizon=20).double()
    assert mixer.to_out is not None
    weights = {name: g[f"param.{name}"] for name in NAMES}
    biases = {"to_hidden_and_f_i_gate.bias": torch.zeros(27), "to_out.bias": torch.zeros(6)}
    mixer.load_state_dict(weights | biases)
    return mixer


def test_layer_equals_an_independent_one() -> None:
    g = golden("minlstm")
    mixer, x = loaded(g), g["x"].requires_grad_()
    y = mixer(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)
    for name in NAMES:
        grad = mixer.get_parameter(name).grad
        torch.testing.assert_close(grad, g[f"grad.param.{name}"], rtol=1e-11, atol=1e-12)


def test_step_equals_the_sequential_form() -> None:
    g = golden("minlstm")
    mixer = loaded(g)
    y, state = run(mixer, g["x"])
    torch.testing.assert_close(y, g["mid.y_sequential"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, g["mid.final_state"], rtol=1e-11, atol=1e-12)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(MinLSTMMixer(8, expand=1.0, horizon=2048), 8)


def test_gates_that_both_round_to_zero_stay_normalised() -> None:
    mixer = MinLSTMMixer(4, expand=1.0, horizon=2)
    with torch.no_grad():
        mixer.to_hidden_and_f_i_gate.weight.zero_()
        mixer.to_hidden_and_f_i_gate.bias.copy_(torch.tensor([0.5] * 4 + [-200.0] * 8))
        keep, enter = mixer._terms(torch.zeros(4))
    torch.testing.assert_close(keep, torch.full((4,), 0.5))
    torch.testing.assert_close(enter, torch.full((4,), 0.5))


def test_memories_at_the_start_fill_the_horizon() -> None:
    torch.manual_seed(0)
    mixer = MinLSTMMixer(512, expand=1.0, horizon=1000)
    with torch.no_grad():
        mixer.to_hidden_and_f_i_gate.weight.zero_()
        keep, _ = mixer._terms(torch.zeros(512))
    memories = 1 / (1 - keep.double())
    assert memories.min() >= 2
    assert memories.max() <= 1000 * (1 + 1e-3)  # 1 - keep is a difference of float32 numbers near 1
    assert 450 < memories.mean() < 550


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="horizon is 0"):
        MinLSTM(d_model=8, n_layers=1, length=16, horizon=0)
    with pytest.raises(ValueError, match=r"expand is 0\.01"):
        MinLSTM(d_model=8, n_layers=1, length=16, expand=0.01)
