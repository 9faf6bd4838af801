"""Runs the rows of a compiled loop on as many threads as PyTorch uses.

Numba's thread layers either break after fork or keep a second pool of spinning workers beside PyTorch's; a small pool
of Python threads around kernels that release the GIL has neither fault, and honours `torch.set_num_threads`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """One pool per process and size: threads do not survive a fork, so a child must not find its parent's."""
    return ThreadPoolExecutor(workers, "lra-kernel")


def over_rows(kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
    """Call `kernel(start, stop, *arguments)` on slices of range(rows), one slice per thread.

    `kernel` must release the GIL (`numba.njit(nogil=True)`) and write disjoint memory for disjoint slices, so that the
    result does not depend on the number of threads.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        kernel(0, rows, *arguments)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)
    waiting = [pool.submit(kernel, bounds[i], bounds[i + 1], *arguments) for i in range(1, threads)]
    kernel(bounds[0], bounds[1], *arguments)
    for task in waiting:
        task.result()


def blocks_of(batch: int, width: int, smallest: int = 32) -> int:
    """Into how many channel blocks each of `batch` rows of `width` channels is cut so that every thread has work,
    without blocks narrower than `smallest` (a cut that costs vectorisation more than it gains)."""
    return max(1, min(-(-torch.get_num_threads() // batch), width // smallest))
