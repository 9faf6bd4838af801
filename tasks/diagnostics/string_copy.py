"""String copying: repeat a string. A state of fixed size cannot hold strings of any length.

Jelassi et al. 2024, arXiv:2402.01032. L letters of 26, a separator, and the same letters again. Scored is each letter
of the copy, predicted from the separator and from the letters of the copy before it. Trained on 8 to 32 letters, tested
on up to 128; L counts the letters.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

LETTERS = SEPARATOR = 26


class StringCopy(GeneratedTask):
    name = "string_copy"
    title = "copy of a string"
    classes = 26
    target = "position"
    protocols: ClassVar = {
        "32": Protocol(
            "32", length=256, vocabulary=27, counts=COUNTS, law={"length": (8, 32)}, tests=longer(64, 128),
            note="trained on up to 32 letters",
        )
    }  # fmt: skip

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        letters = random.integers(0, LETTERS, (count, law["length"]))
        separator = np.full((count, 1), SEPARATOR)
        tokens = np.concatenate([letters, separator, letters[:, :-1]], axis=1)
        return tokens, np.concatenate([np.full_like(letters, UNSCORED), letters], axis=1)
