"""Word problems of permutation groups: the product of the elements so far.

Input g_1 ... g_L, label at t: the product g_1 g_2 ... g_t, where the left factor acts first, as one of |G| classes.
Merrill, Petty, Sabharwal 2024, arXiv:2404.08819. For groups that are not solvable (A5, S5) the problem is complete for
NC1. Classes are the elements in lexicographic order of their permutations.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Any, ClassVar

import numpy as np

from lra.task import Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer

Permutation = tuple[int, ...]


def elements(degree: int, even: bool) -> list[Permutation]:
    """The permutations of `degree` points, or the even ones, in lexicographic order."""
    return [p for p in permutations(range(degree)) if not even or _sign(p) == 1]


def _sign(p: Permutation) -> int:
    inversions = sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p)))
    return -1 if inversions % 2 else 1


@cache
def table(degree: int, even: bool) -> np.ndarray:
    """Products of the elements by number: (|G|, |G|); entry (a, b) is the number of `a, then b`."""
    group = elements(degree, even)
    number = {p: n for n, p in enumerate(group)}
    return np.array([[number[tuple(b[i] for i in a)] for b in group] for a in group])


class Words(GeneratedTask):
    """Base class. degree, even: the group (`elements`); symbols: protocol -> permutations that stand for the input
    tokens, () for every element."""

    target = "position"
    degree: ClassVar[int]
    even: ClassVar[bool]
    symbols: ClassVar[dict[str, tuple[Permutation, ...]]]

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        group, products = elements(self.degree, self.even), table(self.degree, self.even)
        numbers = np.array([group.index(p) for p in self.symbols[law["symbols"]] or group])
        word = random.integers(0, len(numbers), (count, law["length"]))
        labels = np.empty_like(word)
        product = np.zeros(count, np.int64)  # the identity is first in lexicographic order
        for t in range(law["length"]):
            labels[:, t] = product = products[product, numbers[word[:, t]]]
        return word, labels


def protocol(name: str, vocabulary: int, note: str) -> Protocol:
    """A protocol of words of 4 to 32 elements, tested on up to 256."""
    law = {"length": (4, 32), "symbols": name}
    tests = longer(64, 128, 256)
    return Protocol(name, length=256, vocabulary=vocabulary, counts=COUNTS, law=law, tests=tests, note=note)
