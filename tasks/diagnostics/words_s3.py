"""The word problem of S3, the smallest group that is not commutative; solvable. The law is in `_words.py`."""

from __future__ import annotations

from typing import ClassVar

from lra.tasks._words import Words, protocol


class WordsS3(Words):
    name = "words_s3"
    title = "product of elements of S3"
    classes = 6
    degree = 3
    even = False
    symbols: ClassVar = {
        "all": (),
    }
    protocols: ClassVar = {
        "all": protocol("all", 6, "all six elements"),
    }
