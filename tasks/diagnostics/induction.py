"""Induction heads: what followed the trigger before? Gu and Dao 2023, arXiv:2312.00752, sections 4.1.2 and E.1.

A random string over 16 symbols holds a trigger once, at a random place; the symbol behind it is the answer. The string
ends in the trigger, where the answer is scored. Trained at 64 positions, tested on up to 16 times as many.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

SYMBOLS = TRIGGER = 16


class Induction(GeneratedTask):
    name = "induction"
    title = "what followed the trigger"
    classes = 16
    target = "position"
    protocols: ClassVar = {
        "64": Protocol(
            "64", length=1024, vocabulary=17, counts={**COUNTS, "length-1024": 256}, law={"length": 64},
            tests=longer(128, 256, 1024), note="trained at length 64",
        )
    }  # fmt: skip

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        length, rows = law["length"], np.arange(count)
        tokens = random.integers(0, SYMBOLS, (count, length))
        place = random.integers(0, length - 2, count)
        tokens[rows, place] = tokens[:, -1] = TRIGGER
        labels = np.full_like(tokens, UNSCORED)
        labels[:, -1] = tokens[rows, place + 1]
        return tokens, labels

    def plateaus(self, protocol: Protocol) -> dict[str, float]:
        return {"any symbol, before the jump": 1 / SYMBOLS}
