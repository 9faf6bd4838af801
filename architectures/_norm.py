"""Norms beside PyTorch's own: batch normalisation of sequences that are padded, one gain for all channels, layer
normalisation that is exact under autocast, and root mean square normalisation that is fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lra.architectures._precision import wide


class BatchNorm(nn.Module):
    """Like nn.BatchNorm1d with each real token an example: (..., D), mask (...) bool -> (..., D).

    In training the statistics are those of the real tokens of the batch, so that its sequences see one another; in
    evaluation, and without a mask, the running ones, so that they do not.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d_model: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training and mask is not None:
            tokens = wide(x)[mask]
            variance, mean = torch.var_mean(tokens, dim=0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                unbiased = variance * len(tokens) / max(len(tokens) - 1, 1)
                self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (wide(x) * scale + (self.bias - mean * scale)).to(x.dtype)


class _RMS(torch.autograd.Function):
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension. PyTorch's own is made of single operators on a CPU;
    its backward is that of a layer norm around a mean of 0, which leaves out what reaches x through the mean."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        given = wide(x)
        scale = torch.linalg.vector_norm(given, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = given * scale
        return (y if weight is None else y.mul_(weight)).to(x.dtype), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        given, grad, width = wide(x), wide(grads[0]).contiguous(), x.shape[-1]
        to_x, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, given.contiguous(), [width], torch.zeros_like(scale), scale, weight, None,
            [True, weight is not None, False],
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            mean = (grad.sum(-1) if weight is None else grad @ weight).unsqueeze(-1) / width
        return to_x.addcmul_(mean, scale).to(x.dtype), None if weight is None else to_weight, None


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension: (..., D) -> (..., D), as F.rms_norm."""
    same = weight is None or weight.dtype == torch.promote_types(x.dtype, torch.float32)
    if same and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMS.apply(x, weight, eps)[0]
    if weight is not None:
        weight = weight.to(torch.promote_types(weight.dtype, x.dtype))
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension, with `rms_norm`."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__(d_model, eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.epsilon, self.weight)


class LayerNorm(nn.LayerNorm):
    """Like nn.LayerNorm; under autocast it computes in float32 on every device, as PyTorch does on CUDA.

    On a CPU, PyTorch sums the gradients of weight and bias in bfloat16 where the input is bfloat16: over the 8,192
    tokens of a batch they are off by their own size.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        # the meta device, on which shapes are computed, has no autocast
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(x)
        weight, bias = (None if p is None else wide(p) for p in (self.weight, self.bias))
        return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps)


class ScaleNorm(nn.Module):
    """g x / sqrt(mean of x^2 + eps), g one number: (..., D). arXiv:1910.05895 has the sum in place of the mean."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight.expand(x.shape[-1]))


def normalised(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """norm(x), whatever the kind of norm."""
    return norm(x, mask) if isinstance(norm, BatchNorm) else norm(x)
