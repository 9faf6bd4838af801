"""Copying memory: repeat ten symbols after T steps. Hochreiter and Schmidhuber 1997; Bai et al. 2018, arXiv:1803.01271.

Ten symbols of 1 to 8, T - 1 blanks (0), then eleven times 9, of which the first is the signal: L = T + 20. The last ten
outputs must be the ten symbols. They alone are scored, so that the easy blanks do not dilute the gradient; class c is
the symbol c + 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol
from lra.tasks.generated import COUNTS, GeneratedTask

SYMBOLS, DATA, SIGNAL = 8, 10, 9


class CopyingMemory(GeneratedTask):
    name = "copying_memory"
    title = "ten symbols after a delay"
    classes = 8
    target = "position"
    protocols: ClassVar = {
        "t200": Protocol(
            "t200", length=220, vocabulary=10, counts=COUNTS, law={"delay": 200}, note="a delay of 200 steps"
        ),
        "t1000": Protocol(
            "t1000", length=1020, vocabulary=10, counts=COUNTS, law={"delay": 1000}, note="a delay of 1,000 steps"
        ),
    }

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        data = random.integers(1, SYMBOLS + 1, (count, DATA))
        tokens = np.zeros((count, law["delay"] + 2 * DATA), np.int64)
        tokens[:, :DATA], tokens[:, -DATA - 1 :] = data, SIGNAL
        labels = np.full_like(tokens, UNSCORED)
        labels[:, -DATA:] = data - 1
        return tokens, labels
