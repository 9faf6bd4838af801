"""Parity: is the number of ones so far even or odd? A regular language that needs state tracking.

Label at t: the sum of the first t bits, modulo 2. Trained on 3 to 40 bits, one length for each batch, and tested on up
to 256 (Beck et al. 2024, arXiv:2405.04517; Grazzi et al. 2025, arXiv:2411.12537). `final` scores the last position
alone, as Deletang et al. 2023, arXiv:2207.02098; `dense` scores every prefix, which teaches in a tenth of the steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, last_only, longer

TESTS = longer(64, 128, 256)


class Parity(GeneratedTask):
    name = "parity"
    title = "parity of the bits so far"
    classes = 2
    target = "position"
    protocols: ClassVar = {
        "dense": Protocol(
            "dense", length=256, vocabulary=2, counts=COUNTS, law={"length": (3, 40), "dense": True}, tests=TESTS,
            note="every prefix is scored",
        ),
        "final": Protocol(
            "final", length=256, vocabulary=2, counts=COUNTS, law={"length": (3, 40), "dense": False}, tests=TESTS,
            note="the last position is scored",
        ),
    }  # fmt: skip

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        bits = random.integers(0, 2, (count, law["length"]))
        labels = bits.cumsum(axis=1) % 2
        return bits, labels if law["dense"] else last_only(labels)
