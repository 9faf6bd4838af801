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
        c0_, peephole_ = _array(c0, dtype), _array(peephole, dtype)
        over_rows(cpu.lstm_forward, batch, x_, pack(U.T).numpy(), b_, peephole_, h0_, c0_, h_, c_last.numpy(), room_)
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
    dtype = kept.dtype
    U, h0, c0, h = (t.detach().to(dtype).contiguous() for t in (U, h0, c0, h))
    grad_x = torch.empty(batch, length, len(U) // width if U.ndim == 2 else 1, width, dtype=dtype)
    grad_h0, grad_c0, grad_peephole = torch.empty_like(h0), torch.zeros_like(c0), torch.zeros(peephole.shape, dtype=dtype)
    grad_h_, h_, h0_, kept_, to_x, to_h0 = (_array(t, dtype) for t in (grad_h, h, h0, kept, grad_x, grad_h0))
    before = torch.cat((h0.unsqueeze(1), h[:, :-1]), dim=1)
    if cell == "indrnn":
        # a sum over every step: in double precision, to keep the digits
        grad_u = torch.zeros(batch, width, dtype=torch.float64)
        over_rows(cpu.indrnn_backward, batch, grad_h_, h_, U.numpy(), h0_, to_x, to_h0, grad_u.numpy())
        to_b = grad_x.sum((0, 1, 2))
        return grad_x[:, :, 0], grad_u.sum(0).to(dtype), to_b, grad_h0, grad_c0, grad_peephole
    if cell in ("elman", "elman_relu"):
        over_rows(cpu.elman_backward, batch, grad_h_, h_, pack(U).numpy(), to_x, to_h0, cell == "elman_relu")
    elif cell in ("lstm", "lstm_coupled"):
        c0_, peephole_ = c0.numpy(), _array(peephole, dtype)
        over_rows(
            cpu.lstm_backward, batch, grad_h_, _array(grad_c, dtype), kept_, pack(U).numpy(), peephole_, c0_, to_x,
            to_h0, grad_c0.numpy(),
        )  # fmt: skip
        c_before = torch.cat((c0.unsqueeze(1), kept[:, :-1, 4]), dim=1)
        grad_peephole[:-1] = torch.einsum("blgh,blh->gh", grad_x[:, :, : len(peephole) - 1], c_before)
        grad_peephole[-1] = torch.einsum("blh,blh->h", grad_x[:, :, -1], kept[:, :, 4])
    elif cell in ("gru", "gru_coupled"):
        over_rows(cpu.gru_backward, batch, grad_h_, h_, kept_, pack(U).numpy(), h0_, to_x, to_h0)
    elif cell == "rhn":
        layers = torch.stack([pack(u) for u in U.split(2 * width)])
        over_rows(cpu.rhn_backward, batch, grad_h_, h_, kept_, layers.numpy(), h0_, to_x, to_h0)
    else:
        gates, candidate = pack(U[:-width]).numpy(), pack(U[-width:]).numpy()
        over_rows(cpu.reset_first_backward, batch, grad_h_, h_, kept_, gates, candidate, h0_, to_x, to_h0)
    grad_U, grad_b = _of_weights(grad_x, before, kept, cell)
    inputs = 2 if cell == "rhn" else grad_x.shape[2]
    return grad_x[:, :, :inputs].reshape(batch, length, -1), grad_U, grad_b, grad_h0, grad_c0, grad_peephole


def _of_weights(delta: Tensor, before: Tensor, kept: Tensor, cell: str) -> tuple[Tensor, Tensor]:
    """Gradients of U and b from those of the pre-activations (B, L, G, H) and the states (B, L, H) before each step."""
    _, _, gates, width = delta.shape
    seen = [before] * gates
    if cell in ("gru", "gru_coupled"):
        # the candidate's product is scaled by r after U and b
        delta = delta.clone()
        delta[:, :, -1] *= kept[:, :, 0]
    elif cell in ("gru_reset_first", "mgu"):
        seen[-1] = kept[:, :, 0] * before
    elif cell == "rhn":
        for layer in range(1, gates // 2):
            candidate, transform = kept[:, :, 2 * layer - 2], kept[:, :, 2 * layer - 1]
            before = before + transform * (candidate - before)
            seen[2 * layer] = seen[2 * layer + 1] = before
    grad_U = torch.empty(gates, width, width, dtype=delta.dtype)
    groups = [list(group) for group in _runs(seen)]
    for first, last in groups:
        part = delta[:, :, first:last].reshape(-1, (last - first) * width)
        grad_U[first:last] = (part.T @ seen[first].reshape(-1, width)).view(-1, width, width)
    return grad_U.flatten(0, 1), delta.sum((0, 1)).flatten()
