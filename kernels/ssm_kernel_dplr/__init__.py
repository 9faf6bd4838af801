"""Convolution kernel of a diagonal-plus-low-rank state space model: S4's Cauchy kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose

__all__ = ["ssm_kernel_dplr"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = False


def ssm_kernel_dplr(
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    transformed: bool = False,
    *,
    impl: str = "auto",
) -> Tensor:
    """K_l = C Abar^l Bbar for l = 0 .. length - 1, with the state matrix diag(A) - sum_r P_r P_r^*, bilinear rule:

    Abar = (I - dt/2 S)^-1 (I + dt/2 S),  Bbar = dt (I - dt/2 S)^-1 B,  S = diag(A) - sum_r P_r P_r^*

    A, P, B, C hold one of each conjugate pair; S acts on all of them, and C multiplies without conjugation, completed
    by its conjugates (S4, arXiv:2111.00396). The truncated generating function is evaluated at the roots of unity from
    Cauchy sums by the Woodbury identity, and one inverse FFT gives the taps. It needs C (I - Abar^length) in the place
    of C: `transformed=True` says that C holds that already, as S4's own parameter does, and saves the power of Abar,
    whose intermediates (H, 2N, 2N) are kept for the backward pass; `transform.transformed_output` computes it once.

    A, B: (H, N) complex with Re A < 0; P: (rank, H, N) complex; C: (channels, H, N) complex; dt: (H,) real
    -> K: (channels, H, length) in the dtype of dt. Computed in float64 throughout: the Woodbury terms cancel to a
    thousandth near the poles of A. Differentiable in all five tensors; deterministic. Cost: O(H N length) and one FFT;
    never (H, N, length) in memory, in blocks of channels, forward and backward.
    Raises ValueError for a wrong rank, shape, dtype, device or length.
    """
    op = "ssm_kernel_dplr"
    device = check_tensors(op, A=A, P=P, B=B, C=C, dt=dt)
    check(A.ndim == 2 and A.is_complex(), op, "A", f"{tuple(A.shape)} {A.dtype}", "(H, N) complex")
    width, states = A.shape
    check(B.shape == A.shape and B.is_complex(), op, "B", f"{tuple(B.shape)} {B.dtype}", f"{(width, states)} complex")
    for name, tensor, first in (("P", P, "rank"), ("C", C, "channels")):
        fits = tensor.ndim == 3 and tensor.shape[1:] == A.shape and tensor.is_complex()
        check(fits, op, name, f"{tuple(tensor.shape)} {tensor.dtype}", f"({first}, {width}, {states}) complex")
    fits = dt.shape == A.shape[:1] and not dt.is_complex()
    check(fits, op, "dt", f"{tuple(dt.shape)} {dt.dtype}", f"({width},) real")
    check(length >= 1, op, "length", length, "at least 1")
    if choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU) == "reference":
        from lra.kernels.ssm_kernel_dplr.reference import reference

        return reference(A, P, B, C, dt, length, transformed)
    from lra.kernels.ssm_kernel_dplr.cpu import cauchy_kernel
    from lra.kernels.ssm_kernel_dplr.transform import transformed_output

    A, P, B, C = (t.to(torch.complex128) for t in (A, P, B, C))
    step = dt.to(torch.float64).unsqueeze(-1)
    if not transformed:
        C = transformed_output(A, P, C, dt, length)
    # a unit step from here on: dt goes into A, into both sides of P P^* and into B
    return cauchy_kernel(step * A, step.sqrt() * P, step * B, C, length).to(dt.dtype)
