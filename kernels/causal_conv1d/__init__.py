"""Short depthwise causal convolution, as in the blocks of Mamba, Griffin and xLSTM."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.causal_conv1d.cpu import convolve
from lra.kernels.causal_conv1d.reference import reference

__all__ = ["causal_conv1d"]

DETERMINISTIC = True
PORTABLE = False
HAS_GPU = True


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, impl: str = "auto"
) -> Tensor:
    """y_t = f(bias + sum_k weight[:, k] * x_{t-K+1+k}), channel by channel, with x = 0 before the first step.

    x: (B, L, D); weight: (D, K), the last tap on the present step; bias: (D,); activation f: None or "silu".
    Returns y: (B, L, D). Real; mixed dtypes promote; bfloat16 and float16 accumulate in float32.

    Deterministic. Work 2 B L D K; time is bound by memory, as x is read and y written once. The backward pass
    recomputes the input of the activation instead of storing it.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, an unknown activation, and on length 0.
    """
    device = check_tensors("causal_conv1d", x=x, weight=weight, bias=bias)
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        check(t is None or not t.is_complex(), "causal_conv1d", name, t is None or t.dtype, "a real dtype")
    check(x.dim() == 3 and x.shape[1] > 0, "causal_conv1d", "x", tuple(x.shape), "(B, L, D) with L > 0")
    width = x.shape[2]
    fits = weight.dim() == 2 and weight.shape[0] == width and weight.shape[1] > 0
    check(fits, "causal_conv1d", "weight", tuple(weight.shape), "(D, K) with K > 0 for the (B, L, D) of x")
    check(bias is None or bias.shape == (width,), "causal_conv1d", "bias", bias is None or tuple(bias.shape), "(D,)")
    check(activation in (None, "silu"), "causal_conv1d", "activation", repr(activation), "None or 'silu'")
    chosen = choose("causal_conv1d", impl, device, portable=PORTABLE, has_gpu=HAS_GPU)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        bias = bias.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if chosen == "reference":
        return reference(x, weight, bias, activation)
    return convolve(x, weight, bias, activation == "silu", chosen == "gpu")
