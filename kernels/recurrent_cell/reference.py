"""The definition of `recurrent_cell`: a loop over time, the equations of one step for each cell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

EPSILON = 1e-5


def reference(
    x_gates: Tensor,
    U: Tensor,
    b: Tensor | None,
    cell: str,
    h0: Tensor | None = None,
    *,
    c0: Tensor | None = None,
    peephole: Tensor | None = None,
    norm: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Arguments and result as `recurrent_cell`."""
    width = U.shape[-1] if U.ndim == 2 else len(U)
    h = x_gates.new_zeros(len(x_gates), width) if h0 is None else h0
    c = torch.zeros_like(h) if c0 is None else c0
    b = U.new_zeros(len(U)) if b is None else b
    outputs = []
    for x in x_gates.unbind(1):
        if norm is not None:
            h, c = lstm_layernorm(x, h, c, U, b, norm, cell.endswith("carried"))
        elif cell.startswith("lstm"):
            h, c = lstm(x, h, c, U, b, peephole, "coupled" in cell)
        else:
            h = CELLS[cell](x, h, U, b)
        outputs.append(h)
    y = torch.stack(outputs, dim=1)
    if not return_state:
        return y
    return (y, h, c) if cell.startswith("lstm") else (y, h)


def elman(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x + h @ U.T + b)


def elman_relu(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    return torch.relu(x + h @ U.T + b)


def indrnn(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    return torch.relu(x + U * h + b)


def gru(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    u_r, u_z, u_n = (h @ U.T + b).chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + r * u_n)
    return z * h + (1 - z) * n


def gru_coupled(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    x_z, x_n = x.chunk(2, dim=-1)
    u_z, u_n = (h @ U.T + b).chunk(2, dim=-1)
    z = torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + (1 - z) * u_n)
    return z * h + (1 - z) * n


def gru_reset_first(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    (x_r, x_z, x_n), (U_r, U_z, U_n), (b_r, b_z, b_n) = x.chunk(3, dim=-1), U.chunk(3), b.chunk(3)
    r, z = torch.sigmoid(x_r + h @ U_r.T + b_r), torch.sigmoid(x_z + h @ U_z.T + b_z)
    n = torch.tanh(x_n + (r * h) @ U_n.T + b_n)
    return z * h + (1 - z) * n


def mgu(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    (x_f, x_n), (U_f, U_n), (b_f, b_n) = x.chunk(2, dim=-1), U.chunk(2), b.chunk(2)
    f = torch.sigmoid(x_f + h @ U_f.T + b_f)
    n = torch.tanh(x_n + (f * h) @ U_n.T + b_n)
    return (1 - f) * h + f * n


def rhn(x: Tensor, h: Tensor, U: Tensor, b: Tensor) -> Tensor:
    depth = len(U) // x.shape[-1]
    for layer, (u, bias) in enumerate(zip(U.chunk(depth), b.chunk(depth), strict=True)):
        s = h @ u.T + bias
        candidate, transform = (s + x if layer == 0 else s).chunk(2, dim=-1)
        t = torch.sigmoid(transform)
        h = t * torch.tanh(candidate) + (1 - t) * h
    return h


def lstm(
    x: Tensor, h: Tensor, c: Tensor, U: Tensor, b: Tensor, peephole: Tensor | None, coupled: bool
) -> tuple[Tensor, Tensor]:
    i, *f, g, o = (x + h @ U.T + b).chunk(3 if coupled else 4, dim=-1)
    p_i, *p_f, p_o = U.new_zeros(3 - coupled, h.shape[-1]) if peephole is None else peephole
    i = torch.sigmoid(i + p_i * c)
    forget = 1 - i if coupled else torch.sigmoid(f[0] + p_f[0] * c)
    c = forget * c + i * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


def lstm_layernorm(
    x: Tensor, h: Tensor, c: Tensor, U: Tensor, b: Tensor, norm: Tensor, carried: bool
) -> tuple[Tensor, Tensor]:
    s = x + layer_norm(h @ U.T, (len(U),), norm[:4].flatten(), b, EPSILON)
    i, f, g, o = s.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    shown = layer_norm(c, c.shape[1:], norm[4], norm[5], EPSILON)
    return torch.sigmoid(o) * torch.tanh(shown), shown if carried else c


CELLS = {
    "elman": elman,
    "elman_relu": elman_relu,
    "indrnn": indrnn,
    "gru": gru,
    "gru_coupled": gru_coupled,
    "gru_reset_first": gru_reset_first,
    "mgu": mgu,
    "rhn": rhn,
}
