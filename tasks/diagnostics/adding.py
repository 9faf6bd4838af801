"""The adding problem: the sum of two marked numbers.

Hochreiter and Schmidhuber 1997; Le et al. 2015, arXiv:1504.00941. Two channels: a number, uniform in [0, 1], and a
mark, 1 at two random positions and 0 elsewhere. The target is the sum of the marked numbers. To answer 1 costs a mean
squared error of 1/6. An answer is right where its error is at most 0.04, the criterion of 1997. Trained at 100
positions, tested on up to 400.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import Protocol, Split
from lra.tasks.generated import COUNTS, GeneratedTask, longer


class Adding(GeneratedTask):
    name = "adding"
    title = "sum of two marked numbers"
    classes = 1
    target = "value"
    tolerance = 0.04
    protocols: ClassVar = {
        "100": Protocol(
            "100", length=400, channels=2, real=True, counts=COUNTS, law={"length": 100}, tests=longer(200, 400),
            note="trained at length 100",
        )
    }  # fmt: skip

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        numbers = random.random((count, law["length"]), np.float32)
        places = random.random((count, law["length"])).argsort(axis=1)[:, :2]
        marks = np.zeros_like(numbers)
        np.put_along_axis(marks, places, 1, axis=1)
        return np.stack([numbers, marks], axis=2), np.take_along_axis(numbers, places, axis=1).sum(axis=1)

    def describe(self, split: Split, example: int) -> str:
        numbers, marks = split.document(int(split.index[example, 0])).reshape(-1, 2).T
        marked = np.flatnonzero(marks)
        parts = " + ".join(f"{numbers[place]:.3f} (position {place})" for place in marked)
        return f"{len(numbers)} numbers: {parts} = {split.label(example, 2):.3f}"
