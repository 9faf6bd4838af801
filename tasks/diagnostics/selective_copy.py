"""Selective copying: repeat the data symbols among noise, in order. Gu and Dao 2023, arXiv:2312.00752, section 3.1.

M = 8 data symbols of 8 stand at random places among L positions, the others hold noise; then M markers follow, at which
the data must be given in order. In `regular` the data stand first, so that a fixed delay solves it.
Tokens: 0 noise, 1 to 8 data, 9 marker; class c is the symbol c + 1. L counts the positions before the markers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

SYMBOLS, DATA, MARKER = 8, 8, 9


def _protocol(name: str, scattered: bool, note: str) -> Protocol:
    law, tests = {"length": 48, "scattered": scattered}, longer(96, 192)
    return Protocol(name, length=192 + DATA, vocabulary=10, counts=COUNTS, law=law, tests=tests, note=note)


class SelectiveCopy(GeneratedTask):
    name = "selective_copy"
    title = "copying data among noise"
    classes = 8
    target = "position"
    protocols: ClassVar = {
        "selective": _protocol("selective", True, "8 data symbols at random places of 48"),
        "regular": _protocol("regular", False, "8 data symbols at the first places of 48"),
    }

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        length = law["length"]
        data = random.integers(1, SYMBOLS + 1, (count, DATA))
        places = np.tile(np.arange(DATA), (count, 1))
        if law["scattered"]:
            places = np.sort(random.random((count, length)).argsort(axis=1)[:, :DATA], axis=1)
        tokens = np.zeros((count, length + DATA), np.int64)
        tokens[:, length:] = MARKER
        np.put_along_axis(tokens, places, data, axis=1)
        labels = np.full_like(tokens, UNSCORED)
        labels[:, length:] = data - 1
        return tokens, labels
