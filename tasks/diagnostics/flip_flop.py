"""Flip-flop language: what was the last bit written? Liu et al. 2023, arXiv:2306.00946, section 4.

Pairs (instruction, bit): the instruction is write, ignore or read with probability (1 - p) / 2, p, (1 - p) / 2;
the first is a write, the last a read. The bit after a read is the last one written; other bits are uniform. Scored is
the bit after every read, predicted at the read. Trained at p = 0.8; tested at 0.98 (`sparse`: long memory), at 0.1
(`dense`) and on longer sequences.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

WRITE, READ, IGNORE = 2, 3, 4
"""Tokens of the instructions; bits are the tokens 0 and 1."""


class FlipFlop(GeneratedTask):
    name = "flip_flop"
    title = "the last bit written"
    classes = 2
    target = "position"
    protocols: ClassVar = {
        "128": Protocol(
            "128", length=1024, vocabulary=5, counts={**COUNTS, "length-1024": 256}, law={"length": 128, "ignore": 0.8},
            tests={"sparse": {"ignore": 0.98}, "dense": {"ignore": 0.1}, **longer(256, 1024)},
            note="trained at length 128 with 80 % of the instructions ignored",
        )
    }  # fmt: skip

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        pairs, ignore = law["length"] // 2, law["ignore"]
        chosen = random.choice([WRITE, READ, IGNORE], (count, pairs), p=[(1 - ignore) / 2, (1 - ignore) / 2, ignore])
        chosen[:, 0], chosen[:, -1] = WRITE, READ
        bits = random.integers(0, 2, (count, pairs))
        # the pair of the last write before each pair, or at it
        written = np.maximum.accumulate(np.where(chosen == WRITE, np.arange(pairs), 0), axis=1)
        bits = np.where(chosen == READ, np.take_along_axis(bits, written, axis=1), bits)
        labels = np.where(chosen == READ, bits, UNSCORED)
        tokens = np.stack([chosen, bits], axis=2).reshape(count, -1)
        return tokens, np.stack([labels, np.full_like(labels, UNSCORED)], axis=2).reshape(count, -1)
