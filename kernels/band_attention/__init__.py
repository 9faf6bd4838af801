"""Softmax attention inside a sliding window, with dilation, global tokens and random blocks, in linear memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose

__all__ = ["band_attention"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = True
WIDEST, WIDEST_HALF = 128, 256  # heads that fit into a GPU's registers, in float32 and in half precision


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    window: int | tuple[int, int],
    dilation: int | Sequence[int] = 1,
    n_global: int = 0,
    random_blocks: Tensor | None = None,
    *,
    global_mask: Tensor | None = None,
    block: int = 1,
    causal: bool = False,
    mutual: bool = True,
    slopes: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """o_i = sum_j softmax_j(scale q_i . k_j - slope |i - j|) v_j over the keys j that i sees: `mask[j]` and any one of

    band     d = floor(j / block) - floor(i / block) is a multiple of `dilation`, -behind <= d / dilation <= ahead
    global   j or i is a global token: everyone sees it, and it sees everyone (the latter only if `mutual`)
    random   floor(j / block) is among random_blocks[head, floor(i / block)]

    and, when `causal`, j <= i. A key that satisfies several of these counts once. A row without keys is 0.

    window: keys on EACH side, the query itself not counted: an int, or (behind, ahead). Longformer's `attention_window`
    of a published configuration is both sides together: pass half. `block` > 1 makes window and dilation count in whole
    blocks (BigBird's three blocks: window 1; block-local attention: window 0).
    dilation: one int, or one per head. n_global: the first tokens are global; global_mask: (B, L) bool, further ones.
    random_blocks: (H, ceil(L / block), r) integer, -1 for none. slopes: (H,) of ALiBi, no gradient; on a GPU they take
    the plain torch path, as do heads wider than 256 (128 in float32) and dropout. scale: 1 / sqrt(head size) unless
    given.
    dropout: probability of leaving a pair out once the weights sum to 1, the rest being divided by 1 - dropout; the
    masks come from a seed drawn from torch's generator, and are drawn again in the backward pass.

    q, k: (B, L, H, E); v: (B, L, H, V); mask: (B, L) bool, True = real key, or None -> o: (B, L, H, V) in the dtype of
    q. Only keys are masked: rows of padding hold what a query there would see. Half precision is computed in float32.
    Differentiable in q, k and v; deterministic. Cost: O(L (window + globals + r block)); memory linear in L, scores
    are formed tile by tile and again in the backward pass.
    Raises ValueError for a wrong rank, shape, dtype, device, window, dilation or block.
    """
    op = "band_attention"
    device = check_tensors(op, q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check(not tensor.is_complex(), op, name, tensor.dtype, "a real dtype")
        check(tensor.ndim == 4, op, name, tuple(tensor.shape), "(B, L, H, head size)")
    batch, length, heads, size = q.shape
    check(length > 0 and size > 0, op, "q", tuple(q.shape), "(B, L, H, head size) with L >= 1 and head size >= 1")
    check(k.shape == q.shape, op, "k", tuple(k.shape), f"{tuple(q.shape)}, the shape of q")
    check(v.shape[:3] == q.shape[:3], op, "v", tuple(v.shape), f"({batch}, {length}, {heads}, V)")
    for name, given in (("mask", mask), ("global_mask", global_mask)):
        if given is not None:
            fits = given.shape == (batch, length) and given.dtype == torch.bool and given.device == device
            got = f"{tuple(given.shape)} {given.dtype} on {given.device}"
            check(fits, op, name, got, f"({batch}, {length}) torch.bool on {device}")
    behind, ahead = (window, window) if isinstance(window, int) else window
    check(behind >= 0 and ahead >= 0, op, "window", window, "0 or more on each side")
    steps = [dilation] * heads if isinstance(dilation, int) else list(dilation)
    check(len(steps) == heads and min(steps) >= 1, op, "dilation", dilation, f"1 or more, once or for {heads} heads")
    check(block >= 1, op, "block", block, "1 or more")
    check(0 <= n_global <= length, op, "n_global", n_global, f"0 to {length}")
    if random_blocks is not None:
        check(random_blocks.device == device, op, "random_blocks", f"on {random_blocks.device}", str(device))
        integer = not random_blocks.is_floating_point() and random_blocks.dtype != torch.bool
        fits = integer and random_blocks.shape[:-1] == (heads, -(-length // block))
        got = f"{tuple(random_blocks.shape)} {random_blocks.dtype}"
        check(fits, op, "random_blocks", got, f"({heads}, {-(-length // block)}, r) integer")
        if device.type == "cpu" and not torch.compiler.is_compiling() and random_blocks.numel():
            last, count = int(random_blocks.max()), -(-length // block)
            check(last < count, op, "random_blocks", f"up to {last}", f"numbers below {count}")
        random_blocks = random_blocks.long()
    if slopes is not None:
        fits = slopes.shape == (heads,) and slopes.is_floating_point() and slopes.device == device
        check(fits, op, "slopes", f"{tuple(slopes.shape)} {slopes.dtype} on {slopes.device}", f"({heads},) on {device}")
    check(0 <= dropout < 1, op, "dropout", dropout, "from 0 up to, not including, 1")
    scale = size**-0.5 if scale is None else scale
    positions = _globals(n_global, global_mask, batch, device)
    # the Triton kernels compute in float32, hold whole heads and know neither slopes nor dropout
    dtypes = {q.dtype, k.dtype, v.dtype}
    half = len(dtypes) == 1 and q.dtype in (torch.bfloat16, torch.float16)
    plain = slopes is not None or dropout > 0 or torch.float64 in dtypes
    plain = plain or max(size, v.shape[-1]) > (WIDEST_HALF if half else WIDEST)
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU and not plain)
    if chosen == "reference":
        from lra.kernels.band_attention.reference import reference

        return reference(
            q, k, v, mask, (behind, ahead), steps, n_global, random_blocks,
            global_mask=global_mask, block=block, causal=causal, mutual=mutual, slopes=slopes, scale=scale,
            dropout=dropout,
        )  # fmt: skip
    from lra.kernels.band_attention.cpu import attend

    # a window beyond the sequence is the sequence
    behind, ahead = min(behind, length), min(ahead, length)
    pattern = (behind, ahead, steps, block, causal, mutual)
    seed = torch.randint(2**62, ()) if dropout else None
    # autocast would take the products to half precision
    with torch.autocast(device.type, enabled=False):
        tensors = (q, k, v, mask, positions, random_blocks, slopes, seed)
        return attend(*tensors, *pattern, scale, dropout, chosen == "gpu")[0]


def _globals(first: int, mask: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    """Positions of the global tokens in each row, ascending, -1 after the last: (B, G) int64, or None."""
    leading = torch.arange(first, device=device).expand(batch, first)
    if mask is None:
        return leading.contiguous() if first else None
    later = torch.arange(mask.shape[1], device=device) >= first
    chosen = (mask & later).long()
    count = int(chosen.sum(1).max())
    where = chosen.sort(dim=1, descending=True, stable=True)
    rest = where.indices[:, :count].masked_fill(where.values[:, :count] == 0, -1)
    return torch.cat([leading, rest], dim=1) if first + count else None
