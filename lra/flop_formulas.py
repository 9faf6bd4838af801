"""Work of PyTorch's operators, by shape, where its own counter has no formula or one that misleads."""

from __future__ import annotations

from collections.abc import Callable
from math import log2, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
Shape = tuple[int, ...]


def _counting_complex(op: Any) -> Callable[..., float]:
    dense = flop_registry[op]

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> float:
        is_complex = any(isinstance(t, Tensor) and t.is_complex() for t in args)
        return dense(*args, out_val=out_val, **kwargs) * (4 if is_complex else 1)

    formula._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode's own mark: hand over tensors, not shapes
    return formula


def _product(a: Shape, b: Shape, *_: Any, **__: Any) -> float:
    """mv, dot, vdot: every element of `a` meets one of `b`."""
    return 2.0 * prod(a)


def _grouped_mm(a: Shape, b: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(a[1:] if len(a) > len(b) else a) * b[-1]


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: int, mask: Any, **_: Any,
) -> float:  # fmt: skip
    # torch's own formula ignores groups here and overstates a depthwise convolution by the number of channels
    spatial = x[2:] if transposed else grad[2:]
    return 2.0 * grad[0] * prod(spatial) * prod(weight) * (bool(mask[0]) + bool(mask[1]))


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(q, k, v))


def _attention_backward(_grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * _attention(q, k, v)


def _mkldnn_rnn(x: Shape, w: Shape, u: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(x[:-1]) * (prod(w) + prod(u))


def _mkldnn_rnn_backward(x: Shape, w: Shape, u: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * _mkldnn_rnn(x, w, u)


def _cudnn_rnn(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> float:
    return 2.0 * prod(x[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _cudnn_rnn_backward(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> float:
    return 2.0 * _cudnn_rnn(x, weights)


def _fft_real(size: Shape, dims: list[int]) -> float:
    return 2.5 * prod(size) * log2(prod(size[d] for d in dims))


def _fft_r2c(x: Shape, dims: list[int], *_: Any, **__: Any) -> float:
    return _fft_real(x, dims)


def _fft_c2r(_x: Shape, dims: list[int], *_: Any, out_shape: Shape, **__: Any) -> float:
    return _fft_real(out_shape, dims)


def _fft_c2c(x: Shape, dims: list[int], *_: Any, **__: Any) -> float:
    return 2 * _fft_real(x, dims)


def _one_each(x: Shape, *_: Any, **__: Any) -> float:
    return float(prod(x))


def _triangular_solve(a: Shape, b: Shape, *_: Any, left: bool = True, **__: Any) -> float:
    return float(prod(b) * (b[-2] if left else b[-1]))


def _factor(a: Shape, *_: Any, **__: Any) -> float:
    return 2.0 / 3.0 * prod(a) * a[-1]


def _solve(a: Shape, b: Shape, *_: Any, left: bool = True, **__: Any) -> float:
    """General systems of a matrix a: LU, then two triangular solves for each column of b, (..., n) or (..., n, k)."""
    return _factor(a) + 2.0 * prod(b) * a[-1]


def _lu_solve(lu: Shape, _pivots: Shape, b: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(b) * lu[-1]


DENSE = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
_HEAVY: dict[Any, Callable[..., float]] = {
    **{op: _counting_complex(op) for op in DENSE},
    aten.mv: _product,
    aten.dot: _product,
    aten.vdot: _product,
    aten._grouped_mm: _grouped_mm,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _mkldnn_rnn,
    aten.mkldnn_rnn_layer_backward: _mkldnn_rnn_backward,
    aten._cudnn_rnn: _cudnn_rnn,
    aten._cudnn_rnn_backward: _cudnn_rnn_backward,
}
FORMULAS: dict[Any, Callable[..., float]] = {
    **_HEAVY,
    aten._fft_r2c: _fft_r2c,
    aten._fft_c2r: _fft_c2r,
    aten._fft_c2c: _fft_c2c,
    aten.cumsum: _one_each,
    aten.cumprod: _one_each,
    aten.logcumsumexp: _one_each,
    aten.linalg_solve_triangular: _triangular_solve,
    aten._linalg_solve_ex: _solve,
    aten.linalg_lu_factor: _factor,
    aten.linalg_lu_factor_ex: _factor,
    aten.linalg_lu_solve: _lu_solve,
}
MATMUL = frozenset(_HEAVY) | frozenset(op for op in flop_registry if str(op).startswith("aten."))
