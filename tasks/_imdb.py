"""The official IMDb reviews: `aclImdb/` or `aclImdb_v1.tar.gz`, one text file for each review."""

from __future__ import annotations

from pathlib import Path

from lra.task import DataError
from lra.tasks._archive import contents, find_official

FOLDER, ARCHIVE = "aclImdb", "aclImdb_v1.tar.gz"
OFFICIAL = f"the official {FOLDER}/ or {ARCHIVE}"
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
