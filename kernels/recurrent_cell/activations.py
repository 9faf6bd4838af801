"""Sigmoid and tanh that compiled loops vectorise; see `_exp.py` for why the C library's will not do.

Numba's cache watches the file of the calling loop only: after a change here, delete `__pycache__` in this folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from lra.kernels._exp import exp

F = np.float32


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) inside a Numba-compiled function."""
    return 1 / (1 + math.exp(-x))


def tanh(x: Any) -> Any:
    """tanh(x) inside a Numba-compiled function. float32: relative error below 3e-7; float64: the C library's."""
    return math.tanh(x)


def _sigmoid(x: Any) -> Any:
    one = type(x)(1)
    return one / (one + exp(-x))


def _tanh32(x: Any) -> Any:
    # near 0 the quotient below loses digits: polynomial of the Cephes library for |x| < 0.625
    square = x * x
    p = F(-5.70498872745e-3) * square + F(2.06390887954e-2)
    p = p * square + F(-5.37397155531e-2)
    p = p * square + F(1.33314422036e-1)
    p = p * square + F(-3.33332819422e-1)
    near = p * square * x + x
    far = F(1) - F(2) / (exp(F(2) * abs(x)) + F(1))
    far = -far if x < F(0) else far
    return near if abs(x) < F(0.625) else far


def _tanh64(x: Any) -> Any:
    return math.tanh(x)


@overload(sigmoid, jit_options={"fastmath": {"contract"}})
def _implement_sigmoid(x: Any) -> Callable[[Any], Any]:
    return _sigmoid


@overload(tanh, jit_options={"fastmath": {"contract"}})
def _implement_tanh(x: Any) -> Callable[[Any], Any]:
    return _tanh32 if x == types.float32 else _tanh64
