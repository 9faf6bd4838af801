"""Inputs of an operator for tests and benchmarks: each `kernels/<op>/cases.py` has `CASES: list[Case]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

KINDS = ("small", "edge", "long", "gpu", "bench")


@dataclass(frozen=True)
class Case:
    """One set of arguments.

    make(generator, dtype, device) -> keyword arguments of the public operator (dtype is the real dtype: complex
    arguments take the complex dtype that belongs to it).
    kind: "small" (gradcheck-sized: a few hundred numbers), "edge" (odd lengths, extreme gates, non-contiguous),
    "long" (accuracy at L = 16,384), "gpu" (sizes that are no multiple of 16, and the largest that a GPU kernel takes:
    compiled anywhere, run on a GPU), "bench" (what `make bench` times).
    interpreted: whether `make test` also takes a small or edge case through Triton's interpreter. Where that lasts for
        seconds `make test-all` does; it passes over what no Triton kernel takes.
    """

    name: str
    kind: str
    make: Callable[[torch.Generator, torch.dtype, torch.device], dict[str, Any]]
    interpreted: bool = True


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """complex64 for float32 and narrower, complex128 for float64."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64
