"""The word problem of A4, solvable, with a normal subgroup of four elements. The law is in `_words.py`."""

from __future__ import annotations

from typing import ClassVar

from lra.tasks._words import Words, protocol


class WordsA4(Words):
    name = "words_a4"
    title = "product of elements of A4"
    classes = 12
    degree = 4
    even = True
    symbols: ClassVar = {
        "all": (),
        "generators": ((1, 2, 0, 3), (1, 0, 3, 2)),
    }
    protocols: ClassVar = {
        "all": protocol("all", 12, "all twelve elements"),
        "generators": protocol("generators", 2, "a 3-cycle and a double transposition"),
    }
