"""Baselines of next-token tasks without a sequence model: interpolated n-grams and gzip, in bits per token."""

from __future__ import annotations

import gzip

import numpy as np

from lra.task import Split


def ngram_bits(train: Split, test: Split, order: int, vocabulary: int) -> float:
    """Bits per scored token of `test` under an n-gram model of `train`, interpolated as by Witten and Bell (1991):

        p_k(c | h) = (n(hc) + T(h) p_{k-1}(c | h')) / (n(h) + T(h)),    p_0 = 1 / vocabulary

    h: the k - 1 tokens before, within the document; h': h without its first token; n: counts in `train`; T(h): number
    of different tokens that follow h there. Where h is unknown, p_k = p_{k-1}. The first token of a document is
    context only.

    Raises ValueError where an n-gram does not fit into 63 bits.
    """
    width = (vocabulary - 1).bit_length()
    if order * width > 63:
        raise ValueError(f"{order} tokens of {width} bits exceed 63 bits")
    asked = _positions(test)
    probability = np.full(int((asked > 0).sum()), 1 / vocabulary)
    for k in range(1, order + 1):
        grams, counts = np.unique(_grams(train, k, width), return_counts=True)
        contexts, first = np.unique(grams >> width, return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
        wanted = _grams(test, k, width)
        reaches = asked[asked > 0] >= k - 1
        seen, n = _look_up(contexts, totals, wanted >> width)
        kind, of_gram = _look_up(contexts, kinds, wanted >> width)[1], _look_up(grams, counts, wanted)[1]
        lower = probability[reaches]
        probability[reaches] = np.where(seen, (of_gram + kind * lower) / np.maximum(n + kind, 1), lower)
    return float(-np.log2(probability).mean())


def gzip_bits(test: Split) -> float:
    """Bits per scored token of `gzip -9` on all documents of `test` in one file, without their first tokens.

    Tokens are bytes. gzip learns from `test` alone, and its window of 32 KiB crosses documents.
    """
    scored = np.asarray(test.values)[_positions(test) > 0]
    return 8 * len(gzip.compress(scored.astype(np.uint8).tobytes(), 9, mtime=0)) / len(scored)


def _positions(split: Split) -> np.ndarray:
    """Place of every token in its document: (total,)."""
    lengths = np.diff(split.offsets)
    return np.arange(len(split.values)) - np.repeat(np.asarray(split.offsets[:-1]), lengths)


def _grams(split: Split, k: int, width: int) -> np.ndarray:
    """The k-gram that ends at each scored token with k - 1 tokens before it in its document: (n,) int64."""
    values, ends = np.asarray(split.values), np.flatnonzero(_positions(split) >= max(k - 1, 1))
    grams = np.zeros(len(ends), np.int64)
    for back in range(k - 1, -1, -1):
        grams = grams << width | values[ends - back]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of `wanted` is among the sorted `keys`, and its value, 0 where it is not."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    found = keys[place] == wanted
    return found, np.where(found, values[place], 0)
