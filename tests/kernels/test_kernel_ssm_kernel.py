"""`ssm_kernel_diag` and `ssm_kernel_dplr` inside the published S4, S4D and DSS layers, and what only they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.kernels.fft_conv import fft_conv
from lra.kernels.ssm_kernel_diag import cpu as diag_cpu
from lra.kernels.ssm_kernel_diag import ssm_kernel_diag
from lra.kernels.ssm_kernel_dplr import cauchy, ssm_kernel_dplr
from lra.kernels.ssm_kernel_dplr.transform import transformed_output

IMPLEMENTATIONS = ["reference", "cpu"]
DIAGONAL = ["s4d_lin_zoh", "s4d_inv_bilinear", "s4d_legs_zoh", "s4d_legs_bilinear", "s4d_bidirectional"]
LOW_RANK = ["s4_dplr_legs", "s4_dplr_fout", "s4_dplr_legt_rank2", "s4_dplr_bidirectional"]


def close(found: Tensor, wanted: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=atol)


def over_channels(z: dict[str, Tensor]) -> dict[str, Any]:
    """A, P, B of every channel: S systems are dealt out in turn, channel h has number h mod S."""
    C, systems = z["param.C"], z["mid.Lambda"].shape[0]
    found = {"A": z["mid.Lambda"], "B": z["param.B"][0]} | ({"P": z["param.P"]} if "param.P" in z else {})
    repeats = C.shape[1] // systems
    return {k: t.repeat(*[1] * (t.ndim - 2), repeats, 1) for k, t in found.items()} | {"C": C, "dt": z["mid.dt"][:, 0]}


def kernel_of(name: str, z: dict[str, Tensor], length: int, impl: str) -> Tensor:
    given = over_channels(z)
    if "P" in given:
        return ssm_kernel_dplr(**given, length=length, impl=impl)
    given["C"] = given["C"] * given.pop("B")
    rule = "bilinear" if name.endswith("bilinear") else "zoh"
    return ssm_kernel_diag(**given, length=length, discretization=rule, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DIAGONAL + LOW_RANK)
def test_s4_layer(name: str, impl: str) -> None:
    """Kernels of an even and an odd length, the convolution, the layer around it, and the gradient of its input."""
    z = golden(name)
    for key in ("mid.kernel_short", "mid.kernel_long"):
        close(kernel_of(name, z, z[key].shape[-1], impl), z[key])
    x = z["x"].requires_grad_()
    kernel = z["mid.kernel_short"]
    both = len(kernel) == 2
    ssm = fft_conv(x.mT, kernel if both else kernel[0], z["param.D"][0], bidirectional=both, impl=impl)
    close(ssm.mT, z["mid.y_ssm"])
    y = F.glu(F.linear(F.gelu(ssm), z["param.out.weight"], z["param.out.bias"]), dim=-1).mT
    close(y, z["y"])
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_minimal_s4d(impl: str) -> None:
    z = golden("s4d_minimal")
    A = torch.complex(-z["param.log_A_real"].exp(), z["param.A_imag"])
    kernel = ssm_kernel_diag(A, z["param.C"][None], z["param.log_dt"].exp(), 64, "zoh", impl=impl)
    close(kernel[0], z["mid.kernel"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["dss_exp", "dss_exp_bidirectional"])
def test_dss(name: str, impl: str) -> None:
    """No conjugate pairs: half of the weights. W (e^z - 1) / Lambda is a weight on the bare powers of e^z; z has a
    step of its own for its imaginary part."""
    z = golden(name)
    Lambda = torch.complex(-z["param.Lambda_log_neg_re"].exp(), z["param.Lambda_im"])
    step = z["param.log_dt"].exp()
    step = step if step.ndim == 2 else step.unsqueeze(1).expand(-1, 2)
    A = torch.complex(step[:, :1] * Lambda.real, step[:, 1:] * Lambda.imag)
    C = z["param.W"] * torch.expm1(A) / Lambda / 2
    wanted = z["mid.kernel"]
    found = ssm_kernel_diag(A, C, torch.ones_like(step[:, 0]), wanted.shape[-1], "none", impl=impl)
    close(found, wanted.reshape(found.shape))


@pytest.mark.parametrize("name", LOW_RANK)
def test_transformed_output(name: str) -> None:
    """What S4's own parameter C holds after its first call, and the same kernel from it."""
    z = golden(name)
    given = over_channels(z)
    length = z["mid.kernel_short"].shape[-1]
    transformed = transformed_output(given["A"], given["P"], given["C"], given["dt"], length)
    close(transformed, z["mid.C_tilde_short"])
    close(ssm_kernel_dplr(**given | {"C": transformed}, length=length, transformed=True), z["mid.kernel_short"])


