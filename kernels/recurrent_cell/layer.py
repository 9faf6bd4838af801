"""A recurrent layer, `recurrent_cell` with its input projection: cells that cuDNN knows run in it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.kernels._dispatch import choose
from lra.kernels.recurrent_cell import HAS_GPU, PORTABLE, WIDEST_ON_GPU, recurrent_cell

LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm, "gru": torch.gru, "elman": torch.rnn_tanh, "elman_relu": torch.rnn_relu,
}  # fmt: skip
"""Cells of PyTorch's own layers, which are cuDNN's on a GPU: any width, forward and backward."""


def recurrent_layer(
    x: Tensor, W: Tensor, b_x: Tensor | None, U: Tensor, b: Tensor | None, cell: str, h0: Tensor | None = None,
    *, c0: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """`recurrent_cell` of x_gates = x W^T + b_x.

    x: (B, L, D); W: (G * H, D); b_x: (G * H,) or None; U, b, cell, h0, c0 and impl as in `recurrent_cell`, without
    peepholes and norms. impl may also be "cudnn", which "auto" takes on a GPU for lstm, gru, elman and elman_relu.
    Returns h: (B, L, H).
    Raises ValueError as `recurrent_cell` does.
    """
    if cell in LAYERS:
        fits = x.dtype != torch.float64 and U.shape[-1] <= WIDEST_ON_GPU
        options = {"portable": PORTABLE, "has_gpu": HAS_GPU and fits, "has_cudnn": True}
        impl = choose("recurrent_cell", impl, x.device, **options)
        if impl == "cudnn":
            return in_pytorch(x, W, b_x, U, b, cell, h0, c0)
    h = recurrent_cell(F.linear(x, W, b_x), U, b, cell, h0, c0=c0, impl=impl)
    assert isinstance(h, Tensor)
    return h


def in_pytorch(
    x: Tensor, W: Tensor, b_x: Tensor | None, U: Tensor, b: Tensor | None, cell: str, h0: Tensor | None,
    c0: Tensor | None,
) -> Tensor:  # fmt: skip
    """The layer by PyTorch's function for the cell, one of LAYERS; all arguments in the dtype of x."""
    zero, nothing = x.new_zeros(x.shape[0], U.shape[1]), x.new_zeros(len(U))
    first = [(zero if t is None else t.to(x.dtype)).unsqueeze(0) for t in ((h0, c0) if cell == "lstm" else (h0,))]
    weights = [nothing if t is None else t.to(x.dtype) for t in (W, U, b_x, b)]
    # has_biases, layers, dropout, training (keeps what the backward pass needs), bidirectional, batch_first
    options = True, 1, 0.0, torch.is_grad_enabled(), False, True
    y: Tensor = LAYERS[cell](x, first if cell == "lstm" else first[0], weights, *options)[0]
    return y
