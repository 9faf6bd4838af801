"""Convolution kernel of a diagonal state space model: a Vandermonde product that is never stored in full."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose

__all__ = ["ssm_kernel_diag"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = True

DISCRETIZATIONS = ("zoh", "bilinear", "none")


def ssm_kernel_diag(
    A: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str = "zoh", *, impl: str = "auto"
) -> Tensor:
    """K_l = 2 Re sum_n C_n Bbar_n Abar_n^l for l = 0 .. length - 1, in every channel.

    zoh        Abar = exp(dt A),                     Bbar = (Abar - 1) / A  (dt where A = 0)
    bilinear   Abar = (1 + dt A / 2) / (1 - dt A / 2),  Bbar = dt / (1 - dt A / 2)
    none       Abar = exp(dt A),                     Bbar = 1

    N counts stored eigenvalues: one of each conjugate pair, hence the 2 Re (S4D). A model without pairs (DSS) takes
    Re alone: halve its C. An input vector B belongs in C, as the product C B.

    A: (H, N) complex; C: (channels, H, N) complex; dt: (H,) real -> K: (channels, H, length) in the dtype of dt.
    Powers are formed in float64 whatever the dtypes (rounding Abar to float32 would cost l times its error), the sum
    over n runs in float32, or in float64 where any argument is in double precision.
    Differentiable in A, C and dt; deterministic. Cost: 4 channels H N length operations as matrix products over two
    levels of powers; memory H N sqrt(length) at most, in blocks of channels, forward and backward.
    Raises ValueError for a wrong rank, shape, dtype, device, length or discretization.
    """
    op = "ssm_kernel_diag"
    device = check_tensors(op, A=A, C=C, dt=dt)
    check(A.ndim == 2 and A.is_complex(), op, "A", f"{tuple(A.shape)} {A.dtype}", "(H, N) complex")
    fits = C.ndim == 3 and C.shape[1:] == A.shape and C.is_complex()
    check(fits, op, "C", f"{tuple(C.shape)} {C.dtype}", f"(channels, {A.shape[0]}, {A.shape[1]}) complex")
    fits = dt.shape == A.shape[:1] and not dt.is_complex()
    check(fits, op, "dt", f"{tuple(dt.shape)} {dt.dtype}", f"({A.shape[0]},) real")
    check(length >= 1, op, "length", length, "at least 1")
    check(discretization in DISCRETIZATIONS, op, "discretization", repr(discretization), ", ".join(DISCRETIZATIONS))
    # the Triton kernels compute in float32; double precision stays in torch
    double = any(t.dtype in (torch.float64, torch.complex128) for t in (A, C, dt))
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU and not double)
    if chosen == "reference":
        from lra.kernels.ssm_kernel_diag.reference import reference

        return reference(A, C, dt, length, discretization)
    from lra.kernels.ssm_kernel_diag.cpu import discretized, vandermonde

    powers, weights = discretized(A, C, dt, discretization)
    dtype = torch.float64 if double else torch.float32
    return vandermonde(powers, weights, length, dtype, chosen == "gpu").to(dt.dtype)
