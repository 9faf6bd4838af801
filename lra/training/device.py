"""The device that runs use: a CUDA GPU where there is one, else the CPU."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DRIVERS = ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")


def device_type() -> str:
    """ "cuda" or "cpu". torch is imported only where the machine has a GPU driver."""
    if "torch" not in sys.modules and not any(map(_loads, DRIVERS)):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device() -> torch.device:
    import torch

    return torch.device(device_type())


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
