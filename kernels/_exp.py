"""An exponential that Numba's compiled loops can vectorise.

Numba calls the C library's `exp` one number at a time; written out as arithmetic, LLVM runs eight float32 at once.
Numba's cache watches the file of the calling loop only: after a change here, delete `__pycache__` in its folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

F = np.float32
LOG2_E, LN2_HIGH, LN2_LOW = F(1.44269504), F(0.693359375), F(-2.12194440e-4)
LOWEST, HIGHEST = F(-88.0), F(89.0)


def exp(x: Any) -> Any:
    """e^x inside a Numba-compiled function. float32: relative error below 2e-7, 0 below -87.7, infinity above 88.3;
    float64: the C library's."""
    return math.exp(x)


def _exp32(x: Any) -> Any:
    # comparisons written so that a NaN passes through both
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = np.floor(x * LOG2_E + F(0.5))
    r = x - n * LN2_HIGH - n * LN2_LOW
    # polynomial of the Cephes library for |r| <= ln(2) / 2
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1.0)
    # 2^n by its bits: n + 127 in the exponent field; 0 gives 0, 255 gives infinity
    return p * np.int32((n + F(127.0)) * F(8388608.0)).view(np.float32)


def _exp64(x: Any) -> Any:
    return math.exp(x)


@overload(exp, jit_options={"fastmath": {"contract"}})
def _implement(x: Any) -> Callable[[Any], Any]:
    return _exp32 if x == types.float32 else _exp64
