"""`recurrent_cell` as a PyTorch operator around its compiled loops.

The loops return the gradient of every pre-activation; those of the weights follow from them in one matrix product over
all rows and steps, after the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._threads import over_rows
from lra.kernels.recurrent_cell import cpu
from lra.kernels.recurrent_cell.product import pack

KEPT = {"lstm": 5, "lstm_coupled": 5, "gru": 4, "gru_coupled": 4, "gru_reset_first": 3, "mgu": 3}
"""Numbers per step and unit that the backward needs beside h."""


def _kept_shape(x: Tensor, U: Tensor, h0: Tensor, cell: str, keep: bool) -> tuple[int, int, int, int]:
    width = h0.shape[1]
    numbers = len(U) // width if cell == "rhn" else KEPT.get(cell, 0)
    return (len(x), x.shape[1] if keep else 0, numbers, width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _array(t: Tensor, dtype: torch.dtype) -> Any:
    return t.detach().to(dtype).contiguous().numpy()


def _peepholes(peephole: Tensor, U: Tensor) -> Tensor:
    """Those given, or zeros."""
    width = U.shape[1]
    return peephole.to(U.dtype).contiguous() if peephole.numel() else U.new_zeros(len(U) // width - 1, width)


@torch.library.custom_op("lra::recurrent_cell", mutates_args=())
def run(
    x: Tensor, U: Tensor, b: Tensor, h0: Tensor, c0: Tensor, peephole: Tensor, cell: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last c of an lstm (else empty), and what the backward needs (without `keep`: nothing)."""
    batch, length, _ = x.shape
    width, dtype = h0.shape[1], _wide(x.dtype)
    h, c_last = torch.empty(batch, length, width, dtype=dtype), torch.empty(c0.shape, dtype=dtype)
    kept = torch.empty(_kept_shape(x, U, h0, cell, keep), dtype=dtype)
    # what is not kept has room for one step
    room = kept if keep else torch.empty(batch, 1, *kept.shape[2:], dtype=dtype)
    U = U.detach().to(dtype)
    x_, b_ = _array(x, dtype).reshape(batch, length, -1, width), _array(b, dtype).reshape(-1, width)
    h0_, h_, room_ = _array(h0, dtype), h.numpy(), room.numpy()
    if cell in ("elman", "elman_relu"):
        over_rows(cpu.elman_forward, batch, x_, pack(U.T).numpy(), b_, h0_, h_, cell == "elman_relu")
    elif cell == "indrnn":
        over_rows(cpu.indrnn_forward, batch, x_, _array(U, dtype), b_, h0_, h_)
    elif cell in ("lstm", "lstm_coupled"):
        p, c0_ = _peepholes(peephole, U).numpy(), _array(c0, dtype)
        over_rows(cpu.lstm_forward, batch, x_, pack(U.T).numpy(), b_, p, h0_, c0_, h_, c_last.numpy(), room_)
    elif cell in ("gru", "gru_coupled"):
        over_rows(cpu.gru_forward, batch, x_, pack(U.T).numpy(), b_, h0_, h_, room_)
    elif cell == "rhn":
        layers = torch.stack([pack(u.T) for u in U.split(2 * width)])
        over_rows(cpu.rhn_forward, batch, x_, layers.numpy(), b_, h0_, h_, room_)
    else:
        gates, candidate = (pack(u.T).numpy() for u in (U[:-width], U[-width:]))
        over_rows(cpu.reset_first_forward, batch, x_, gates, candidate, b_, h0_, h_, room_)
    return h.to(x.dtype), c_last.to(x.dtype), kept


