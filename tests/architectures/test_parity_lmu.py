"""lmu against tensors of pytorch-lmu, the recurrent cell and the parallel form, and what its memory holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from refusals import refuses
from stepping import stepped

from lra.architectures.recurrent.lmu import LMU, LMUFFTMixer, LMUMixer, impulses, legendre


def filled(mixer: Any, order: int, theta: float) -> Any:
    """The mixer in float64, its fixed matrices too."""
    mixer = mixer.double()
    mixer.A, mixer.B = legendre(order, theta)
    return mixer


def test_matrices_equal_theirs() -> None:
    g = golden("lmu")
    A, B = legendre(6, g["cfg.theta"].item())
    torch.testing.assert_close(A, g["mid.A"], rtol=0, atol=1e-14)
    torch.testing.assert_close(B, g["mid.B"], rtol=0, atol=1e-14)
    g = golden("lmu_fft")
    kernel = impulses(*legendre(6, g["cfg.theta"].item()), 9)
    torch.testing.assert_close(kernel, g["mid.H"], rtol=0, atol=1e-14)


def test_cell_equals_theirs() -> None:
    g = golden("lmu")
    mixer = filled(LMUMixer(5, order=6, theta=2.0), 6, g["cfg.theta"].item())
    own = {name: g[f"param.{name}"] for name in ("e_h", "e_m", "W_h", "W_m")}
    load(mixer, e_x=padded(g["param.e_x"], 1, 5), W_x=padded(g["param.W_x"], 5, 5), **own)
    h, m = agrees(mixer, g, (g["h0"], g["m0"]))
    torch.testing.assert_close(h, g["h_n"], rtol=0, atol=1e-12)
    torch.testing.assert_close(m, g["m_n"], rtol=0, atol=1e-12)


def test_parallel_form_equals_theirs() -> None:
    g = golden("lmu_fft")
    mixer = filled(LMUFFTMixer(5, order=6, theta=2.0), 6, g["cfg.theta"].item())
    u, h = g["param.W_u.weight"], g["param.W_h.weight"]  # h: columns m, x
    biases = {"W_u__bias": g["param.W_u.bias"], "W_h__bias": g["param.W_h.bias"]}
    load(mixer, W_u__weight=padded(u, 1, 5), W_h__weight=padded(h, 5, 11), **biases)
    agrees(mixer, g, mixer.init_state(3))
    y = stepped(mixer, padded(g["x"], *g["x"].shape[:2], 5))
    torch.testing.assert_close(y[:, -1], g["h_n"], rtol=0, atol=1e-12)


def test_memory_holds_the_window() -> None:
    """Legendre polynomials with the memory for coefficients give back a smooth signal over the last theta tokens."""
    order, theta, length = 8, 50.0, 200
    A, B = legendre(order, theta)
    signal = torch.sin(torch.arange(length, dtype=torch.float64) / 12)
    m = torch.zeros(order, dtype=torch.float64)
    for u in signal:
        m = A @ m + B[:, 0] * u
    back = np.arange(5, 45)
    approximation = np.polynomial.legendre.Legendre(m.numpy(), domain=[0, theta])
    # a token is held for one step: the middle of it is half a step before its end
    np.testing.assert_allclose(approximation(back + 0.5), signal[length - 1 - back].numpy(), atol=2e-3)


test_wrong_arguments_are_named = refuses(LMU, d_model=8, n_layers=1, length=16)(
    ({"order": 0}, "order is 0"),
    ({"theta": 0.5}, r"theta is 0\.5"),
)
