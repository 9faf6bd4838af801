"""The operators of `lra.kernels`: parity with their references, diagnosis, timings."""

from __future__ import annotations

from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"


def operators() -> list[str]:
    """Sorted names of the operators."""
    return sorted(folder.parent.name for folder in KERNELS.glob("*/__init__.py"))