@run.register_fake
def _(
    x: Tensor, U: Tensor, b: Tensor, h0: Tensor, c0: Tensor, peephole: Tensor, cell: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(_kept_shape(x, U, h0, cell, keep), dtype=_wide(x.dtype))
    return x.new_empty(len(x), x.shape[1], h0.shape[1]), x.new_empty(c0.shape), kept


@torch.library.custom_op("lra::recurrent_cell_backward", mutates_args=())
def run_backward(
    grad_h: Tensor, grad_c: Tensor, U: Tensor, h0: Tensor, c0: Tensor, peephole: Tensor, h: Tensor, kept: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, U, b, h0, c0 and peephole."""
    batch, length, width = h.shape
    dtype, given = kept.dtype, h.dtype
    U, h0, c0, h, peephole = (t.detach().to(dtype).contiguous() for t in (U, h0, c0, h, peephole))
    delta = torch.empty(batch, length, len(U) // width, width, dtype=dtype)  # by pre-activation
    grad_h0, grad_c0, grad_p = torch.empty_like(h0), torch.empty_like(c0), torch.empty_like(peephole)
    y, kept_, h_, h0_ = _array(grad_h, dtype), kept.detach().numpy(), h.numpy(), h0.numpy()
    written = delta.numpy(), grad_h0.numpy()
    if cell == "indrnn":
        # sums over every step: in double precision, to keep the digits
        to_u, to_b = torch.zeros(2, batch, width, dtype=torch.float64)
        over_rows(cpu.indrnn_backward, batch, y, h_, U.numpy(), h0_, *written, to_u.numpy(), to_b.numpy())
    elif cell in ("elman", "elman_relu"):
        over_rows(cpu.elman_backward, batch, y, h_, pack(U).numpy(), *written, cell == "elman_relu")
    elif cell in ("lstm", "lstm_coupled"):
        of_cell = _array(grad_c, dtype), kept_, pack(U).numpy(), _peepholes(peephole, U).numpy(), c0.numpy()
        over_rows(cpu.lstm_backward, batch, y, *of_cell, *written, grad_c0.numpy())
        if peephole.numel():
            c = torch.cat((c0.unsqueeze(1), kept[:, :, 4]), dim=1)
            for row, gate in enumerate((0, 1, -1) if len(peephole) == 3 else (0, -1)):
                seen = c[:, 1:] if gate == -1 else c[:, :-1]
                grad_p[row] = (delta[:, :, gate] * seen).sum((0, 1))
    elif cell in ("gru", "gru_coupled"):
        over_rows(cpu.gru_backward, batch, y, h_, kept_, pack(U).numpy(), h0_, *written)
    elif cell == "rhn":
        layers = torch.stack([pack(u) for u in U.split(2 * width)])
        over_rows(cpu.rhn_backward, batch, y, h_, kept_, layers.numpy(), h0_, *written)
    else:
        gates, candidate = (pack(u).numpy() for u in (U[:-width], U[-width:]))
        over_rows(cpu.reset_first_backward, batch, y, h_, kept_, gates, candidate, h0_, *written)
    grad_x = (delta[:, :, :2] if cell == "rhn" else delta).flatten(2).contiguous()
    if cell == "indrnn":
        grad_U, grad_b = to_u.sum(0), to_b.sum(0)
    else:
        grad_U, grad_b = _of_weights(delta, h0, h, kept, cell)
    return tuple(t.to(given) for t in (grad_x, grad_U, grad_b, grad_h0, grad_c0, grad_p))  # type: ignore[return-value]


def _of_weights(delta: Tensor, h0: Tensor, h: Tensor, kept: Tensor, cell: str) -> tuple[Tensor, Tensor]:
    """Gradients of U and b from those of the pre-activations, `delta` (B, L, G, H)."""
    before = torch.cat((h0.unsqueeze(1), h[:, :-1]), dim=1)
    to_product, seen = list(delta.unbind(2)), [before] * delta.shape[2]
    if cell in ("gru", "gru_coupled"):
        to_product[-1] = to_product[-1] * kept[:, :, 0]  # r scales the candidate's product
    elif cell in ("gru_reset_first", "mgu"):
        seen[-1] = kept[:, :, 0] * before
    elif cell == "rhn":
        for layer in range(1, len(seen) // 2):
            candidate, transform = kept[:, :, 2 * layer - 2], kept[:, :, 2 * layer - 1]
            before = before + transform * (candidate - before)
            seen[2 * layer] = seen[2 * layer + 1] = before
    parts = [(g.flatten(0, 1), v.flatten(0, 1)) for g, v in zip(to_product, seen, strict=True)]
    return torch.cat([g.T @ v for g, v in parts]), torch.cat([g.sum(0) for g, _ in parts])


@run_backward.register_fake
def _(
    grad_h: Tensor, grad_c: Tensor, U: Tensor, h0: Tensor, c0: Tensor, peephole: Tensor, h: Tensor, kept: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gates = 2 if cell == "rhn" else len(U) // h.shape[2]
    grad_x = h.new_empty(len(h), h.shape[1], gates * h.shape[2])
    of_rest = (h.new_empty(t.shape) for t in (U, U[..., 0] if U.ndim == 2 else U, h0, c0, peephole))
    return grad_x, *of_rest  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, U, _, h0, c0, peephole, ctx.cell, _ = inputs
    h, _, kept = output
    # nobody differentiates `kept`: no zeros of its size
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(U, h0, c0, peephole, h, kept)


def _differentiate(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    U, h0, c0, peephole, h, kept = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    grad_c = torch.zeros_like(c0) if grad_c is None else grad_c
    return *run_backward(grad_h, grad_c, U, h0, c0, peephole, h, kept, ctx.cell), None, None


run.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.lra.recurrent_cell, get_raw=True)
def _flops(x: Tensor, U: Tensor, *_: Any, **__: Any) -> int:
    """The products with U, as PyTorch counts its own recurrent layers; 4 per element where U is diagonal."""
    return (2 if U.ndim == 2 else 4) * x.shape[0] * x.shape[1] * U.numel()


@register_flop_formula(torch.ops.lra.recurrent_cell_backward, get_raw=True)
def _backward_flops(grad: Tensor, grad_c: Tensor, U: Tensor, *_: Any, **__: Any) -> int:
    return 4 * grad.shape[0] * grad.shape[1] * U.numel()
