"""s4d against tensors of the authors' modules, its recurrence against its kernel, and the properties of its start."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor

from lra.architectures._diagonal import modes
from lra.architectures._hippo import legs_modes
from lra.architectures.state_space.s4d import S4D, S4DMixer

LAYERS: dict[str, dict[str, Any]] = {
    "s4d_lin_zoh": {"init": "lin"},
    "s4d_legs_zoh": {"init": "legs"},
    "s4d_legs_bilinear": {"init": "legs", "discretization": "bilinear"},
    "s4d_inv_bilinear": {"init": "inv", "discretization": "bilinear", "n_ssm": 2},
    "s4d_bidirectional": {"init": "lin", "direction": "bidirectional"},
}


def mixer_of(**own: Any) -> S4DMixer:
    mixer = S4D(**{"d_model": 4, "n_layers": 1, "length": 257, "state_size": 8, **own}).layers[0].mixer
    assert isinstance(mixer, S4DMixer)
    return mixer.double()


def load(mixer: S4DMixer, g: dict[str, Tensor]) -> S4DMixer:
    """Copy the parameters of an S4Block; its S4D stores the same A under other names and has B = 1."""
    minimal = "param.B" not in g
    C = g["param.C"].unsqueeze(0) if minimal else g["param.C"]
    B = torch.ones_like(C[0]) if minimal else g["param.B"][0]
    state = {
        "log_dt": g["param.log_dt"].flatten(),
        "log_A_real": g["param.log_A_real"] if minimal else g["param.A_real_log"],
        "A_imag": g["param.A_imag"] if minimal else -g["param.A_imag_neg"],
        "B": torch.view_as_real(B),
        "C": torch.view_as_real(C),
        "D": g["param.D"].flatten(),
        "output_linear.weight": g["param.out.weight"],
        "output_linear.bias": g["param.out.bias"],
    }
    mixer.load_state_dict(state)
    return mixer


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_s4block(name: str) -> None:
    g = golden(name)
    mixer = load(mixer_of(**LAYERS[name]), g)
    torch.testing.assert_close(mixer.kernel(64), g["mid.kernel_short"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mixer.kernel(257), g["mid.kernel_long"], rtol=1e-11, atol=1e-12)
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(y.mT, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"].mT).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.mT, g["grad.x"], rtol=1e-11, atol=1e-12)
    long = g["mid.x_long"].mT
    torch.testing.assert_close(mixer(long, everything(long)).mT, g["mid.y_long"], rtol=1e-11, atol=1e-12)


def test_layer_equals_minimal_s4d() -> None:
    g = golden("s4d_minimal")
    mixer = load(mixer_of(), g)
    torch.testing.assert_close(mixer.kernel(64)[0], g["mid.kernel"], rtol=1e-11, atol=1e-12)
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(y.mT, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"].mT).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.mT, g["grad.x"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_gradients_of_every_parameter_equal_the_recurrence(discretization: str) -> None:
    """The stored tensors hold the gradient of x alone; the step-by-step recurrence gives those of the parameters."""
    torch.manual_seed(0)
    mixer = mixer_of(discretization=discretization, n_ssm=2)
    x = torch.randn(2, 19, 4, dtype=torch.float64)
    w = torch.randn_like(x)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    recurrent = torch.autograd.grad((stepped(mixer, x) * w).sum(), parameters)
    parallel = torch.autograd.grad((mixer(x, everything(x)) * w).sum(), parameters)
    for name, own, other in zip(names, parallel, recurrent, strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-10), name


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(init="legs", state_size=16).float(), 4, rtol=1e-4, atol=2e-5)


def test_modes_are_those_of_the_paper() -> None:
    g = golden("hippo_nplr")
    size = int(g["param.N"])
    n = np.arange(size // 2)
    np.testing.assert_allclose(modes("lin", size)[0].numpy(), -0.5 + 1j * math.pi * n, rtol=1e-14)
    inverse = size / math.pi * (size / (2 * n + 1) - 1)
    np.testing.assert_allclose(modes("inv", size)[0].numpy(), -0.5 + 1j * inverse, rtol=1e-14)
    # their modes have negative frequencies: the other half of the pairs
    torch.testing.assert_close(modes("inv", size)[0].conj(), g["mid.diag-inv.A"], rtol=1e-6, atol=0)
    A, B = modes("legs", size)
    torch.testing.assert_close(A, g["mid.legs.Lambda"].conj().flip(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(B, g["mid.legs.B"].abs().flip(0) / 2, rtol=1e-11, atol=1e-11)


def test_legs_modes_are_the_spectrum_of_the_normal_part() -> None:
    """From the matrix itself: A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; p_n = sqrt(n + 1/2)."""
    size = 64
    n = np.arange(size)
    hippo = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    spectrum = np.linalg.eigvals(hippo + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5)))
    A, B = modes("legs", size)
    kept = np.sort(spectrum.imag[spectrum.imag > 0])
    np.testing.assert_allclose(spectrum.real, -0.5, atol=1e-9)
    np.testing.assert_allclose(A.imag.sort().values, kept, rtol=1e-10)
    assert (A.real == -0.5).all()
    # V is unitary: all modes together have the norm of B_LegS, halved
    np.testing.assert_allclose(2 * B.square().sum(), (2 * n + 1).sum() / 4, rtol=1e-10)


def test_legs_kernels_tend_to_those_of_the_full_matrix_on_average_only() -> None:
    """Against exp(-t), the first kernel of LegS, with the C that the basis of the normal part gives."""
    t = torch.linspace(0, 8, 801, dtype=torch.float64)
    exact, errors = torch.exp(-t), {}
    for state_size in (8, 64):
        (A, B), (frequency, basis, b) = modes("legs", state_size), legs_modes(state_size)
        kept = frequency > 0
        inside = (basis.mH @ b.to(basis.dtype))[kept]
        C = basis[0, kept] * inside / inside.abs()
        kernel = 2 * torch.einsum("m,tm->t", C * B, torch.exp(t.unsqueeze(1) * A)).real
        means = (torch.stack([kernel - exact, exact]).unfold(1, 51, 1).mean(-1)).norm(dim=1)
        errors[state_size] = (kernel - exact).norm() / exact.norm(), means[0] / means[1]
    assert errors[8] == pytest.approx((0.69, 0.29), abs=0.01)
    assert errors[64] == pytest.approx((0.71, 0.05), abs=0.01)


def test_real_and_mixed_modes() -> None:
    A, B = modes("real", 8)
    assert torch.equal(A, torch.tensor([-1, -2, -3, -4], dtype=torch.complex128))
    assert (B == 1).all()
    frequencies = mixer_of(init="diag", n_ssm=2).A_imag
    for own, init in zip(frequencies, ("inv", "lin"), strict=True):
        torch.testing.assert_close(own, modes(init, 8)[0].imag.float().double(), rtol=0, atol=0)


def test_step_sizes_fill_their_range() -> None:
    torch.manual_seed(0)
    dt = mixer_of(d_model=2000, state_size=2, dt_min=1e-4, dt_max=0.1).log_dt.exp()
    assert dt.min() >= 1e-4 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    # uniform in the logarithm: the middle of the range in decades is its median
    assert 2.5e-3 < dt.median() < 4e-3


def test_optimiser_settings_reach_the_ssm_alone() -> None:
    encoder = S4D(d_model=8, n_layers=2, length=8, ssm_lr=5e-4, dt_lr=0.01)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    expected = {f"layers.{i}.mixer.{name}" for i in range(2) for name in ("log_dt", "log_A_real", "A_imag", "B")}
    assert own == expected
    rates = {pattern: 0.01 if "dt" in pattern else 5e-4 for pattern in encoder.optim}
    assert encoder.optim == {pattern: {"lr": rate, "weight_decay": 0.0} for pattern, rate in rates.items()}


test_wrong_arguments_are_named = refuses(S4D, d_model=8, n_layers=1, length=8)(
    ({"state_size": 7}, "state_size is 7"),
    ({"init": "hippo"}, "lin, inv, legs"),
    ({"discretization": "euler"}, "zoh, bilinear"),
    ({"dt_min": 0.2}, "dt_min is 0.2"),
    ({"n_ssm": 3}, "n_ssm is 3"),
    ({"init": "diag", "n_ssm": 1}, "n_ssm is 1"),
)
