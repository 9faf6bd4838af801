"""The IMDb reviews: Parquet tables, or `aclImdb/` or `aclImdb_v1.tar.gz` with one text file for each review."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lra.task import DataError
from lra.tasks._archive import contents, find_official
from lra.tasks._source import Hub, read_table

FOLDER, ARCHIVE = "aclImdb", "aclImdb_v1.tar.gz"
OFFICIAL = f"the official {FOLDER}/ or {ARCHIVE}"
HUB = Hub("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31", "imdb", OFFICIAL)
RAW = f"{HUB.files} or {HUB.id} from the hub"
SENTIMENTS = ("neg", "pos")
LARGEST = 1 << 20


def find(source: Path | None) -> Path | None:
    """The official folder or archive in a user's folder; None if it is not there."""
    return find_official(source, "imdb", FOLDER, ARCHIVE)


def read_reviews(root: Path, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels (0 negative, 1 positive) of the reviews of a split. Raises DataError."""
    texts, labels = [], []
    wanted = {f"{FOLDER}/{split}/{sentiment}/*.txt": label for label, sentiment in enumerate(SENTIMENTS)}
    for label, content in contents(root, wanted, LARGEST):
        try:
            texts.append(content.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{root}: a review of {split} is not UTF-8 ({error}); fetch it again") from None
        labels.append(label)
    return texts, labels


def read(split: str, source: Path | None, command: str) -> tuple[list[str], list[int]]:
    """Texts and labels of an official split, sorted by the SHA-256 of the text. command: the command that prepares the
    task, for messages. Raises DataError."""
    if root := find(source):
        texts, labels = read_reviews(root, split)
    else:
        texts, labels = read_table(HUB, split, ("text", "label"), source, command)
    where = f"{split} of {root or HUB.id}"
    if not texts:
        raise DataError(f"{where} holds no reviews; fetch it again")
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not (isinstance(text, str) and text):
            raise DataError(f"{where}: review {number} is empty; fetch it again")
        if label not in (0, 1):
            raise DataError(f"{where}: review {number} has the label {label!r}, not 0 or 1; fetch it again")
    order = sorted(range(len(texts)), key=lambda i: (hashlib.sha256(texts[i].encode()).digest(), labels[i]))
    return [texts[i] for i in order], [labels[i] for i in order]
