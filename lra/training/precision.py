"""Arithmetic of a run: float32, or bfloat16 autocast where the hardware computes in it."""

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


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether a run of `recipe` on `device` computes under bfloat16 autocast."""
    if recipe.train.precision != "auto":
        return recipe.train.precision == "bf16"
    return device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16())


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe, device))
