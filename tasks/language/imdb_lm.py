"""Language modelling of IMDb reviews, byte by byte (data: Maas et al. 2011).

Every review is its UTF-8 bytes after a byte 0, which marks the start and occurs in no review. Under `chunks` an example
is a chunk of one review: attention and state never cross the border of a review, nor that of a chunk. A longer review
has several chunks; each begins with the last byte of the chunk before, so that every byte is predicted once. Training
uses all chunks; validation and test use the first chunk of each review, so that their examples are independent, and an
interval over examples is one over reviews.

Validation is the 500 reviews with the lowest SHA-256 of the 25,000 official training reviews; test is the first 1,000,
in the same order, of the official test reviews that occur in no training review word for word. A review that occurs
twice is used once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import Progress, Protocol, Split, Task
from lra.tasks import _imdb
from lra.tasks._ngram import gzip_bits, ngram_bits
from lra.tasks.storage import open_split, write_documents, write_positions

START = 0
ORDER = 5


class ImdbLm(Task):
    name = "imdb_lm"
    title = "IMDb, next byte"
    classes = 256
    target = "next"
    causal = True
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "chunks": Protocol(
            "chunks",
            length=1024,
            vocabulary=256,
            counts={"train": 42_700, "validation": 500, "test": 1_000},
            sha256={
                "train": "a7695f634497aff2ed2d4fff50a22b50bc34ef668084739204f6eeefc8941cba",
                "validation": "da93bd33f4f86aabe468c3ce0621c16e47ebdf25f88ad918179c9e780a1ca7d9",
                "test": "299de85bf6614268d5577f4be8479f14261ab7cf41f13999cef6b12bac7fdba6",
            },
            note="bytes; an example is a chunk of one review, and nothing crosses its border; validation and test hold "
            "the first chunk of each review",
            raw=_imdb.RAW,
        ),
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        progress(f"reading {source or _imdb.HUB.id}", 0, 2)
        train, test = (
            dict.fromkeys(_imdb.read(split, source, self.command(protocol))[0]) for split in ("train", "test")
        )
        held_out, tested = protocol.counts["validation"], protocol.counts["test"]
        unseen = (text for text in test if text not in train)
        parts = {"train": list(train)[held_out:], "validation": list(train)[:held_out], "test": islice(unseen, tested)}
        progress("encoding", 1, 2)
        for split, texts in parts.items():
            chunks = [
                c for text in texts for c in islice(_chunks(text, protocol.length), None if split == "train" else 1)
            ]
            write_documents(folder, split, chunks)
            write_positions(folder, split, None, len(chunks))
        progress("encoding", 2, 2)

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        return _tokens(text)[: protocol.length]

    def decode(self, tokens: np.ndarray) -> str:
        return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")

    def floor_bits(self, train: Split, test: Split) -> dict[str, float]:
        return {
            "unigram": ngram_bits(train, test, 1, self.classes),
            f"interpolated {ORDER}-gram": ngram_bits(train, test, ORDER, self.classes),
            "gzip -9": gzip_bits(test),
        }

    def describe(self, split: Split, example: int) -> str:
        document = split.document(int(split.index[example, 0]))
        return f"{len(document):,} bytes: {' '.join(self.decode(document[document != START]).split())}"


def _tokens(text: str) -> np.ndarray:
    return np.frombuffer(bytes([START]) + text.encode(), np.uint8)


def _chunks(text: str, length: int) -> Iterator[np.ndarray]:
    """Chunks of at most `length` tokens, each of which begins with the last token of the one before."""
    tokens = _tokens(text)
    return (tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1))
