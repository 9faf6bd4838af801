"""Multi-query associative recall: which value followed this key? Arora et al. 2023, arXiv:2312.04927.

The sequence begins with P pairs of a key and a value, all different: keys are the tokens 1 to V/2 - 1, values V/2 to
V - 1. Then every key occurs once more, at an even distance from the end of the pairs. The distance 2 (k - 1) is drawn
without replacement with a weight proportional to k^(a - 1), a = 0.01, k = 1 .. (L - 2 P) / 2. Scored are the repeated
keys. Other positions hold the token 0, or with noise any token (`4-pairs-noise`, Arora et al. 2024, arXiv:2402.18668).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

VOCABULARY = 256
EXPONENT = 0.01 - 1


def _protocol(name: str, pairs: int, noise: bool, note: str) -> Protocol:
    law = {"length": 64, "pairs": pairs, "noise": noise}
    tests = longer(128, 256)
    return Protocol(name, length=256, vocabulary=VOCABULARY, counts=COUNTS, law=law, tests=tests, note=note)


class Mqar(GeneratedTask):
    name = "mqar"
    title = "multi-query associative recall"
    classes = 256
    target = "position"
    protocols: ClassVar = {
        "4-pairs": _protocol("4-pairs", 4, False, "length 64, 4 pairs, zeros between the keys"),
        "8-pairs": _protocol("8-pairs", 8, False, "length 64, 8 pairs, zeros between the keys"),
        "4-pairs-noise": _protocol("4-pairs-noise", 4, True, "length 64, 4 pairs, random tokens between the keys"),
    }

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        pairs, half = law["pairs"], VOCABULARY // 2
        keys = 1 + random.random((count, half - 1)).argsort(axis=1)[:, :pairs]
        values = half + random.random((count, half)).argsort(axis=1)[:, :pairs]
        shape = (count, law["length"])
        tokens = random.integers(0, VOCABULARY, shape) if law["noise"] else np.zeros(shape, np.int64)
        tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        gaps = np.arange(1, (law["length"] - 2 * pairs) // 2 + 1)
        # exponential clocks with these rates ring in the order of draws without replacement
        clocks = random.exponential(size=(count, len(gaps))) / gaps**EXPONENT
        places = 2 * pairs + 2 * clocks.argsort(axis=1)[:, :pairs]
        labels = np.full_like(tokens, UNSCORED)
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(labels, places, values, axis=1)
        return tokens, labels

    def chance(self, protocol: Protocol) -> float:
        return 2 / VOCABULARY

    def plateaus(self, protocol: Protocol) -> dict[str, float]:
        return {"any of the values that occurred": 1 / protocol.law["pairs"]}
