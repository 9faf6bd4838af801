"""Text: sentiment of IMDb reviews, read byte by byte (data: Maas et al. 2011; task: arXiv:2011.04006).

`strict` reads at most 4,096 UTF-8 bytes. Its validation split consists of the 1,250 reviews of each class with the
lowest SHA-256 of their text, out of the 25,000 official training reviews, so that identical reviews are in the same
split. The test split is the official one. The notes of the prepared set list test reviews with a near-duplicate in
another split.

`lra2020` and `s4` select the checkpoint on the test split, as the published code does. Reviews are sorted by their
hashes, so the first n examples of a split are a random sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lra.task import Progress, Protocol, Split, Task
from lra.tasks import _imdb
from lra.tasks._floors import bag_of_tokens
from lra.tasks._overlap import near_duplicates
from lra.tasks.storage import SHARED, open_split, write_documents, write_examples, write_notes

PAD, UNKNOWN, EOS = range(3)
# characters that occur at least 15 times in the first 4,095 of the training reviews, the most frequent first
CHARACTERS = (
    " etaoisnrhldcumfygwbp.v,k'IT/><-\"ASBxMHCDj)W(ERLONP!GFJz0q1?KVY:9U2*;35847&6Z\xe9\x96Q`X$\x85_%=#+\x97\xb4"
    "\u2019~\xe8]}{[\xe1@\u2013\x91\xa3\xe4\xed\xa8\xf4\xf3\xfc\xe7\xa1\xe0\xf6\t^\xf1\xe2\xef\u201c\u201d\xeb"
    "\xea\xe3\xbb\xe5\xbd\xfa\xab\\\x84|"
)
IDS = {character: number for number, character in enumerate(CHARACTERS, start=EOS + 1)}
PUBLISHED = {"train": 25_000, "validation": 25_000, "test": 25_000}


class Text(Task):
    name = "text"
    title = "Text"
    classes = 2
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol(
            "strict",
            length=4096,
            vocabulary=256,
            counts={"train": 22_500, "validation": 2_500, "test": 25_000},
            sha256={
                "train": "38497c7693341f914e74d8d730caf52fe47d87c74bc8a5c23b4dd1146df60921",
                "validation": "d3d12ed52165025ce8843333390d611163504bd9425cce1aabc8750a2c1efdce",
                "test": "d2ba5342523230e262e09f73cd1078d73b1c8ccc1d4a199573b905abc3231ee5",
            },
            note="bytes; validation split off train by content hash; official test split",
            raw=_imdb.RAW,
        ),
        "lra2020": Protocol(
            "lra2020",
            length=1000,
            vocabulary=257,
            selection="test",
            counts=PUBLISHED,
            sha256={
                "train": "ff5c2e3896880e0fd2df8185c9c366d27ba0f7519b83b95a2b2e0fae4fee9933",
                "validation": "aa7152bbada145dd5753e12247b81e951c072ac0cfcf5873f1831e41e7447bc1",
                "test": "aa7152bbada145dd5753e12247b81e951c072ac0cfcf5873f1831e41e7447bc1",
            },
            note="bytes (id 256, padding, never occurs), cut at 1,000 as in the released configuration; "
            "the test split doubles as validation, as published",
            raw=_imdb.RAW,
        ),
        "lra2020-4000": Protocol(
            "lra2020-4000",
            length=4000,
            vocabulary=257,
            selection="test",
            counts=PUBLISHED,
            sha256={
                "train": "fa54fe57f31aa9de31c28796d3b156d96068b45f48bb58a62b2c0027e0d8839c",
                "validation": "dc0cfc7c3822500b0cec9873684660b0b6c3ceadc479ce1624e7ccc1e93e0b00",
                "test": "dc0cfc7c3822500b0cec9873684660b0b6c3ceadc479ce1624e7ccc1e93e0b00",
            },
            note="as lra2020 but cut at 4,000, the longest of the four lengths of which the paper reports the best",
            raw=_imdb.RAW,
        ),
        "s4": Protocol(
            "s4",
            length=4096,
            vocabulary=135,
            selection="test",
            counts=PUBLISHED,
            sha256={
                "train": "4ddbfdcf1cceb4101937f10cc2ec5451febbf388cea95a54feb7c83cbafa9bbb",
                "validation": "9f8cf06ae1bae3074461022bd106ad1c459285b7bb58487b6b0e9eec91685489",
                "test": "9f8cf06ae1bae3074461022bd106ad1c459285b7bb58487b6b0e9eec91685489",
            },
            note="Unicode characters that occur at least 15 times in train, after padding, unknown and end mark: 134 "
            "ids in this revision of the data (the published code, on an older one, counts 135); cut at 4,095, then "
            "an end mark; the test split doubles as validation, as published",
            raw=_imdb.RAW,
        ),
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        progress(f"reading {source or _imdb.HUB.id}", 0, 3)
        train, test = (_imdb.read(split, source, self.command(protocol)) for split in ("train", "test"))
        progress("encoding", 1, 3)
        texts, labels, total = train[0] + test[0], np.array(train[1] + test[1]), len(train[0])
        write_documents(folder, SHARED, (self.encode(text, protocol) for text in texts))
        parts = {"train": np.arange(total), "test": np.arange(total, len(labels))}
        if protocol.selection == "test":
            parts["validation"] = parts["test"]
        else:
            each = protocol.counts["validation"] // 2
            rows = np.concatenate([np.flatnonzero(labels[:total] == label)[:each] for label in range(2)])
            parts["validation"] = np.sort(rows)
            parts["train"] = np.setdiff1d(parts["train"], rows)
        for split, index in parts.items():
            write_examples(folder, split, labels[index], index)
        progress("looking for near-duplicates", 2, 3)
        write_notes(folder, _overlap(texts, parts))
        progress("looking for near-duplicates", 3, 3)

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        return (_characters if protocol.name == "s4" else _bytes)(text, protocol.length)

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        return super().floors(train, test) | {"bag of tokens": bag_of_tokens(train, test, self.classes)}

    def describe(self, split: Split, example: int) -> str:
        document = np.asarray(split.document(split.index[example, 0]))
        if document[-1] == EOS:
            text = "".join(CHARACTERS[token - EOS - 1] if token > EOS else "\ufffd" for token in document[:-1])
        else:
            text = bytes(document).decode(errors="replace")
        return f"{('negative', 'positive')[split.labels[example]]}, {len(document):,} tokens: {text}"


def _bytes(text: str, length: int) -> np.ndarray:
    """The first `length` UTF-8 bytes as tokens."""
    return np.frombuffer(text.encode()[:length], np.uint8)


def _characters(text: str, length: int) -> np.ndarray:
    """Encode as characters with the ids of torchtext. `length` includes the end mark."""
    return np.array([*(IDS.get(c, UNKNOWN) for c in text[: length - 1]), EOS], np.uint8)


def _overlap(texts: list[str], parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Notes on duplicates: identical and similar pairs of reviews, counted by their splits, and the rows of test that
    have one in train or validation. Reviews are compared in full length."""
    documents = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    pairs = near_duplicates(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
    split_of = np.empty(len(texts), object)
    row = np.empty(len(texts), np.int64)
    # test last: if it is also the validation split, its reviews count as test
    for split in ("train", "validation", "test"):
        split_of[parts[split]], row[parts[split]] = split, np.arange(len(parts[split]))
    counts: dict[str, dict[str, int]] = {}
    leaked = set()
    for a, b in pairs:
        count = counts.setdefault(" and ".join(sorted({split_of[a], split_of[b]})), {"identical": 0, "similar": 0})
        count["identical" if texts[a] == texts[b] else "similar"] += 1
        for one, other in ((a, b), (b, a)):
            if split_of[one] == "test" != split_of[other]:
                leaked.add(int(row[one]))
    return {"duplicate pairs": counts, "test rows with a duplicate in train or validation": sorted(leaked)}
