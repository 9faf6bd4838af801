"""Triton kernels that a GPU would not run, or not at every size: what the checks of the real ones must refuse."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def changes_type(x, count, T: tl.constexpr):
    """A sum that becomes wider in its loop."""
    total = tl.zeros([T], tl.float32)
    for _ in range(count):
        total = total + tl.load(x + tl.arange(0, T)).to(tl.float64)
    tl.store(x + tl.arange(0, T), total)


@triton.jit
def takes_memory(x, count, T: tl.constexpr):
    """Products of T x T tiles, read several steps ahead."""
    at = tl.arange(0, T)[:, None] * T + tl.arange(0, T)[None, :]
    total = tl.zeros([T, T], tl.float32)
    for i in range(count):
        total += tl.dot(tl.load(x + i * T + at), tl.load(x - i * T + at))
    tl.store(x + at, total)


@triton.jit
def holds_much(x, count, T: tl.constexpr):
    """More numbers than one warp has registers, all needed to the end."""
    held = tl.load(x + tl.arange(0, T))
    tl.store(x + tl.arange(0, T), held * tl.sum(held))
