"""band_attention in plain torch on any device: per tile of queries one product with the stretch of keys it can see.

Forward and backward form a tile's scores anew; nothing wider than a tile is laid out. With `gpu` the band itself is
left to the Triton kernels of gpu.py; global and random keys join it by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels.band_attention.passes import backward, forward, global_backward, global_forward
from lra.kernels.band_attention.scores import Inputs
from lra.kernels.band_attention.tiles import HIDDEN, Pattern, pairs


@torch.library.custom_op("lra::band_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None, random_blocks: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, behind: int, ahead: int, dilation: Sequence[int], block: int,
    causal: bool, mutual: bool, scale: float, dropout: float, gpu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, L, H, V) and log-sum-exp (B, L, H, 1) of the scores. positions: (B, G), -1 after the last; seed: a
    number, where there is dropout."""
    pattern = Pattern(behind, ahead, dilation, block, causal, band=not gpu)
    x = Inputs(q, k, v, mask, positions, random_blocks, slopes, pattern, scale, seed, dropout)
    if gpu:
        from lra.kernels.band_attention.gpu import band_forward

        out, lse = band_forward(q, k, v, x.seen & ~x.is_global, pattern, scale)
        if x.extra:
            out, lse = _joined(out, lse, *(t[:, : x.length] for t in forward(x)))
    else:
        out, lse = forward(x)
    if positions is not None and mutual:
        global_forward(x, out, lse)
    return out[:, : x.length].to(q.dtype).contiguous(), lse[:, : x.length].contiguous()


def _joined(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each."""
    top = torch.maximum(lse, more_lse)
    one, two = (lse - top).exp(), (more_lse - top).exp()
    return (one * out + two * more) / (one + two), top + (one + two).log()


@torch.library.custom_op("lra::band_attention_backward", mutates_args=())
def attend_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    positions: Tensor | None, random_blocks: Tensor | None, slopes: Tensor | None, seed: Tensor | None,
    behind: int, ahead: int, dilation: Sequence[int], block: int, causal: bool, mutual: bool, scale: float,
    dropout: float, gpu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pattern = Pattern(behind, ahead, dilation, block, causal, band=not gpu)
    x = Inputs(q, k, v, mask, positions, random_blocks, slopes, pattern, scale, seed, dropout)
    # rows that see nothing stand still; the log-sum-exp that makes exp(score - lse) 0 in them
    empty = lse < HIDDEN / 2
    dout, lse = dout.to(x.work).masked_fill(empty, 0), lse.masked_fill(empty, -HIDDEN)
    delta = (dout * out.to(x.work)).sum(-1, keepdim=True)
    if gpu:
        from lra.kernels.band_attention.gpu import band_backward

        alone = x.is_global[..., None, None] & mutual
        given = dout.masked_fill(alone, 0), lse, delta.masked_fill(alone, 0)
        band_grads = band_backward(*given, q, k, v, x.seen & ~x.is_global, pattern, scale)
        if not x.extra:
            dq, dk, dv = (g.to(t.dtype) for g, t in zip(band_grads, (q, k, v), strict=True))
            return dq, dk, dv
    missing = -x.length % block
    dout, lse, delta = (pad(t, (0, 0, 0, 0, 0, missing)) if missing else t for t in (dout, lse, delta))
    grads = tuple(x.zeros(t.shape[-1]) for t in (q, k, v))
    if gpu:
        for total, part in zip(grads, band_grads, strict=True):
            total[:, : x.length] += part
    if positions is None or not mutual:
        backward(x, dout, lse, delta, grads)
    else:
        chosen = pad(x.is_global, (0, missing))[..., None, None]
        backward(x, dout.masked_fill(chosen, 0), lse, delta.masked_fill(chosen, 0), grads)
        global_backward(x, dout, delta, grads)
    dq, dk, dv = (g[:, : x.length].to(t.dtype).contiguous() for g, t in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    work = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(*q.shape[:3], 1, dtype=work)


@attend_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    with torch.autocast(dout.device.type, enabled=False):
        grads = attend_backward(dout, out, lse, *inputs, *ctx.options)
    return *grads, *[None] * 14


attend = register_autograd(attend, _backward, _setup)


def _pairs(
    q: Any, positions: Any, random_blocks: Any, behind: int, ahead: int, dilation: Any, block: int, mutual: bool
) -> int:
    named = 0 if positions is None else positions[1]
    far = 0 if random_blocks is None else random_blocks[2]
    return q[0] * pairs(q[1], behind, ahead, dilation, named * (2 if mutual else 1), far, block)


@register_flop_formula(torch.ops.lra.band_attention)
def _flops(
    q: Any, k: Any, v: Any, mask: Any, positions: Any, random_blocks: Any, slopes: Any, seed: Any, behind: int,
    ahead: int, dilation: Any, block: int, causal: bool, mutual: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * (q[-1] + v[-1]) * _pairs(q, positions, random_blocks, behind, ahead, dilation, block, mutual)


@register_flop_formula(torch.ops.lra.band_attention_backward)
def _flops_backward(
    dout: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, mask: Any, positions: Any, random_blocks: Any, slopes: Any,
    seed: Any, behind: int, ahead: int, dilation: Any, block: int, causal: bool, mutual: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Scores again, then the gradients of weights, q, k and v."""
    count = _pairs(q, positions, random_blocks, behind, ahead, dilation, block, mutual)
    return 2 * (3 * q[-1] + 2 * v[-1]) * count
