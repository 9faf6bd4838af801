"""The word problem of A5, the smallest group that is not solvable. The law is in `_words.py`."""

from __future__ import annotations

from typing import ClassVar

from lra.tasks._words import Words, protocol


class WordsA5(Words):
    name = "words_a5"
    title = "product of elements of A5"
    classes = 60
    degree = 5
    even = True
    symbols: ClassVar = {
        "generators": ((1, 2, 0, 3, 4), (1, 2, 3, 4, 0)),
        "all": (),
    }
    protocols: ClassVar = {
        "generators": protocol("generators", 2, "a 3-cycle and a 5-cycle"),
        "all": protocol("all", 60, "all 60 elements"),
    }
