"""s4 against tensors of the authors' module, its recurrence against its kernel, and the properties of its start."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor

from lra.architectures._dplr import modes
from lra.architectures.state_space.s4 import S4, S4Mixer

LAYERS: dict[str, dict[str, Any]] = {
    "s4_dplr_legs": {"init": "legs"},
    "s4_dplr_fout": {"init": "fout", "n_ssm": 2},
    "s4_dplr_legt_rank2": {"init": "legt"},
    "s4_dplr_bidirectional": {"init": "legs", "direction": "bidirectional"},
}


def mixer_of(**own: Any) -> S4Mixer:
    mixer = S4(**{"d_model": 4, "n_layers": 1, "length": 257, "state_size": 8, **own}).layers[0].mixer
    assert isinstance(mixer, S4Mixer)
    return mixer.double()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [64, 257])
def test_layer_equals_s4block(name: str, length: int) -> None:
    g = golden(name)
    mixer = mixer_of(length=length, **LAYERS[name])
    state = {
        "log_dt": g["param.log_dt"].flatten(),
        "log_A_real": g["param.A_real_log"],
        "A_imag": -g["param.A_imag_neg"],
        "P": torch.view_as_real(g["param.P"]),
        "B": torch.view_as_real(g["param.B"][0]),
        "C_tilde": mixer.C_tilde,
        "D": g["param.D"].flatten(),
        "output_linear.weight": g["param.out.weight"],
        "output_linear.bias": g["param.out.bias"],
    }
    mixer.load_state_dict(state)
    mixer.set_output(g["param.C"])
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(mixer.kernel(64), g["mid.kernel_short"], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(y.mT, g["y"], rtol=1e-10, atol=1e-11)
    (y * g["w"].mT).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.mT, g["grad.x"], rtol=1e-10, atol=1e-11)
    if length == 64:
        # the parameter of the authors' module after its first call at this length
        torch.testing.assert_close(torch.view_as_complex(mixer.C_tilde), g["mid.C_tilde_short"], rtol=1e-10, atol=1e-11)
    else:
        torch.testing.assert_close(mixer.kernel(257), g["mid.kernel_long"], rtol=1e-10, atol=1e-11)
        long = g["mid.x_long"].mT
        torch.testing.assert_close(mixer(long, everything(long)).mT, g["mid.y_long"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("init", ["legs", "fout", "legt"])
def test_gradients_of_every_parameter_equal_the_recurrence(init: str) -> None:
    """The stored tensors hold the gradient of x alone; the step-by-step recurrence gives those of the parameters."""
    torch.manual_seed(0)
    mixer = mixer_of(init=init, length=23, n_ssm=2)
    x = torch.randn(2, 19, 4, dtype=torch.float64)
    w = torch.randn_like(x)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    recurrent = torch.autograd.grad((stepped(mixer, x) * w).sum(), parameters)
    parallel = torch.autograd.grad((mixer(x, everything(x)) * w).sum(), parameters)
    for name, own, other in zip(names, parallel, recurrent, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9, msg=name)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(length=2048, state_size=16).float(), 4, rtol=1e-3, atol=1e-4)


def complete(half: Tensor) -> Tensor:
    return torch.cat([half, half.conj()], dim=-1)


@pytest.mark.parametrize("init", ["legs", "fout", "legt"])
def test_modes_are_hippo(init: str) -> None:
    """diag(A) - P P^* has the spectrum of the dense matrix, and B sees it as the dense B does, at every power."""
    g = golden("hippo_nplr")
    A, P, B = (complete(t) for t in modes(init, int(g["param.N"])))
    dense = g[f"mid.{init}.A"].to(torch.complex128)
    S = A.diag() - P.mT @ P.conj()
    # sums of moments B^* S^k B do not depend on the basis
    own, other = B, g[f"mid.{init}.Bdense"].to(torch.complex128)
    for _ in range(4):
        torch.testing.assert_close(B.conj() @ own, g[f"mid.{init}.Bdense"].to(torch.complex128) @ other)
        own, other = S @ own / 10, dense @ other / 10
    half = A[: len(A) // 2]
    torch.testing.assert_close(half, g[f"mid.{init}.Lambda"].conj().flip(0), rtol=1e-10, atol=1e-10)
    products = (B * P.conj())[:, : len(half)]
    expected = g[f"mid.{init}.BconjP"].conj().flip(1)
    torch.testing.assert_close(products, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("init", ["legs", "fout", "legt"])
def test_modes_have_the_moments_of_the_authors_transitions(init: str, size: str) -> None:
    """B^* S^k B, which no basis changes, for as many k as the system has states."""
    g = golden("hippo_transition")
    N = int(g[f"param.N_{size}"])
    A, P, B = (complete(t) for t in modes(init, N))
    S, dense = A.diag() - P.mT @ P.conj(), g[f"mid.{init}.{size}.A"]
    enters = g[f"mid.{init}.{size}.B"][:, 0]
    own, other, scale = B, enters, torch.linalg.matrix_norm(dense, 2)
    for _ in range(N):
        torch.testing.assert_close(B.conj() @ own, (enters @ other).to(own.dtype), rtol=1e-10, atol=1e-12)
        own, other = S @ own / scale, dense @ other / scale


def test_legs_is_exactly_normal_plus_low_rank() -> None:
    """From the matrix itself: V diag(A) V^* - p p' with a unitary V, p_n = sqrt(n + 1/2)."""
    n = torch.arange(64, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    hippo = -torch.outer(root, root).tril(-1) - (n + 1).diag()
    p = (n + 0.5).sqrt()
    normal = (hippo + torch.outer(p, p)).to(torch.complex128)
    A, P, _ = modes("legs", 64)
    values, V = torch.linalg.eigh(-1j * (normal + 0.5 * torch.eye(64)))
    torch.testing.assert_close(1j * values[values > 0] - 0.5, A, rtol=1e-10, atol=1e-10)
    rebuilt = V @ (1j * values - 0.5).diag() @ V.mH - torch.outer(p, p)
    torch.testing.assert_close(rebuilt.real, hippo, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(P[0].abs(), (V.mH @ p.to(V.dtype)).abs()[values > 0], rtol=1e-10, atol=1e-10)


def test_hippo_is_legs_in_the_first_half_and_fout_in_the_second() -> None:
    mixer = mixer_of(init="hippo")
    for half, init in ((slice(0, 2), "legs"), (slice(2, 4), "fout")):
        A, P, B = modes(init, 8)
        torch.testing.assert_close(mixer.A_imag[half].detach(), A.imag.float().double().expand(2, 4))
        for own, expected in ((mixer.P[0, half], P[0]), (mixer.B[half], B)):
            stored = torch.view_as_complex(own.detach())
            torch.testing.assert_close(stored, expected.expand(2, 4), rtol=1e-6, atol=1e-6)


def test_step_sizes_fill_their_range() -> None:
    torch.manual_seed(0)
    dt = mixer_of(d_model=2000, length=1, state_size=2, dt_min=1e-4, dt_max=0.1).log_dt.exp()
    assert dt.min() >= 1e-4 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    # uniform in the logarithm: the middle of the range in decades is its median
    assert math.sqrt(1e-5) * 0.8 < dt.median() < math.sqrt(1e-5) * 1.25


def test_optimiser_settings_reach_the_ssm_alone() -> None:
    encoder = S4(d_model=8, n_layers=2, length=8, state_size=4, ssm_lr=5e-4, dt_lr=0.01)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    ruled = ("log_dt", "log_A_real", "A_imag", "P", "B")
    assert own == {f"layers.{i}.mixer.{name}" for i in range(2) for name in ruled}
    rates = {pattern: 0.01 if "dt" in pattern else 5e-4 for pattern in encoder.optim}
    assert encoder.optim == {pattern: {"lr": rate, "weight_decay": 0.0} for pattern, rate in rates.items()}


test_wrong_arguments_are_named = refuses(S4, d_model=8, n_layers=1, length=8)(
    ({"state_size": 7}, "state_size is 7"),
    ({"init": "lagt"}, "legs, fout, legt, hippo"),
    ({"init": "hippo", "n_ssm": 1}, "n_ssm is 1"),
    ({"dt_min": 0.2}, "dt_min is 0.2"),
    ({"n_ssm": 3}, "n_ssm is 3"),
)


def test_a_sequence_too_long_is_named() -> None:
    with pytest.raises(ValueError, match="length 9 exceeds the 8 steps"):
        S4(d_model=2, n_layers=1, length=8, state_size=4)(torch.zeros(1, 9, 2), torch.ones(1, 9, dtype=torch.bool))
