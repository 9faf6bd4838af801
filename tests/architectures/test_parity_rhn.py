"""rhn against tensors of the authors' cell, its equations token by token, and the memories it starts with."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded, same_gradients
from refusals import refuses
from torch import Tensor

from lra.architectures.recurrent.rhn import RHN, RHNMixer


def test_layer_equals_the_authors() -> None:
    g = golden("rhn_depth3")
    mixer = RHNMixer(5, depth=3, horizon=2).double()
    names = [f"{gate}_{layer}" for layer in range(3) for gate in "ht"]
    matrices = [g[f"param.{name}.Matrix"].T for name in names]  # of the first layer: columns x, then state
    load(
        mixer,
        input__weight=torch.cat([padded(m[:, :4], 5, 5) for m in matrices[:2]]),
        U=torch.cat([m[:, -5:] for m in matrices]),
        b=torch.cat([g[f"param.{name}.Bias"] for name in names]),
    )
    last = agrees(mixer, g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def equations(mixer: RHNMixer, x: Tensor) -> Tensor:
    s, outputs = torch.zeros_like(x[:, 0]), []
    U, b = (p.chunk(2 * mixer.depth) for p in (mixer.U, mixer.b))
    W_h, W_t = mixer.input.weight.chunk(2)
    for token in x.unbind(1):
        levels = []
        for layer in range(mixer.depth):
            a, t = s @ U[2 * layer].T + b[2 * layer], s @ U[2 * layer + 1].T + b[2 * layer + 1]
            if layer == 0:
                a, t = a + token @ W_h.T, t + token @ W_t.T
            s = torch.sigmoid(t) * torch.tanh(a) + (1 - torch.sigmoid(t)) * s
            levels.append(s)
        outputs.append(s if mixer.out is None else torch.cat(levels, -1) @ mixer.out.weight.T + mixer.out.bias)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_gradients_of_every_parameter_equal_the_equations(hierarchical: bool) -> None:
    torch.manual_seed(0)
    mixer = RHNMixer(6, depth=3, horizon=4, hierarchical=hierarchical).double()
    torch.nn.init.normal_(mixer.b)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    same_gradients(mixer, x, equations(mixer, x))


def test_memories_at_the_start_fill_the_horizon() -> None:
    torch.manual_seed(0)
    mixer = RHNMixer(512, depth=4, horizon=1000)
    transforms = mixer.b.view(4, 2, 512)[:, 1].double()
    memories = 1 / (1 - torch.sigmoid(-transforms).prod(0))  # of four gates in a row, for x = s = 0
    assert memories.min() >= 1
    assert memories.max() <= 1000
    assert memories.quantile(0.9) > 500
    assert not mixer.b.view(4, 2, 512)[:, 0].any()


test_wrong_arguments_are_named = refuses(RHN, d_model=8, n_layers=1, length=16)(
    ({"depth": 0}, "depth is 0"),
    ({"horizon": 0}, "horizon is 0"),
)
