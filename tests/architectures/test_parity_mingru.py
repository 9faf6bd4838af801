"""mingru against tensors of an independent implementation, its recurrence, and the memories it starts with."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from stepping import assert_steps_equal_forward, run
from torch import Tensor

from lra.architectures.recurrent.mingru import MinGRU, MinGRUMixer, Terms

NAMES = ("to_hidden_and_gate.weight", "to_out.weight")


def loaded(g: dict[str, Tensor]) -> MinGRUMixer:
    """A mixer with the stored weights; the source has no biases."""
    mixer = MinGRUMixer(6, expand=1.5, horizon=20).double()
    assert mixer.to_out is not None
    weights = {name: g[f"param.{name}"] for name in NAMES}
    biases = {"to_hidden_and_gate.bias": torch.zeros(18), "to_out.bias": torch.zeros(6)}
    mixer.load_state_dict(weights | biases)
    return mixer


def test_layer_equals_an_independent_one() -> None:
    g = golden("mingru")
    mixer, x = loaded(g), g["x"].requires_grad_()
    y = mixer(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)
    for name in NAMES:
        grad = mixer.get_parameter(name).grad
        torch.testing.assert_close(grad, g[f"grad.param.{name}"], rtol=1e-11, atol=1e-12)


def test_terms_have_the_gradients_of_their_formulas() -> None:
    x = torch.linspace(-4, 4, 36, dtype=torch.float64).view(3, 12).requires_grad_()
    c, gate = x.chunk(2, dim=-1)
    written = 1 - gate.sigmoid(), gate.sigmoid() * torch.where(c >= 0, c + 0.5, c.sigmoid())
    found = Terms.apply(x)[:2]
    torch.testing.assert_close(found, written)
    w = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    own, theirs = (torch.autograd.grad(terms, x, w)[0] for terms in (found, written))
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-14)


def test_step_equals_the_sequential_form() -> None:
    g = golden("mingru")
    mixer = loaded(g)
    y, state = run(mixer, g["x"])
    torch.testing.assert_close(y, g["mid.y_sequential"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, g["mid.final_state"], rtol=1e-11, atol=1e-12)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(MinGRUMixer(8, expand=1.0, horizon=2048), 8)


def test_memories_at_the_start_fill_the_horizon() -> None:
    torch.manual_seed(0)
    mixer = MinGRUMixer(512, expand=1.0, horizon=1000)
    memories = 1 + (-mixer.to_hidden_and_gate.bias[512:]).exp()  # 1 / z: the time constant of h for x = 0
    assert memories.min() >= 2
    assert memories.max() <= 1000
    assert 450 < memories.mean() < 550
    assert not MinGRUMixer(8, expand=1.0, horizon=2).to_hidden_and_gate.bias[8:].any()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="horizon is 0"):
        MinGRU(d_model=8, n_layers=1, length=16, horizon=0)
    with pytest.raises(ValueError, match=r"expand is 0\.01"):
        MinGRU(d_model=8, n_layers=1, length=16, expand=0.01)
