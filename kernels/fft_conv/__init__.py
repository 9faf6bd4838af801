"""Long convolution by FFT: every channel with a kernel of its own, as long as the sequence if need be."""

from __future__ import annotations

from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose

__all__ = ["fft_conv"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = False


def fft_conv(
    u: Tensor, k: Tensor, D: Tensor | None = None, bidirectional: bool = False, *, impl: str = "auto"
) -> Tensor:
    """Linear (never circular) convolution along the sequence, plus a skip term.

    causal         y_t = sum_{j >= 0} k_j u_{t-j} + D u_t
    bidirectional  y_t = sum_{j >= 0} k0_j u_{t-j} + sum_{j >= 1} k1_{j-1} u_{t+j} + D u_t

    The kernel that looks ahead, k1 = k[1], skips the current step, as in S4, DSS, SGConv and LongConv: its tap j meets
    u_{t+1+j}. Where both directions count the current step (S5, MEGA), shift k1 by one and add its first tap to D.

    u: (B, L, H) real; k: (H, K), or (2, H, K) when bidirectional, K >= 1 (taps that reach past the sequence are
    unused); D: (H,) -> y: (B, L, H) in the dtype of u. Half precision is computed in float32.
    Differentiable in u, k and D; deterministic. Cost: O(B H n log n) with n about L + min(K, L); nothing but the inputs
    is kept for the backward pass, and the workspace is bounded by blocks of channels and batch.
    Raises ValueError for a wrong rank, shape, dtype or device.
    """
    op = "fft_conv"
    device = check_tensors(op, u=u, k=k, D=D)
    for name, tensor in (("u", u), ("k", k), ("D", D)):
        check(tensor is None or not tensor.is_complex(), op, name, getattr(tensor, "dtype", None), "a real dtype")
    check(u.ndim == 3 and u.shape[1] > 0, op, "u", tuple(u.shape), "(B, L, H) with L >= 1")
    rank, wanted = (3, "(2, H, K)") if bidirectional else (2, "(H, K)")
    fits = k.ndim == rank and k.shape[-1] > 0 and k.shape[-2] == u.shape[2] and (rank == 2 or k.shape[0] == 2)
    check(fits, op, "k", tuple(k.shape), f"{wanted} with H = {u.shape[2]} and K >= 1")
    check(D is None or D.shape == u.shape[2:], op, "D", D is not None and tuple(D.shape), f"({u.shape[2]},)")
    if choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU) == "reference":
        from lra.kernels.fft_conv.reference import reference

        return reference(u, k, D, bidirectional)
    from lra.kernels.fft_conv.cpu import convolve

    return convolve(u, k, D, bidirectional)
