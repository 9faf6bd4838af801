"""gru against torch.nn and a float64 loop over its equations, and the properties of its initialisation."""

from __future__ import annotations

import pytest
import torch
from stepping import assert_steps_equal_forward
from torch import Tensor

from lra.architectures.recurrent.gru import GRU, GRUMixer


def equations(mixer: GRUMixer, x: Tensor) -> Tensor:
    """The docstring's equations, one token at a time: (B, L, D) -> (B, L, D)."""
    gates = "zn" if mixer.cell == "gru_coupled" else "rzn"
    weights = (mixer.input.weight, mixer.U, mixer.input.bias, mixer.c)
    w, u, b, c = (dict(zip(gates, parameter.chunk(len(gates)), strict=True)) for parameter in weights)
    h, outputs = torch.zeros_like(x[:, 0]), []
    for token in x.unbind(1):
        z = torch.sigmoid(token @ w["z"].T + b["z"] + h @ u["z"].T + c["z"])
        r = torch.sigmoid(token @ w["r"].T + b["r"] + h @ u["r"].T + c["r"]) if "r" in w else 1 - z
        inside = r * (h @ u["n"].T + c["n"])
        if mixer.cell == "gru_reset_first":
            inside = (r * h) @ u["n"].T + c["n"]
        n = torch.tanh(token @ w["n"].T + b["n"] + inside)
        h = z * h + (1 - z) * n
        outputs.append(h)
    return torch.stack(outputs, dim=1)


FORMS = [{}, {"coupled": True}, {"reset_first": True}]


@pytest.mark.parametrize("form", FORMS)
def test_mixer_equals_its_equations(form: dict[str, bool]) -> None:
    torch.manual_seed(0)
    mixer = GRUMixer(6, horizon=20, **form).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(2, 13, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 13, dtype=torch.bool)
    w = torch.randn(2, 13, 6, dtype=torch.float64)
    inputs = (x, *mixer.parameters())
    got, expected = mixer(x, mask), equations(mixer, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((y * w).sum(), inputs) for y in (got, expected)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_plain_cell_equals_torch() -> None:
    torch.manual_seed(0)
    mixer, theirs = GRUMixer(6, horizon=20).double(), torch.nn.GRU(6, 6, batch_first=True).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    own = (mixer.input.weight, mixer.U, mixer.input.bias, mixer.c)
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), own, strict=True):
            parameter.copy_(value)
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    y, expected = mixer(x, torch.ones(2, 13, dtype=torch.bool)), theirs(x)[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), w) for out, w in ((y, own), (expected, [*theirs.parameters()]))]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_step_equals_forward_over_2048_tokens(form: dict[str, bool]) -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(GRUMixer(8, horizon=2048, **form).eval(), 8)


def test_bidirectional_sees_only_real_tokens_backwards() -> None:
    """The backward pass starts at each row's own last token: a row in a padded batch equals the row alone."""
    torch.manual_seed(0)
    encoder = GRU(d_model=8, n_layers=1, length=16, direction="bidirectional").eval()
    x, mask = torch.randn(2, 16, 8), torch.arange(16) < torch.tensor([[16], [5]])
    torch.testing.assert_close(encoder(x, mask)[1:, :5], encoder(x[1:, :5], mask[1:, :5]))


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = GRUMixer(64, horizon=1000)
    for gate in mixer.U.chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=0, atol=1e-5)
    r, z, n = mixer.input.bias.chunk(3)
    assert not r.any()
    assert not n.any()
    assert not mixer.c.any()
    memories = 1 + z.exp()  # tokens after which a gate of sigmoid(b_z) has forgotten 1 - 1/e, to first order
    assert memories.min() >= 2
    assert memories.max() <= 1000
    assert 350 < memories.mean() < 650
    assert not GRUMixer(8, horizon=2).input.bias.any()
    assert GRUMixer(8, horizon=100, coupled=True).input.bias.chunk(2)[0].all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="horizon is 0"):
        GRU(d_model=8, n_layers=1, length=16, horizon=0)
    with pytest.raises(ValueError, match="set at most one"):
        GRU(d_model=8, n_layers=1, length=16, coupled=True, reset_first=True)
    with pytest.raises(ValueError, match="zoneout is 1"):
        GRU(d_model=8, n_layers=1, length=16, zoneout=1.0)
