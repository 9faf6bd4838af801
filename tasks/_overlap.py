"""Near-duplicate documents, found by the overlap of their token shingles.

A shingle is a window of SHINGLE tokens. The Jaccard similarity of two documents is estimated from the shingles whose
hash lies in a fixed eighth of all values, the same for every document.
"""

from __future__ import annotations

import numba
import numpy as np

SHINGLE = 24
COMMON = 50
"""Shingles that occur more often than this are ignored."""


@numba.njit(cache=True)
def sampled_windows(values: np.ndarray, offsets: np.ndarray, shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Sampled shingles: the hash of each and the number of its document, in the order of the documents."""
    base = np.uint64(0x9E3779B97F4A7C15)
    highest = np.uint64(1)
    for _ in range(shingle):
        highest *= base
    hashes = np.empty(max(1, len(values)), np.uint64)
    owners = np.empty(max(1, len(values)), np.int64)
    count = 0
    for document in range(len(offsets) - 1):
        rolling = np.uint64(0)
        for i in range(offsets[document], offsets[document + 1]):
            rolling = rolling * base + np.uint64(values[i]) + np.uint64(1)
            position = i + 1 - offsets[document]
            if position > shingle:
                rolling -= highest * (np.uint64(values[i - shingle]) + np.uint64(1))
            if position >= shingle:
                mixed = (rolling ^ (rolling >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed ^= mixed >> np.uint64(32)
                if mixed >> np.uint64(61) == 0:
                    hashes[count] = mixed
                    owners[count] = document
                    count += 1
    return hashes[:count].copy(), owners[:count].copy()


@numba.njit(cache=True)
def _pairs(hashes: np.ndarray, owners: np.ndarray, documents: int, common: int) -> np.ndarray:
    """a * documents + b for each shingle that documents a < b share. hashes, owners: sorted by hash, then document."""
    total = 0
    # the first pass counts the pairs, the second one writes them
    for write in range(2):
        if write:
            pairs = np.empty(total, np.int64)
            total = 0
        start = 0
        while start < len(hashes):
            stop = start
            while stop < len(hashes) and hashes[stop] == hashes[start]:
                stop += 1
            if stop - start <= common:
                for i in range(start, stop):
                    for j in range(i + 1, stop):
                        if write:
                            pairs[total] = owners[i] * documents + owners[j]
                        total += 1
            start = stop
    return pairs


def near_duplicates(
    values: np.ndarray, offsets: np.ndarray, threshold: float = 0.5, shingle: int = SHINGLE
) -> np.ndarray:
    """Pairs of documents (a, b), a < b, with an estimated similarity of at least `threshold`: (pairs, 2) int64.

    Shingles in more than COMMON documents are boilerplate and count as not shared.
    """
    documents = len(offsets) - 1
    hashes, owners = sampled_windows(np.asarray(values), np.asarray(offsets), shingle)
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    first = np.ones(len(hashes), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    hashes, owners = hashes[first], owners[first]
    size = np.bincount(owners, minlength=documents)
    pairs, shared = np.unique(_pairs(hashes, owners, documents, COMMON), return_counts=True)
    a, b = pairs // documents, pairs % documents
    similar = shared >= threshold * (size[a] + size[b] - shared)
    return np.stack([a[similar], b[similar]], axis=1)
