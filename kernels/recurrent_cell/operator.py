"""`recurrent_cell` as a PyTorch operator around its compiled loops.

The loops return the gradient of every pre-activation; those of the weights follow from them in one matrix product over
rows and steps, after the loop. Where x comes in bfloat16 beside float32 weights, as under autocast, that is a product
of bfloat16 numbers, as those of a linear map are then; the loop stays in float32.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels._threads import over_rows
from lra.kernels.recurrent_cell import cpu
from lra.kernels.recurrent_cell.layernorm import cpu as layernorm
from lra.kernels.recurrent_cell.product import pack

KEPT = {"lstm": 5, "lstm_coupled": 5, "gru": 4, "gru_coupled": 4, "gru_reset_first": 3, "mgu": 3,
        "lstm_layernorm": 11, "lstm_layernorm_carried": 11}  # fmt: skip
"""Numbers per step and unit that the backward needs beside h."""
NORMED = ("lstm_layernorm", "lstm_layernorm_carried")


def _kept_shape(x: Tensor, U: Tensor, h0: Tensor, cell: str, keep: bool) -> tuple[int, int, int, int]:
    width = h0.shape[1]
    numbers = len(U) // width if cell == "rhn" else KEPT.get(cell, 0)
    return (x.shape[0], x.shape[1] if keep else 0, numbers, width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _vectors(vectors: Tensor, U: Tensor) -> Tensor:
    """Those given, or peepholes of zero."""
    if vectors.numel() or U.ndim == 1:
        return vectors.detach().to(U.dtype).contiguous()
    return U.new_zeros(len(U) // U.shape[1] - 1, U.shape[1])


def _forward_on_cpu(
    x: Tensor, U: Tensor, b: Tensor, vectors: Tensor, h0: Tensor, c0: Tensor, h: Tensor, c_last: Tensor, kept: Tensor,
    cell: str,
) -> None:  # fmt: skip
    width = h.shape[2]
    given = x.numpy(), pack(U.T).numpy() if U.ndim == 2 else U.numpy(), b.numpy()
    over = h0.numpy(), h.numpy()
    if cell in ("elman", "elman_relu"):
        over_rows(cpu.elman_forward, len(x), *given, *over, cell == "elman_relu")
    elif cell == "indrnn":
        over_rows(cpu.indrnn_forward, len(x), *given, *over)
    elif cell in ("lstm", "lstm_coupled"):
        of_cell = vectors.numpy(), h0.numpy(), c0.numpy(), h.numpy(), c_last.numpy()
        over_rows(cpu.lstm_forward, len(x), *given, *of_cell, kept.numpy())
    elif cell in ("gru", "gru_coupled"):
        over_rows(cpu.gru_forward, len(x), *given, *over, kept.numpy())
    elif cell in NORMED:
        of_cell = vectors.numpy(), h0.numpy(), c0.numpy(), h.numpy(), c_last.numpy()
        over_rows(layernorm.lstm_forward, len(x), *given, *of_cell, kept.numpy(), cell.endswith("carried"))
    elif cell == "rhn":
        layers = torch.stack([pack(u.T) for u in U.split(2 * width)])
        over_rows(cpu.rhn_forward, len(x), given[0], layers.numpy(), given[2], *over, kept.numpy())
    else:
        gates, candidate = (pack(u.T).numpy() for u in (U[:-width], U[-width:]))
        over_rows(cpu.reset_first_forward, len(x), given[0], gates, candidate, given[2], *over, kept.numpy())


def _backward_on_cpu(
    y: Tensor, grad_c: Tensor, U: Tensor, vectors: Tensor, h0: Tensor, c0: Tensor, h: Tensor, kept: Tensor,
    delta: Tensor, grad_h0: Tensor, grad_c0: Tensor, sums: Tensor, cell: str,
) -> None:  # fmt: skip
    batch, _, width = h.shape
    states, written = (h.numpy(), kept.numpy()), (delta.numpy(), grad_h0.numpy())
    if cell == "indrnn":
        over_rows(cpu.indrnn_backward, batch, y.numpy(), h.numpy(), U.numpy(), h0.numpy(), *written, *sums.numpy())
    elif cell in ("elman", "elman_relu"):
        over_rows(cpu.elman_backward, batch, y.numpy(), h.numpy(), pack(U).numpy(), *written, cell == "elman_relu")
    elif cell in ("lstm", "lstm_coupled"):
        of_cell = grad_c.numpy(), kept.numpy(), pack(U).numpy(), vectors.numpy(), c0.numpy()
        over_rows(cpu.lstm_backward, batch, y.numpy(), *of_cell, *written, grad_c0.numpy())
    elif cell in ("gru", "gru_coupled"):
        over_rows(cpu.gru_backward, batch, y.numpy(), *states, pack(U).numpy(), h0.numpy(), *written)
    elif cell in NORMED:
        of_cell = grad_c.numpy(), kept.numpy(), pack(U).numpy(), vectors.numpy(), c0.numpy()
        written = (*delta.numpy(), grad_h0.numpy(), grad_c0.numpy(), sums.numpy())
        over_rows(layernorm.lstm_backward, batch, y.numpy(), *of_cell, *written, cell.endswith("carried"))
    elif cell == "rhn":
        layers = torch.stack([pack(u) for u in U.split(2 * width)])
        over_rows(cpu.rhn_backward, batch, y.numpy(), *states, layers.numpy(), h0.numpy(), *written)
    else:
        gates, candidate = (pack(u).numpy() for u in (U[:-width], U[-width:]))
        over_rows(cpu.reset_first_backward, batch, y.numpy(), *states, gates, candidate, h0.numpy(), *written)


def _triton(cell: str) -> ModuleType:
    return import_module(f"lra.kernels.recurrent_cell.{'layernorm.gpu' if cell in NORMED else 'gpu'}")


def _plain(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(dtype).contiguous() for t in tensors)


@torch.library.custom_op("lra::recurrent_cell", mutates_args=())
def run(
    x: Tensor, U: Tensor, b: Tensor, h0: Tensor, c0: Tensor, vectors: Tensor, cell: str, keep: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last c of an lstm (else empty), and what the backward needs (without `keep`: nothing)."""
    batch, length, _ = x.shape
    width, given = h0.shape[1], torch.promote_types(x.dtype, U.dtype)
    dtype = _wide(given)
    kept = x.new_empty(_kept_shape(x, U, h0, cell, keep), dtype=dtype)
    # what is not kept has room for one step
    room = kept if keep else kept.new_empty(batch, 1, *kept.shape[2:])
    x, U, b, h0, c0 = _plain(dtype, x, U, b, h0, c0)
    h, c_last = x.new_empty(batch, length, width), torch.empty_like(c0)
    arguments = x.view(batch, length, -1, width), U, b.view(-1, width), _vectors(vectors, U), h0, c0, h, c_last, room
    if triton:
        _triton(cell).forward(*arguments, cell)
    else:
        _forward_on_cpu(*arguments, cell)
    return h.to(given), c_last.to(given), kept


