"""mgu against tensors of the paper's equations, its equations token by token, and the memories it starts with."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded, same_gradients
from torch import Tensor

from lra.architectures.recurrent.mgu import MGU, MGUMixer


def test_layer_equals_the_closed_form() -> None:
    g = golden("mgu")
    mixer = MGUMixer(5, horizon=2).double()
    both = torch.cat([g["param.W_f"], g["param.W_h"]])  # columns: h, x
    load(
        mixer,
        input__weight=padded(both[:, 5:], 10, 5),
        input__bias=torch.cat([g["param.b_f"], g["param.b_h"]]),
        U=both[:, :5],
    )
    last = agrees(mixer, g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def equations(mixer: MGUMixer, x: Tensor) -> Tensor:
    (W_f, W_h), (b_f, b_h), (U_f, U_h) = (p.chunk(2) for p in (mixer.input.weight, mixer.input.bias, mixer.U))
    h, outputs = torch.zeros_like(x[:, 0]), []
    for token in x.unbind(1):
        f = torch.sigmoid(token @ W_f.T + h @ U_f.T + b_f)
        h = (1 - f) * h + f * torch.tanh(token @ W_h.T + (f * h) @ U_h.T + b_h)
        outputs.append(h)
    return torch.stack(outputs, 1)


def test_gradients_of_every_parameter_equal_the_equations() -> None:
    torch.manual_seed(0)
    mixer = MGUMixer(6, horizon=9).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    same_gradients(mixer, x, equations(mixer, x))


def test_memories_at_the_start_fill_the_horizon() -> None:
    torch.manual_seed(0)
    gate, candidate = MGUMixer(512, horizon=1000).input.bias.chunk(2)
    memories = 1 + (-gate).exp()  # 1 / f, for x = h = 0
    assert memories.min() >= 2
    assert memories.max() <= 1000
    assert 450 < memories.mean() < 550
    assert not candidate.any()


def test_wrong_horizon_is_named() -> None:
    with pytest.raises(ValueError, match="horizon is 0"):
        MGU(d_model=8, n_layers=1, length=16, horizon=0)
