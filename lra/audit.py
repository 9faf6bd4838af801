"""What a prepared set is made of: balance of labels, lengths, and examples that more than one split holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lra.store import Prepared
from lra.task import SPLITS, Split


@dataclass(frozen=True)
class SplitFacts:
    """labels: share of each class, 0 to 1; lengths: smallest, median, mean and largest, in values; repeated: examples
    that occur earlier in the same split."""

    split: str
    count: int
    labels: tuple[float, ...]
    lengths: tuple[int, float, float, int]
    repeated: int


@dataclass(frozen=True)
class Audit:
    """overlap: (first, second) -> examples of the second split that are, document for document, in the first too."""

    splits: tuple[SplitFacts, ...]
    overlap: dict[tuple[str, str], int]


def audit(prepared: Prepared) -> Audit:
    """Read every example once."""
    facts, seen = [], {}
    for name in SPLITS:
        split = prepared.split(name)
        prints = _prints(split)
        seen[name] = prints
        sizes = np.diff(split.offsets)[np.asarray(split.index)].sum(axis=1)
        share = np.bincount(split.labels, minlength=prepared.task.classes) / max(len(split), 1)
        lengths = (int(sizes.min()), float(np.median(sizes)), float(sizes.mean()), int(sizes.max()))
        facts.append(SplitFacts(name, len(split), tuple(share.tolist()), lengths, len(prints) - len(set(prints))))
    overlap = {(a, b): _shared(seen[a], seen[b]) for a, b in combinations(SPLITS, 2)}
    return Audit(tuple(facts), overlap)


def _shared(first: list[bytes], second: list[bytes]) -> int:
    known = set(first)
    return sum(mark in known for mark in second)


def _prints(split: Split) -> list[bytes]:
    """A fingerprint per example, of its documents in order."""
    used = np.unique(split.index)
    of = {int(d): hashlib.sha256(split.document(int(d)).tobytes()).digest() for d in used}
    return [b"".join(of[int(d)] for d in row) for row in np.asarray(split.index)]
