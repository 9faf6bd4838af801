"""Recurrent networks whose state passes through a nonlinearity at every step, as one loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.recurrent_cell.operator import run
from lra.kernels.recurrent_cell.reference import reference

__all__ = ["recurrent_cell"]

DETERMINISTIC = True
PORTABLE = False
HAS_GPU = True
WIDEST_ON_GPU = 128  # units per layer that the Triton kernel holds; wider dense cells take the reference there

GATES = {
    "elman": 1, "elman_relu": 1, "indrnn": 1, "lstm": 4, "lstm_coupled": 3, "gru": 3, "gru_coupled": 2,
    "gru_reset_first": 3, "mgu": 2, "rhn": 2, "lstm_layernorm": 4, "lstm_layernorm_carried": 4,
}  # fmt: skip


def recurrent_cell(
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
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """h_t = cell(x_t, h_{t-1}) for t = 1..L, with h_0 = `h0` (zeros where None).

    x_gates: (B, L, G * H), what the input adds to each of G gates (one matrix product over all steps, made before);
    U: (G * H, H), recurrent weights, gates stacked in the order given below; b: (G * H,) or None, beside U h.

    cell (gates in order)     equations of one step
    elman                     h = tanh(x + U h + b)
    elman_relu                h = relu(x + U h + b)
    indrnn                    h = relu(x + U * h + b), U: (H,)
    lstm (i f g o)            i, f, o = sigmoid, g = tanh of x + U h + b;  c = f * c + i * g;  h = o * tanh(c)
    lstm_coupled (i g o)      the same with f = 1 - i
    lstm_layernorm (i f g o)  i, f, o = sigmoid, g = tanh of x + n(U h) + b;  c = f * c + i * g;  h = o * tanh(n(c))
    lstm_layernorm_carried    the same, and c is n(c) from then on
    gru (r z n)               r, z = sigmoid(x + U h + b);  n = tanh(x + r * (U h + b));  h = z * h + (1 - z) * n
    gru_coupled (z n)         the same with r = 1 - z
    gru_reset_first (r z n)   gru with n = tanh(x + U (r * h) + b)
    mgu (f n)                 f = sigmoid(x + U h + b);  n = tanh(x + U (f * h) + b);  h = (1 - f) * h + f * n
    rhn (a t)                 depth times: a = tanh, t = sigmoid of U_d h + b_d (+ x if d = 1);  h = t * a + (1 - t) * h
                              U: (depth * 2 * H, H), b: (depth * 2 * H,), layer after layer

    c0: (B, H), first c of an lstm. peephole: (3, H) for lstm, (2, H) for lstm_coupled: p_i, p_f (not where coupled) and
    p_o; i and f then also see p * c of the step before, o sees p_o * c of its own step (Gers and Schmidhuber 2000).
    norm: (6, H) for lstm_layernorm: n divides what is left of the mean by the deviation (biased, plus 1e-5 in the
    variance), over the 4 H numbers of U h and the H of c; rows 0 to 3 are the gains of i, f, g, o in n(U h), whose
    offset is b, rows 4 and 5 gain and offset of n(c). The input's own norm is taken before (Ba, Kiros and Hinton 2016).
    All of one device; dtypes promote; bfloat16 and float16 run in float32, but the gradient of U, summed over steps, is
    a product of bfloat16 numbers where x_gates is bfloat16.
    Returns h: (B, L, H); with `return_state` also the last h (B, H) and, of an lstm, the last c (B, H).

    lstm and gru are those of torch.nn with `x_gates` = x W_ih^T + b_ih. Deterministic. Work 2 B L U.numel(), one step
    after the other; the backward keeps at most 5 numbers per step and unit (rhn: 2 D, lstm_layernorm: 11)
    beside h.
    Raises ValueError on an unknown cell, a wrong rank, shape, dtype or mix of devices, and on length 0.
    """
    op = "recurrent_cell"
    check(cell in GATES, op, "cell", repr(cell), f"one of {', '.join(GATES)}")
    device = check_tensors(op, x_gates=x_gates, U=U, b=b, h0=h0, c0=c0, peephole=peephole, norm=norm)
    gates, is_lstm = GATES[cell], cell.startswith("lstm")
    fits = x_gates.ndim == 3 and x_gates.shape[1] > 0 and x_gates.shape[2] % gates == 0 and x_gates.numel() > 0
    check(fits, op, "x_gates", tuple(x_gates.shape), f"(B, L, {gates} * H) with L > 0 for {cell}")
    batch, width = x_gates.shape[0], x_gates.shape[2] // gates
    normed = cell.startswith("lstm_layernorm")
    check(not normed or width > 1, op, "x_gates", tuple(x_gates.shape), f"(B, L, 4 * H) with H > 1 for {cell}")
    if cell == "indrnn":
        check(U.shape == (width,), op, "U", tuple(U.shape), f"({width},)")
    elif cell == "rhn":
        fits = U.ndim == 2 and len(U) > 0 and len(U) % (2 * width) == 0 and U.shape[1] == width
        check(fits, op, "U", tuple(U.shape), f"(depth * {2 * width}, {width})")
    else:
        check(U.shape == (gates * width, width), op, "U", tuple(U.shape), f"({gates * width}, {width})")
    check(not normed or norm is not None, op, "norm", None, f"(6, {width}) for {cell}")
    peeps = (gates - 1, width) if is_lstm and not normed else None
    for name, tensor, shape in (
        ("b", b, U.shape[:1]), ("h0", h0, (batch, width)), ("c0", c0, (batch, width) if is_lstm else None),
        ("peephole", peephole, peeps), ("norm", norm, (6, width) if normed else None),
    ):  # fmt: skip
        fits = tensor is None or tensor.shape == shape
        check(fits, op, name, tensor is None or tuple(tensor.shape), str(tuple(shape)) if shape else f"None for {cell}")
    dtype = x_gates.dtype
    for tensor in (U, b, h0, c0, peephole, norm):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    on_gpu = dtype != torch.float64 and (cell == "indrnn" or width <= WIDEST_ON_GPU)
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU and on_gpu)

    def filled(tensor: Tensor | None, *shape: int) -> Tensor:
        return x_gates.new_zeros(shape, dtype=dtype) if tensor is None else tensor.to(dtype)

    x, u, bias, h0 = x_gates, U.to(dtype), filled(b, len(U)), filled(h0, batch, width)
    if chosen == "reference":
        return reference(x.to(dtype), u, bias, cell, h0, c0=c0, peephole=peephole, norm=norm, return_state=return_state)
    # the operator takes empty tensors for what a cell does not have
    c0 = filled(c0, batch, width) if is_lstm else x.new_empty(0)
    vectors = filled(norm if normed else peephole, 0)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, u, bias, h0, c0, vectors))
    h, c, _ = run(x, u, bias, h0, c0, vectors, cell, keep, chosen == "gpu")
    if not return_state:
        return h
    return (h, h[:, -1], c) if is_lstm else (h, h[:, -1])
