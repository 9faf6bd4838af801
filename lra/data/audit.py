"""Statistics of a prepared set: label balance, lengths, repeated examples and overlap between splits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lra.data.prepared_sets import Prepared, count_shared, example_hashes


@dataclass(frozen=True)
class SplitFacts:
    """Statistics of one split.

    labels: share of each class among the answers, in [0, 1], empty for real values; lengths: minimum, median, mean and
    maximum, in values; repeated: number of examples that occur earlier in the same split.
    """

    split: str
    count: int
    labels: tuple[float, ...]
    lengths: tuple[int, float, float, int]
    repeated: int


@dataclass(frozen=True)
class Audit:
    """overlap: (first, second) -> number of examples of the second split that occur, byte for byte, in the first."""

    splits: tuple[SplitFacts, ...]
    overlap: dict[tuple[str, str], int]


def audit(prepared: Prepared) -> Audit:
    """Compute the statistics. Reads every example once."""
    facts, hashes = [], {}
    for name in prepared.protocol.splits:
        split = prepared.split(name)
        hashes[name] = example_hashes(split)
        sizes = np.diff(split.offsets)[np.asarray(split.index)].sum(axis=1)
        answers = split.answers() if split.target != "value" else np.zeros(0, np.int64)
        classes = prepared.task.classes if split.target != "value" else 0
        share = np.bincount(answers, minlength=classes) / max(len(answers), 1)
        lengths = (int(sizes.min()), float(np.median(sizes)), float(sizes.mean()), int(sizes.max()))
        repeated = len(split) - len(set(hashes[name]))
        facts.append(SplitFacts(name, len(split), tuple(share.tolist()), lengths, repeated))
    overlap = {(a, b): count_shared(hashes[a], hashes[b]) for a, b in combinations(hashes, 2)}
    return Audit(tuple(facts), overlap)
