"""`expert_mlp` as a PyTorch operator: choices sorted by expert, then one matrix product per expert on its slice, in
plain torch on any device, or all of them in one Triton launch.

Backward, for the gradient y' of one choice with h = act(p), p = x w1: b = y' w2^T gives the gate's gradient h . b, then
p' = gate b act'(p); x' = p' w1^T, w1' = x^T p', w2' = h^T (gate y').
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels.expert_mlp.reference import ACTIVATIONS


def _grouped(a: Tensor, w: Tensor, ends: Tensor, triton: bool) -> Tensor:
    """Rows of `a`, sorted by expert, times the matrix of their expert; `ends` (E,): where the rows of each stop. Rows
    past the last end belong to no expert and come out as 0."""
    if triton:
        from lra.kernels.expert_mlp import gpu

        return gpu.grouped(a, w, ends)
    out = a.new_zeros(len(a), w.shape[2])
    for e, start, stop in _slices(ends):
        torch.mm(a[start:stop], w[e], out=out[start:stop])
    return out


def _outer(a: Tensor, b: Tensor, ends: Tensor, triton: bool) -> Tensor:
    """a^T b over the rows of each expert: (E, K, N)."""
    if triton:
        from lra.kernels.expert_mlp import gpu

        return gpu.outer(a, b, ends)
    out = a.new_zeros(len(ends), a.shape[1], b.shape[1])
    for e, start, stop in _slices(ends):
        torch.mm(a[start:stop].T, b[start:stop], out=out[e])
    return out


def _slices(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, stop); experts without rows are left out."""
    stops = ends.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *stops], stops, strict=False)) if a < b]


def _activation_backward(back: Tensor, p: Tensor, activation: str) -> Tensor:
    """Gradient of p from that of its activation."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(back, p)
    if activation == "relu":
        return back * (p > 0)
    gate, up = p.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(back * up, gate), back * F.silu(gate)], dim=-1)


@torch.library.custom_op("lra::expert_mlp", mutates_args=())
def run(
    x: Tensor, expert_index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, activation: str, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the backward p = x w1 (T k, F, or 2 F) in sorted order, the order (T k,), dropped choices last, and
    ends (E,)."""
    experts, choices = len(w1), expert_index.shape[1]
    expert = torch.where(expert_index < 0, experts, expert_index).flatten()
    order = expert.argsort(stable=True)
    ends = torch.searchsorted(expert[order], torch.arange(experts, device=x.device), right=True)
    if triton:
        # nothing is read back: dropped choices are rows of no expert, which the kernels leave 0
        known = ((expert_index >= -1) & (expert_index < experts)).all()
        torch._assert_async(known, f"expert_mlp: expert_index; expected -1 (dropped) to {experts - 1}")
        p = _grouped(x[order // choices], w1, ends, triton)
        out = _grouped(ACTIVATIONS[activation](p), w2, ends, triton) * gate.flatten()[order].unsqueeze(1)
        y = torch.empty_like(out).index_copy_(0, order, out)
        return y.view(len(x), choices, -1).sum(1), p, order, ends
    lowest, highest, kept = torch.stack([*expert_index.aminmax(), ends[-1]]).tolist()
    if lowest < -1 or highest >= experts:
        wrong = lowest if lowest < -1 else highest
        raise ValueError(f"expert_mlp: expert_index is {wrong} somewhere; expected -1 (dropped) to {experts - 1}")
    mine = order[:kept]
    p = x.new_zeros(len(order), w1.shape[2])
    p[:kept] = _grouped(x[mine // choices], w1, ends, triton)
    out = _grouped(ACTIVATIONS[activation](p[:kept]), w2, ends, triton)
    y = x.new_zeros(len(order), w2.shape[2])
    # each choice has a row of its own, summed over k: no two writes meet
    y[mine] = out * gate.flatten()[mine].unsqueeze(1)
    return y.view(len(x), choices, -1).sum(1), p, order, ends


@run.register_fake
def _(
    x: Tensor, expert_index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, activation: str, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = expert_index.new_empty(expert_index.numel())
    p = x.new_empty(expert_index.numel(), w1.shape[2])
    # not len(), which would tie a traced graph to one batch and length
    return x.new_empty(x.shape[0], w2.shape[2]), p, order, expert_index.new_empty(w1.shape[0])


@torch.library.custom_op("lra::expert_mlp_backward", mutates_args=())
def run_backward(
    grad: Tensor, x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, p: Tensor, order: Tensor, ends: Tensor,
    activation: str, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate, w1 and w2."""
    choices, kept = gate.shape[1], len(order) if triton else int(ends[-1])
    mine = order[:kept]
    token, p, share = mine // choices, p[:kept], gate.flatten()[mine].unsqueeze(1)
    given, h = grad[token], ACTIVATIONS[activation](p)
    back = _grouped(given, w2.mT, ends, triton)
    to_gate, to_x = gate.new_zeros(gate.numel()), x.new_zeros(len(order), x.shape[1])
    to_gate[mine] = (h * back).sum(1)
    to_w2 = _outer(h, share * given, ends, triton)
    back = share * back
    to_p = _activation_backward(back, p, activation)
    to_w1 = _outer(x[token], to_p, ends, triton)
    to_x[mine] = _grouped(to_p, w1.mT, ends, triton)
    return to_x.view(len(x), choices, -1).sum(1), to_gate.view(gate.shape), to_w1, to_w2


@run_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, p: Tensor, order: Tensor, ends: Tensor,
    activation: str, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (x, gate, w1, w2))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, gate, w1, w2, ctx.activation, ctx.triton = inputs
    _, p, order, ends = output
    # nobody differentiates p: no zeros of its size
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, w1, w2, p, order, ends)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    to_x, to_gate, to_w1, to_w2 = run_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.triton)
    return to_x, None, to_gate, to_w1, to_w2, None, None


run = register_autograd(run, _differentiate, _save)


@register_flop_formula(torch.ops.lra.expert_mlp)
def _flops(x: Any, expert_index: Any, gate: Any, w1: Any, w2: Any, *_: Any, **__: Any) -> int:
    """Both products, for every choice: how many were dropped does not show in the shapes."""
    tokens, choices = expert_index
    return 2 * tokens * choices * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.lra.expert_mlp_backward)
def _backward_flops(grad: Any, x: Any, gate: Any, w1: Any, w2: Any, *_: Any, **__: Any) -> int:
    tokens, choices = gate
    return 4 * tokens * choices * (w1[1] * w1[2] + w2[1] * w2[2])
