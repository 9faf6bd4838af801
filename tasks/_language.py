"""What tasks of the next byte share: documents and their chunks, baselines, and texts from the hub within a budget.

A document is its UTF-8 bytes after a byte 0, which marks the start and occurs in no text. An example begins with the
last byte of the one before, so that every byte is predicted once. Under a protocol that packs, examples are pieces of
one stream, all documents of the split one after the other: state and attention cross the borders of documents, which
byte 0 shows. Otherwise an example is a chunk of one document, and nothing crosses its border.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import Progress, Protocol, Split, Task
from lra.tasks._ngram import gzip_bits, ngram_bits
from lra.tasks._source import TextHub, find_texts, stream_texts
from lra.tasks.generated import longer
from lra.tasks.storage import DocumentWriter, open_split, write_positions

START = 0
ORDER = 5
PACKED = (
    "bytes; documents one after the other, cut to pieces: state and attention cross their borders, which byte 0 shows; "
    "test in pieces of 1,024, and the same bytes in longer ones"
)
TOKENS = 32_000_000
"""Training tokens of a data set on the hub."""
LONGER = (2048, 4096, 8192)
"""Lengths of the further tests of a model that is trained on 1,024 bytes."""


class ByteTask(Task):
    """The next byte of texts. A subclass says which texts each split has."""

    classes = 256
    target = "next"
    causal = True
    start = START

    @abstractmethod
    def texts(self, protocol: Protocol, source: Path | None, progress: Progress) -> Mapping[str, Iterable[str]]:
        """The texts of each split, read in the order of the splits. Raises DataError."""

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        found = self.texts(protocol, source, progress)
        for split in [*found, *protocol.tests]:
            count, texts = 0, found["test" if split in protocol.tests else split]
            with DocumentWriter(folder, split) as writer:
                for piece in _pieces(texts, protocol.of_split(split), None if split == "train" else 1):
                    writer.append(piece)
                    count += 1
            write_positions(folder, split, None, count)

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        return _document(text)[: protocol.length]

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


def chunks(hub: TextHub, size: int, document: str) -> Protocol:
    """The protocol `chunks` of a data set on the hub. size: bytes of text over all splits; document: what a text is."""
    return Protocol(
        "chunks",
        length=1024,
        vocabulary=256,
        counts={"validation": 500, "test": 1_000},
        budget={"validation": 500, "test": 1_000, "tokens": TOKENS, "bytes": size},
        note=f"bytes; an example is a chunk of one {document}, and nothing crosses its border; validation and test "
        f"hold the first chunk of each {document}",
        raw=hub.raw,
    )


def packed(hub: TextHub, size: int) -> Protocol:
    """The protocol `packed` of a data set on the hub. size: bytes of text over all splits."""
    return Protocol(
        "packed",
        length=1024,
        vocabulary=256,
        budget={"validation": 500, "test": 500, "tokens": TOKENS, "bytes": size},
        tests=longer(*LONGER),
        packed=True,
        note=PACKED,
        raw=hub.raw,
    )


class HubTask(ByteTask):
    """The next byte of a data set on the hub, of which as much is read as the budget of the protocol allows.

    Texts come in the order of the hub; one that occurs again is left out. The first ones are for validation, those
    after them for training. The first ones of the hub's split `tested_on` are the test.
    """

    hub: ClassVar[TextHub]
    tested_on: ClassVar[str]

    def texts(self, protocol: Protocol, source: Path | None, progress: Progress) -> Mapping[str, Iterable[str]]:
        budget, reader = protocol.budget, _Reader(protocol.budget["bytes"], progress)
        streams = {
            split: reader.new(stream_texts(self.hub, split, source, self.command(protocol))) for split in self.hub.files
        }
        train = streams["train"]
        return {
            "validation": list(islice(train, budget["validation"])),
            "test": list(islice(streams[self.tested_on], budget["test"])),
            "train": _fitting(train, budget["tokens"]),
        }

    def raw_files(self, protocol: Protocol, source: Path) -> Iterable[Path]:
        return [path for split in self.hub.files for path in find_texts(self.hub, split, source)]


class _Reader:
    """Reads texts that it has not read before, up to a number of UTF-8 bytes over all its streams."""

    def __init__(self, limit: int, progress: Progress) -> None:
        self.limit, self.progress = limit, progress
        self.read, self._known = 0, set[bytes]()

    def new(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            # byte 0 marks the start of a document
            content = text.replace("\0", "").encode()
            if self.read + len(content) > self.limit:
                return
            self.read += len(content)
            self.progress("reading texts", self.read, self.limit)
            key = hashlib.sha256(content).digest()
            if content and key not in self._known:
                self._known.add(key)
                yield content.decode()


def _fitting(texts: Iterable[str], tokens: int) -> Iterator[str]:
    """Texts from the first on, as long as their documents have at most `tokens` tokens together."""
    for text in texts:
        tokens -= len(_document(text))
        if tokens < 0:
            return
        yield text


def _document(text: str) -> np.ndarray:
    return np.frombuffer(bytes([START]) + text.encode(), np.uint8)


def _pieces(texts: Iterable[str], protocol: Protocol, most: int | None) -> Iterator[np.ndarray]:
    """The examples of texts. most: chunks of one text, where the protocol does not pack."""
    if protocol.packed:
        yield from _cut(np.concatenate([_document(text) for text in texts]), protocol.length)
        return
    for text in texts:
        yield from islice(_cut(_document(text), protocol.length), most)


def _cut(tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Pieces of at most `length` tokens, each of which begins with the last token of the one before."""
    return (tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1))
