"""Near-duplicate documents: pairs whose sets of token shingles overlap.

The Jaccard similarity of two documents' sets of SHINGLE-token windows is estimated from the windows whose hash falls
into a fixed eighth of all values (the same eighth for every document), so similar documents keep similar samples.
"""

from __future__ import annotations

import numba
import numpy as np

SHINGLE = 24
COMMON = 50


@numba.njit(cache=True)
def sampled_windows(values: np.ndarray, offsets: np.ndarray, shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the sampled windows of `shingle` tokens and the document each came from, document by document."""
    base = np.uint64(0x9E3779B97F4A7C15)
    leaving = np.uint64(1)
    for _ in range(shingle):
        leaving *= base
    hashes = np.empty(max(1, len(values)), np.uint64)
    owners = np.empty(max(1, len(values)), np.int64)
    kept = 0
    for document in range(len(offsets) - 1):
        rolling = np.uint64(0)
        for i in range(offsets[document], offsets[document + 1]):
            rolling = rolling * base + np.uint64(values[i]) + np.uint64(1)
            seen = i + 1 - offsets[document]
            if seen > shingle:
                rolling -= leaving * (np.uint64(values[i - shingle]) + np.uint64(1))
            if seen >= shingle:
                mixed = (rolling ^ (rolling >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed ^= mixed >> np.uint64(32)
                if mixed >> np.uint64(61) == 0:
                    hashes[kept] = mixed
                    owners[kept] = document
                    kept += 1
    return hashes[:kept].copy(), owners[:kept].copy()


@numba.njit(cache=True)
def _pairs(hashes: np.ndarray, owners: np.ndarray, documents: int, common: int) -> np.ndarray:
    """One number a * documents + b, a < b, for each window that documents a and b share; sorted input."""
    total = 0
    for write in range(2):
        if write:
            found = np.empty(total, np.int64)
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
                            found[total] = owners[i] * documents + owners[j]
                        total += 1
            start = stop
    return found


def near_duplicates(
    values: np.ndarray, offsets: np.ndarray, threshold: float = 0.5, shingle: int = SHINGLE
) -> np.ndarray:
    """Pairs of documents (a, b), a < b, with estimated similarity of at least `threshold`: (pairs, 2) int64.

    Windows that more than COMMON documents share (boilerplate) count for none of them.
    """
    documents = len(offsets) - 1
    hashes, owners = sampled_windows(np.asarray(values), np.asarray(offsets), shingle)
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    hashes, owners = hashes[new], owners[new]
    size = np.bincount(owners, minlength=documents)
    pairs, shared = np.unique(_pairs(hashes, owners, documents, COMMON), return_counts=True)
    a, b = pairs // documents, pairs % documents
    close = shared >= threshold * (size[a] + size[b] - shared)
    return np.stack([a[close], b[close]], axis=1)
