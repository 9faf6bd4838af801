"""Modular arithmetic without brackets: the value of an expression modulo 5.

Deletang et al. 2023, arXiv:2207.02098. Digits 0 to 4 and the operators +, -, * in turn; * binds tighter. `dense` scores
the value of every prefix that ends in a digit, `final` that of the whole expression, at its last digit. Trained on 3 to
39 tokens, tested on up to 255.
Tokens: digits 0 to 4, then 5 for +, 6 for -, 7 for *.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import UNSCORED, Protocol, Split
from lra.tasks.generated import COUNTS, GeneratedTask, last_only

MODULUS = 5
SYMBOLS = "01234+-*"


def _protocol(name: str, dense: bool, note: str) -> Protocol:
    law: dict[str, Any] = {"digits": (2, 20), "dense": dense}
    tests = {f"length-{2 * digits - 1}": {"digits": digits} for digits in (32, 64, 128)}
    return Protocol(name, length=255, vocabulary=8, counts=COUNTS, law=law, tests=tests, note=note)


class ModularArithmetic(GeneratedTask):
    name = "modular_arithmetic"
    title = "value of an expression modulo 5"
    classes = 5
    target = "position"
    protocols: ClassVar = {
        "dense": _protocol("dense", True, "every prefix that ends in a digit is scored"),
        "final": _protocol("final", False, "the last digit is scored"),
    }

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        digits = random.integers(0, MODULUS, (count, law["digits"]))
        operators = random.integers(0, 3, (count, law["digits"] - 1))
        tokens = np.empty((count, 2 * law["digits"] - 1), np.int64)
        tokens[:, ::2], tokens[:, 1::2] = digits, MODULUS + operators
        labels = np.full_like(tokens, UNSCORED)
        # value = done + term: `term` is the signed product at the end, which a further * multiplies
        done, term = np.zeros(count, np.int64), digits[:, 0]
        labels[:, 0] = term
        for t in range(1, law["digits"]):
            operator, digit = operators[:, t - 1], digits[:, t]
            times = operator == 2
            done = np.where(times, done, done + term) % MODULUS
            term = np.where(times, term * digit, np.where(operator == 0, digit, -digit)) % MODULUS
            labels[:, 2 * t] = (done + term) % MODULUS
        return tokens, labels if law["dense"] else last_only(labels)

    def describe(self, split: Split, example: int) -> str:
        text = "".join(SYMBOLS[token] for token in split.document(int(split.index[example, 0])))
        return f"{text} = {split.label(example)[-1]} (mod {MODULUS})"
