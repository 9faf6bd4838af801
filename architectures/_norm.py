"""Norms beside PyTorch's own: batch normalisation of sequences that are padded, one gain for all channels, and layer
normalisation that is exact under autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._precision import wide


class BatchNorm(nn.Module):
    """As nn.BatchNorm1d with each real token an example: (..., D), mask (...) bool -> (..., D).

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


class LayerNorm(nn.LayerNorm):
    """As nn.LayerNorm; under autocast it computes in float32 on every device, as PyTorch does on CUDA.

    On a CPU, PyTorch sums the gradients of weight and bias in bfloat16 where the input is bfloat16: over the 8,192
    tokens of a batch they are off by their own size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        weight, bias = (None if p is None else wide(p) for p in (self.weight, self.bias))
        return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """As nn.RMSNorm; an input more precise than the weight keeps its precision without a warning."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, x.dtype))
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class ScaleNorm(nn.Module):
    """g x / sqrt(mean of x^2 + eps), g one number: (..., D). arXiv:1910.05895 has the sum in place of the mean."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.expand(x.shape[-1]), self.eps)


def normalised(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """norm(x), whatever the kind of norm."""
    return norm(x, mask) if isinstance(norm, BatchNorm) else norm(x)
