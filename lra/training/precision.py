"""Arithmetic of a run: float32, bfloat16 autocast where the hardware computes in it, or float16 autocast on a GPU."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from lra.config.recipe import Recipe

CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags in /proc/cpuinfo of CPUs with bfloat16 products: x86 with AVX512-BF16 or AMX, and Arm."""


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively. Elsewhere PyTorch emulates it, slower than float32."""
    if platform.system() == "Darwin":
        return False
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return not CPU_FLAGS.isdisjoint(value.split())
    return False


def of_run(recipe: Recipe, device: torch.device) -> str:
    """Lightning's name of the arithmetic of a run of `recipe` on `device`."""
    precision = recipe.train.precision
    if precision == "auto":
        native = device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16())
        precision = "bf16" if native else "32"
    return {"bf16": "bf16-mixed", "fp16": "16-mixed", "32": "32-true"}[precision]


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass. name: as of `of_run`; float16 is float32 on a CPU, which cannot multiply it."""
    dtype = torch.float16 if name.startswith("16") else torch.bfloat16
    return torch.autocast(
        device.type, dtype, enabled=name.startswith("bf16") or (name.startswith("16") and device.type == "cuda")
    )
