"""linear_ssm against tensors of the authors' dense kernel, its recurrence against its kernel, and its HiPPO start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped

from lra.architectures._hippo import legs, legs_modes
from lra.architectures.state_space.linear_ssm import LinearSSM, LinearSSMMixer


def mixer_of(**own: Any) -> LinearSSMMixer:
    mixer = LinearSSM(**{"d_model": 3, "n_layers": 1, "length": 32, "state_size": 4, "n_ssm": 3, **own}).blocks[0].mixer
    assert isinstance(mixer, LinearSSMMixer)
    return mixer


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_ssm_equals_the_authors(discretization: str) -> None:
    g = golden("ssm_dense_discretisation")
    mixer = mixer_of(discretization=discretization).double()
    with torch.no_grad():
        for own, other in (("A", "A"), ("B", "B"), ("D", "D")):
            getattr(mixer, own).copy_(g[f"param.{other}"])
        mixer.C[0].copy_(g["param.C"])
        mixer.log_dt.copy_(g["param.dt"].log())
    A, B = mixer.discrete()
    torch.testing.assert_close(A, g[f"mid.{discretization}.dA"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(B, g[f"mid.{discretization}.dB"], rtol=1e-11, atol=1e-12)
    for length in (1, 7, 32):
        expected = g[f"mid.{discretization}.kernel"][:, :length]
        torch.testing.assert_close(mixer.kernel(length)[0], expected, rtol=1e-11, atol=1e-12)
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer.ssm(x)
    expected = g["y"] if discretization == "bilinear" else g["mid.zoh.y"]
    torch.testing.assert_close(y.mT, expected, rtol=1e-11, atol=1e-12)
    if discretization == "bilinear":
        (y * g["w"].mT).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.mT, g["grad.x"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_gradients_of_every_parameter_equal_the_recurrence(discretization: str) -> None:
    torch.manual_seed(0)
    mixer = mixer_of(discretization=discretization, n_ssm=1).double()
    x = torch.randn(2, 13, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)
    y, expected = mixer(x, everything(x)), stepped(mixer, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    inputs = (x, *mixer.parameters())
    ours, others = (torch.autograd.grad((out * w).sum(), inputs, retain_graph=True) for out in (y, expected))
    for own, other in zip(ours, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_second_kernel_looks_ahead_and_leaves_out_the_current_token() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(direction="bidirectional").double()
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    behind, ahead = mixer.kernel(6)
    rows = []
    for t in range(6):
        past = sum(behind[:, t - s] * x[:, s] for s in range(t + 1))
        rows.append(past + sum(ahead[:, s - t - 1] * x[:, s] for s in range(t + 1, 6)) + mixer.D * x[:, t])
    torch.testing.assert_close(mixer.ssm(x), torch.stack(rows, 1), rtol=1e-11, atol=1e-12)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(d_model=2, n_ssm=1, state_size=16, length=2048), 2, rtol=1e-4, atol=1e-4)


def test_state_matrix_starts_as_hippo_legs() -> None:
    g = golden("hippo_nplr")
    A, B = legs(int(g["param.N"]))
    torch.testing.assert_close(A, g["mid.legs.A"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B, g["mid.legs.Bdense"], rtol=1e-12, atol=1e-12)
    mixer = mixer_of(state_size=16)
    torch.testing.assert_close(mixer.A, A.float().expand(3, -1, -1))
    frequency, basis, _ = legs_modes(16)
    again = (basis * (-0.5 + 1j * frequency)) @ basis.mH - torch.outer(B, B) / 2
    torch.testing.assert_close(again, A.to(torch.complex128), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", ["small", "large"])
def test_hippo_equals_the_authors_transitions(size: str) -> None:
    """Eight and sixteen states; the normal part is their legsd, whose B is halved."""
    g = golden("hippo_transition")
    N = int(g[f"param.N_{size}"])
    A, B = legs(N)
    torch.testing.assert_close(A, g[f"mid.legs.{size}.A"], rtol=0, atol=1e-12)
    torch.testing.assert_close(B, g[f"mid.legs.{size}.B"][:, 0], rtol=0, atol=1e-12)
    frequency, basis, B = legs_modes(N)
    normal = (basis * (-0.5 + 1j * frequency)) @ basis.mH
    torch.testing.assert_close(normal, g[f"mid.legsd.{size}.A"].to(torch.complex128), rtol=0, atol=1e-12)
    torch.testing.assert_close(B / 2, g[f"mid.legsd.{size}.B"][:, 0], rtol=0, atol=1e-12)


def test_step_sizes_start_within_their_range_and_may_be_fixed() -> None:
    torch.manual_seed(0)
    steps = mixer_of(d_model=300, dt_min=0.01, dt_max=0.5).log_dt.exp()
    assert 0.01 <= steps.min() < 0.012
    assert 0.4 < steps.max() <= 0.5
    fixed = LinearSSM(d_model=4, n_layers=1, length=8, state_size=4, fixed=True)
    assert not {name.rpartition(".")[2] for name, _ in fixed.named_parameters()} & {"A", "B", "log_dt"}
    assert not fixed.optim


test_wrong_arguments_are_named = refuses(LinearSSM, d_model=8, n_layers=1, length=8)(
    ({"discretization": "euler"}, "bilinear, zoh"),
    ({"n_ssm": 3}, "a divisor"),
    ({"dt_min": 1.0}, "dt_min"),
    ({"state_size": 0}, "state_size is 0"),
)
