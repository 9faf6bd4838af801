"""Cyclic counting: the sum of the steps so far, modulo 60. The commutative control of the A5 word problem.

It has as many classes as `words_a5`, but its group is commutative, so that the order of the steps does not matter.
`all` draws every step from 0 to 59; `generators` draws 1 or 17, two symbols as in `words_a5`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

MODULUS = 60
STEPS = {"generators": (1, 17), "all": tuple(range(MODULUS))}
TESTS = longer(64, 128, 256)


class CyclicCounting(GeneratedTask):
    name = "cyclic_counting"
    title = "running sum modulo 60"
    classes = 60
    target = "position"
    protocols: ClassVar = {
        "generators": Protocol(
            "generators", length=256, vocabulary=2, counts=COUNTS, law={"length": (4, 32), "steps": "generators"},
            tests=TESTS, note="two symbols, which add 1 and 17",
        ),
        "all": Protocol(
            "all", length=256, vocabulary=60, counts=COUNTS, law={"length": (4, 32), "steps": "all"}, tests=TESTS,
            note="60 symbols, which add 0 to 59",
        ),
    }  # fmt: skip

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        steps = np.array(STEPS[law["steps"]])
        symbols = random.integers(0, len(steps), (count, law["length"]))
        return symbols, steps[symbols].cumsum(axis=1) % MODULUS
