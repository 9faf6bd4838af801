"""The word problem of S5, not solvable; one reflection for each swap. The law is in `_words.py`."""

from __future__ import annotations

from typing import ClassVar

from lra.tasks._words import Words, protocol


class WordsS5(Words):
    name = "words_s5"
    title = "product of elements of S5"
    classes = 120
    degree = 5
    even = False
    symbols: ClassVar = {
        "swaps": ((1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 4, 3)),
        "generators": ((1, 0, 2, 3, 4), (1, 2, 3, 4, 0)),
        "all": (),
    }
    protocols: ClassVar = {
        "swaps": protocol("swaps", 4, "the four swaps of neighbours"),
        "generators": protocol("generators", 2, "a transposition and a 5-cycle"),
        "all": protocol("all", 120, "all 120 elements"),
    }