@run.register_fake
def _(
    x: Tensor, U: Tensor, b: Tensor, h0: Tensor, c0: Tensor, vectors: Tensor, cell: str, keep: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = torch.promote_types(x.dtype, U.dtype)
    kept = x.new_empty(_kept_shape(x, U, h0, cell, keep), dtype=_wide(given))
    return x.new_empty(x.shape[0], x.shape[1], h0.shape[1], dtype=given), x.new_empty(c0.shape, dtype=given), kept


@torch.library.custom_op("lra::recurrent_cell_backward", mutates_args=())
def run_backward(
    grad_h: Tensor, grad_c: Tensor, U: Tensor, h0: Tensor, c0: Tensor, vectors: Tensor, h: Tensor, kept: Tensor,
    cell: str, x_dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, U, b, h0, c0 and vectors; the first in `x_dtype`."""
    batch, length, width = h.shape
    given = h.dtype
    grad_h, grad_c, U, h0, c0, h, kept = _plain(kept.dtype, grad_h, grad_c, U, h0, c0, h, kept)
    # the gradient by every pre-activation; where a norm stands before it, also by what the norm takes in
    delta = h.new_empty(2 if cell in NORMED else 1, batch, length, len(U) // width, width)
    grad_h0, grad_c0 = torch.empty_like(h0), torch.empty_like(c0)
    grad_vectors = h.new_empty(vectors.shape)
    # sums over every step, by row: in double precision, to keep the digits
    sums = h.new_zeros(6 if cell in NORMED else 2 * (cell == "indrnn"), batch, width, dtype=torch.float64)
    room = delta if cell in NORMED else delta[0]
    arguments = grad_h, grad_c, U, _vectors(vectors, U), h0, c0, h, kept, room, grad_h0, grad_c0, sums
    if triton:
        _triton(cell).backward(*arguments, cell)
    else:
        _backward_on_cpu(*arguments, cell)
    if cell in NORMED:
        grad_vectors.copy_(sums.sum(1))
    elif vectors.numel():
        c = torch.cat((c0.unsqueeze(1), kept[:, :, 4]), dim=1)
        for row, gate in enumerate((0, 1, -1) if len(vectors) == 3 else (0, -1)):
            seen = c[:, 1:] if gate == -1 else c[:, :-1]
            grad_vectors[row] = (delta[0, :, :, gate] * seen).sum((0, 1))
    grad_x = (delta[0, :, :, :2] if cell == "rhn" else delta[0]).flatten(2).contiguous()
    if cell == "indrnn":
        grad_U, grad_b = (of_rows.sum(0) for of_rows in sums)
    else:
        grad_U, grad_b = _of_weights(delta, h0, h, kept, cell, x_dtype if x_dtype == torch.bfloat16 else h.dtype)
    rest = (t.to(given) for t in (grad_U, grad_b, grad_h0, grad_c0, grad_vectors))
    return grad_x.to(x_dtype), *rest  # type: ignore[return-value]


def _of_weights(
    delta: Tensor, h0: Tensor, h: Tensor, kept: Tensor, cell: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of U and b. delta: as above, (1 or 2, B, L, G, H); dtype: of the numbers that are multiplied."""
    before = torch.cat((h0.unsqueeze(1), h[:, :-1]), dim=1)
    sums, products = delta[0], delta[-1]
    # gates that share what they multiply
    first, last = products[:, :, :-1], products[:, :, -1:]
    if cell in ("gru", "gru_coupled"):
        parts = [(first, before), (last * kept[:, :, :1], before)]  # r scales the candidate's product
    elif cell in ("gru_reset_first", "mgu"):
        parts = [(first, before), (last, kept[:, :, 0] * before)]
    elif cell == "rhn":
        parts = []
        for layer in range(0, products.shape[2], 2):
            parts.append((products[:, :, layer : layer + 2], before))
            before = before + kept[:, :, layer + 1] * (kept[:, :, layer] - before)
    else:
        parts = [(products, before)]
    flat = [(g.flatten(2).flatten(0, 1), v.flatten(0, 1)) for g, v in parts]
    grad_b = [sums.flatten(2).sum((0, 1))] if cell in NORMED else [g.sum(0) for g, _ in flat]
    return torch.cat([g.to(dtype).T @ v.to(dtype) for g, v in flat]), torch.cat(grad_b)


@run_backward.register_fake
def _(
    grad_h: Tensor, grad_c: Tensor, U: Tensor, h0: Tensor, c0: Tensor, vectors: Tensor, h: Tensor, kept: Tensor,
    cell: str, x_dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gates = 2 if cell == "rhn" else len(U) // h.shape[2]
    grad_x = h.new_empty(h.shape[0], h.shape[1], gates * h.shape[2], dtype=x_dtype)
    of_rest = (h.new_empty(t.shape) for t in (U, U[..., 0] if U.ndim == 2 else U, h0, c0, vectors))
    return grad_x, *of_rest  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, U, _, h0, c0, vectors, ctx.cell, _, ctx.triton = inputs
    ctx.x_dtype = x.dtype
    h, _, kept = output
    # nobody differentiates `kept`: no zeros of its size
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(U, h0, c0, vectors, h, kept)


def _differentiate(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    U, h0, c0, vectors, h, kept = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    grad_c = torch.zeros_like(c0) if grad_c is None else grad_c
    grads = run_backward(grad_h, grad_c, U, h0, c0, vectors, h, kept, ctx.cell, ctx.x_dtype, ctx.triton)
    return *grads, None, None, None


run = register_autograd(run, _differentiate, _save)


@register_flop_formula(torch.ops.lra.recurrent_cell, get_raw=True)
def _flops(x: Tensor, U: Tensor, *_: Any, **__: Any) -> int:
    """The products with U, as PyTorch counts its own recurrent layers; 4 per element where U is diagonal."""
    return (2 if U.ndim == 2 else 4) * x.shape[0] * x.shape[1] * U.numel()


@register_flop_formula(torch.ops.lra.recurrent_cell_backward, get_raw=True)
def _backward_flops(grad: Tensor, grad_c: Tensor, U: Tensor, *_: Any, **__: Any) -> int:
    return 4 * grad.shape[0] * grad.shape[1] * U.numel()