def test_without_low_rank_part_it_is_the_diagonal_kernel() -> None:
    given = over_channels(golden("s4_dplr_legs"))
    low_rank = ssm_kernel_dplr(**given | {"P": torch.zeros_like(given["P"])}, length=33)
    close(low_rank, ssm_kernel_diag(given["A"], given["C"] * given["B"], given["dt"], 33, "bilinear"))


def test_zero_order_hold_at_a_zero_eigenvalue() -> None:
    """Bbar = dt where A = 0, and a finite gradient there."""
    A = torch.tensor([[0j, -1 + 2j]], dtype=torch.complex128, requires_grad=True)
    C, dt = torch.tensor([[[1 + 0j, 0]]], dtype=torch.complex128), torch.tensor([0.1], dtype=torch.float64)
    kernel = ssm_kernel_diag(A, C, dt, 5)
    close(kernel, torch.full((1, 1, 5), 0.2, dtype=torch.float64))
    kernel.sum().backward()
    # d/dA of dt phi(dt A) exp(l dt A) at 0 is dt^2 (1/2 + l); its conjugate, twice, summed over l
    assert A.grad is not None
    close(A.grad[0, 0].real, torch.tensor(2 * 0.01 * (5 * 0.5 + 10), dtype=torch.float64))


def test_cauchy_sums_in_plain_torch_equal_the_compiled_ones() -> None:
    torch.manual_seed(0)
    v = torch.randn(2, 3, 5, dtype=torch.complex128)
    A = torch.complex(-torch.rand(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
    half = torch.linspace(0, 1.57, 300, dtype=torch.float64)
    dy = torch.randn(2, 3, 300, dtype=torch.complex128)
    angles = 2 * half.sin(), half.cos()
    torch.testing.assert_close(cauchy.plain_sums(v, A, *angles), cauchy.sums(v, A, *angles))
    torch.testing.assert_close(cauchy.plain_sums_backward(dy, v, A, *angles), cauchy.sums_backward(dy, v, A, *angles))


class Largest(TorchDispatchMode):
    """The most bytes in any one tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_the_powers_are_never_laid_out() -> None:
    """H = 64, N = 64, L = 16,384 would be 512 MiB of complex numbers; no table may pass 8 MiB, forward or backward."""
    width, states, length = 64, 64, 16384
    x = torch.polar(torch.full((width, states), 0.999), torch.rand(width, states)).to(torch.complex128)
    weights = torch.randn(1, width, states, dtype=torch.complex128)
    forward: Callable[..., Tensor] = diag_cpu.vandermonde.__wrapped__._init_fn  # type: ignore[attr-defined]
    backward: Callable[..., tuple[Tensor, Tensor]] = diag_cpu.vandermonde_backward._init_fn
    with Largest() as largest:
        kernel = forward(x, weights, length, torch.float32, False)
        backward(torch.ones_like(kernel), x, weights, False)
    assert largest.bytes <= 8 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"discretization": "euler"}, "discretization is 'euler'; expected zoh, bilinear, none"),
        ({"length": 0}, "length is 0; expected at least 1"),
        (
            {"C": torch.zeros(1, 2, 4, dtype=torch.complex64)},
            r"C is \(1, 2, 4\) .*; expected \(channels, 2, 3\) complex",
        ),
        ({"A": torch.zeros(2, 3)}, r"A is \(2, 3\) torch.float32; expected \(H, N\) complex"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "A": torch.zeros(2, 3, dtype=torch.complex64),
        "C": torch.zeros(1, 2, 3, dtype=torch.complex64),
        "dt": torch.ones(2),
        "length": 8,
    }
    with pytest.raises(ValueError, match=message):
        ssm_kernel_diag(**(good | arguments))
