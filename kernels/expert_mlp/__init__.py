"""Mixture of experts: applies to every token the two-layer perceptrons that it was routed to, grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.expert_mlp.cpu import run
from lra.kernels.expert_mlp.reference import ACTIVATIONS, reference

__all__ = ["expert_mlp"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = True


def expert_mlp(
    x: Tensor,
    expert_index: Tensor,
    gate: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    activation: str = "gelu",
    impl: str = "auto",
) -> Tensor:
    """y_t = sum_j gate_tj * act(x_t w1_e) w2_e with e = expert_index_tj, over the k experts of token t.

    x: (T, D); expert_index: (T, k) int64, 0 to E - 1, or -1 for a dropped choice, which adds nothing (a token with no
    choice left comes out as 0, and its gates get no gradient); gate: (T, k); w1: (E, D, F); w2: (E, F, D_out).
    activation: "gelu" (with erf), "relu", or "swiglu", silu(p_1) p_2 of the halves of p = x w1_e, with w1: (E, D, 2 F).
    Returns y: (T, D_out).

    Dtypes promote; under autocast float32 arguments take its dtype, as in a linear layer. Deterministic: choices are
    sorted by expert, each expert is one matrix product of its own tokens, no atomics. Work 2 F (D + D_out) per choice
    that is not dropped, 2 F (2 D + D_out) with "swiglu" (the FLOP counter, which sees shapes only, counts all T k); an
    expert without tokens costs nothing and gets zero gradients. Memory T k (F + D). On a GPU nothing is read back, so
    that a wrong index there is a device-side assertion.
    Raises ValueError on a wrong rank, shape, dtype, index, activation or mix of devices, and where T or D is 0.
    """
    op = "expert_mlp"
    device = check_tensors(op, x=x, gate=gate, w1=w1, w2=w2)
    for name, t in {"x": x, "gate": gate, "w1": w1, "w2": w2}.items():
        check(not t.is_complex(), op, name, t.dtype, "a real dtype")
    check(x.ndim == 2 and x.numel() > 0, op, "x", tuple(x.shape), "(T, D) with T > 0 and D > 0")
    tokens, width = x.shape
    known = expert_index.dtype == torch.int64 and expert_index.device == device
    check(known, op, "expert_index", f"{expert_index.dtype} on {expert_index.device}", f"int64 on {device}")
    fits = expert_index.ndim == 2 and expert_index.shape[0] == tokens and expert_index.numel() > 0
    check(fits, op, "expert_index", tuple(expert_index.shape), f"({tokens}, k) with k > 0")
    check(gate.shape == expert_index.shape, op, "gate", tuple(gate.shape), str(tuple(expert_index.shape)))
    check(w1.ndim == 3 and w1.shape[1] == width and w1.numel() > 0, op, "w1", tuple(w1.shape), f"(E, {width}, F)")
    check(activation in ACTIVATIONS, op, "activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    parts = 2 if activation == "swiglu" else 1
    check(w1.shape[2] % parts == 0, op, "w1", tuple(w1.shape), f"(E, {width}, 2 F)")
    hidden = w1.shape[2] // parts
    fits = w2.ndim == 3 and w2.shape[:2] == (w1.shape[0], hidden) and w2.numel() > 0
    check(fits, op, "w2", tuple(w2.shape), f"({w1.shape[0]}, {hidden}, D_out)")
    dtype = x.dtype
    for tensor in (gate, w1, w2):
        dtype = torch.promote_types(dtype, tensor.dtype)
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU and dtype != torch.float64)
    x, gate, w1, w2 = (t.to(dtype) for t in (x, gate, w1, w2))
    if chosen == "reference":
        return reference(x, expert_index, gate, w1, w2, activation=activation)
    return run(x, expert_index, gate, w1, w2, activation, chosen == "gpu")[0]
