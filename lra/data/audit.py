"""What a prepared set is made of: balance of labels, lengths, and examples that more than one split holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lra.data.prepared_sets import Prepared, fingerprints, shared
from lra.task import SPLITS


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
        prints = fingerprints(split)
        seen[name] = prints
        sizes = np.diff(split.offsets)[np.asarray(split.index)].sum(axis=1)
        share = np.bincount(split.labels, minlength=prepared.task.classes) / max(len(split), 1)
        lengths = (int(sizes.min()), float(np.median(sizes)), float(sizes.mean()), int(sizes.max()))
        facts.append(SplitFacts(name, len(split), tuple(share.tolist()), lengths, len(prints) - len(set(prints))))
    overlap = {(a, b): shared(seen[a], seen[b]) for a, b in combinations(SPLITS, 2)}
    return Audit(tuple(facts), overlap)
