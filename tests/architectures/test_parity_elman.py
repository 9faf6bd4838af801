"""elman against torch.nn.RNN, its recurrent mode, and the bounds on its recurrent matrix."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import everything
from refusals import refuses
from stepping import assert_steps_equal_forward

from lra.architectures.recurrent.elman import Elman, ElmanMixer


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("recurrent", ["free", "spectral", "orthogonal"])
def test_recurrence_equals_torch(activation: str, recurrent: str) -> None:
    torch.manual_seed(0)
    mixer = ElmanMixer(5, activation, recurrent).double()
    theirs = torch.nn.RNN(5, 5, nonlinearity=activation, batch_first=True).double()
    if recurrent != "orthogonal":
        torch.nn.init.normal_(mixer.state.weight, std=0.5)
    torch.nn.init.normal_(mixer.input.bias)
    w, u, b, c = theirs.parameters()
    with torch.no_grad():
        for parameter, value in zip((w, u, b), (mixer.input.weight, mixer.U, mixer.input.bias), strict=True):
            parameter.copy_(value)
        c.zero_()
    x = torch.randn(2, 13, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    y, expected = mixer(x, everything(x)), theirs(x)[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((y * weight).sum(), (x, mixer.input.weight, mixer.input.bias), retain_graph=True)
    grad_x, grad_w, grad_u, grad_b = torch.autograd.grad((expected * weight).sum(), (x, w, u, b))
    for own, other in zip(ours, (grad_x, grad_w, grad_b), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)
    # what reaches V does so through U alone
    own_V = [p for n, p in mixer.named_parameters() if not n.startswith("input")]
    got = torch.autograd.grad((y * weight).sum(), own_V)
    for one, other in zip(got, torch.autograd.grad((mixer.U * grad_u).sum(), own_V), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("recurrent", ["free", "spectral", "orthogonal"])
def test_step_equals_forward_over_2048_tokens(recurrent: str) -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(ElmanMixer(8, "tanh", recurrent), 8, rtol=1e-4, atol=1e-5)


def test_spectral_matrix_is_bounded_whatever_is_learnt() -> None:
    torch.manual_seed(0)
    mixer = ElmanMixer(16, "tanh", "spectral")
    for size, largest in ((3.0, 0.99), (0.01, None)):
        torch.nn.init.normal_(mixer.state.weight, std=size)
        found = torch.linalg.svdvals(mixer.U)[0]
        expected = torch.linalg.svdvals(mixer.state.weight)[0] if largest is None else torch.tensor(largest)
        torch.testing.assert_close(found, expected)


def test_orthogonal_matrix_stays_orthogonal_whatever_is_learnt() -> None:
    torch.manual_seed(0)
    mixer = ElmanMixer(16, "tanh", "orthogonal")
    for _ in range(2):
        values = torch.linalg.svdvals(mixer.U)
        torch.testing.assert_close(values, mixer.scale.sigmoid().expand(16), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            mixer.get_parameter("V").add_(torch.randn(16, 16))
            mixer.scale.fill_(-1.0)


def test_free_matrix_starts_orthogonal_or_as_the_identity() -> None:
    torch.manual_seed(0)
    U = ElmanMixer(32, "tanh", "free").U
    torch.testing.assert_close(U @ U.T, torch.eye(32), rtol=0, atol=1e-5)
    assert torch.equal(ElmanMixer(32, "relu", "free").U, torch.eye(32))


test_wrong_arguments_are_named = refuses(Elman, d_model=8, n_layers=1, length=8)(
    ({"activation": "gelu"}, "tanh, relu"),
    ({"recurrent": "unitary"}, "free, spectral"),
)
