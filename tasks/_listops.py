"""The generator of ListOps expressions and their exact evaluation.

The distribution is that of arXiv:2011.04006. The root has depth 1. A node above depth 10 is an operator with
probability 1/4, else a uniform digit; a node at depth 10 is a digit. Operators are uniform on MIN, MAX, MED and SM and
have 2 to 10 arguments, uniformly. MED of an even number of arguments is rounded down; SM is the sum modulo 10. The
length counts operators, closing brackets and digits, and only expressions with 500 < length < 2000 are kept.

Example i has its own random stream, determined by the seed, i and the number of redraws; an example that repeats an
earlier one is redrawn, so no expression occurs twice. A uniform choice among n is the integer part of 32
random bits times n / 2^32; its probabilities are exact within n / 2^32.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np

from lra.task import DataError

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
MIN, MAX, MED, SM, CLOSE, EOS = range(10, 16)
CHUNK = 1000
MAX_DEPTH = 100
"""Largest depth that `evaluate` supports."""


@dataclass(frozen=True)
class Law:
    """The parameters of the generator. longer_than, shorter_than: exclusive bounds of the length."""

    seed: int = 0
    depth: int = 10
    arity: int = 10
    longer_than: int = 500
    shorter_than: int = 2000


@numba.njit(nogil=True, cache=True)
def _mix(x: np.uint64) -> np.uint64:
    """The output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def generate(
    seed: int, index: int, redraw: int, depth: int, arity: int, longer_than: int, shorter_than: int, out: np.ndarray
) -> int:
    """Draw expressions from the stream of example `index` until one has a valid length. Writes it to `out` and returns
    its length."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(_mix(np.uint64(seed) + gamma) + np.uint64(index)) + np.uint64(redraw))
    waiting = np.empty(depth + 1, np.int64)
    while True:
        level, length = 0, 0
        while length < shorter_than:
            state += gamma
            if level + 1 < depth and (_mix(state) >> np.uint64(11)) <= np.uint64(1 << 51):
                state += gamma
                draw = _mix(state)
                out[length] = MIN + (draw >> np.uint64(62))
                level += 1
                waiting[level] = 2 + ((draw & np.uint64(0xFFFFFFFF)) * np.uint64(arity - 1) >> np.uint64(32))
                length += 1
                continue
            state += gamma
            out[length] = (_mix(state) >> np.uint64(32)) * np.uint64(10) >> np.uint64(32)
            length += 1
            while level > 0 and length < shorter_than:
                waiting[level] -= 1
                if waiting[level] > 0:
                    break
                out[length] = CLOSE
                length += 1
                level -= 1
            if level == 0:
                break
        if level == 0 and longer_than < length < shorter_than:
            return length


@numba.njit(nogil=True, cache=True)
def evaluate(tokens: np.ndarray, deepest: int = MAX_DEPTH) -> int:
    """The value of an expression, with or without EOS at its end; -1 if it is malformed.

    Operators below depth `deepest` (the root has depth 1) are removed together with their arguments. An operator
    without remaining arguments is removed too; -1 is returned if that is the root.
    """
    counts = np.zeros((MAX_DEPTH + 1, 10), np.int64)
    arguments = np.zeros(MAX_DEPTH + 1, np.int64)
    operator = np.zeros(MAX_DEPTH + 1, np.int64)
    level = 0
    for i in range(len(tokens)):
        value = int(tokens[i])
        if MIN <= value <= SM:
            level += 1
            if level > MAX_DEPTH:
                return -1
            operator[level] = value
            arguments[level] = 0
            counts[level] = 0
            continue
        if value == CLOSE:
            if level == 0 or (arguments[level] == 0 and deepest >= MAX_DEPTH):
                return -1
            value = _apply(operator[level], counts[level], arguments[level])
            level -= 1
            if level > 0 and (value < 0 or level + 1 > deepest):
                continue
        elif value > CLOSE:
            return -1
        if level == 0:
            at_end = i + 1 == len(tokens) or (i + 2 == len(tokens) and tokens[i + 1] == EOS)
            return value if at_end else -1
        counts[level, value] += 1
        arguments[level] += 1
    return -1


@numba.njit(nogil=True, cache=True)
def _apply(operator: int, counts: np.ndarray, arguments: int) -> int:
    """Apply an operator. counts: how often each digit is an argument; arguments: their sum. -1 without arguments."""
    if arguments == 0:
        return -1
    if operator == SM:
        total = 0
        for digit in range(10):
            total += digit * counts[digit]
        return total % 10
    low, high = 0, 0
    if operator == MAX:
        low, high = arguments - 1, arguments - 1
    elif operator == MED:
        low, high = (arguments - 1) // 2, arguments // 2
    below, first, second = 0, -1, -1
    for digit in range(10):
        below += counts[digit]
        if first < 0 and below > low:
            first = digit
        if second < 0 and below > high:
            second = digit
    return (first + second) // 2


@numba.njit(nogil=True, cache=True)
def evaluate_many(values: np.ndarray, offsets: np.ndarray, deepest: int = MAX_DEPTH) -> np.ndarray:
    """Evaluate every document: (n,) int64."""
    results = np.empty(len(offsets) - 1, np.int64)
    for i in range(len(results)):
        results[i] = evaluate(values[offsets[i] : offsets[i + 1]], deepest)
    return results


@numba.njit(nogil=True, cache=True)
def _generate_chunk(
    seed: int, start: int, stop: int, depth: int, arity: int, longer_than: int, shorter_than: int
) -> tuple[np.ndarray, np.ndarray]:
    """Examples start..stop - 1, each from its first draw: their tokens, concatenated, and their lengths."""
    values = np.empty((stop - start) * shorter_than, np.uint8)
    lengths = np.empty(stop - start, np.int64)
    total = 0
    for i in range(stop - start):
        out = values[total:]
        lengths[i] = generate(seed, start + i, 0, depth, arity, longer_than, shorter_than, out)
        total += lengths[i]
    return values[:total].copy(), lengths


def expressions(law: Law, count: int, workers: int) -> Iterator[np.ndarray]:
    """Generate `count` different expressions: uint8 token ids. They do not depend on the number of workers."""
    bounds = (law.depth, law.arity, law.longer_than, law.shorter_than)
    seen: set[bytes] = set()
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for start in range(0, count, CHUNK):
            pending.append(pool.submit(_generate_chunk, law.seed, start, min(start + CHUNK, count), *bounds))
        index = 0
        try:
            while pending:
                values, lengths = pending.popleft().result()
                for end, length in zip(lengths.cumsum(), lengths, strict=True):
                    yield _redraw_repeated(values[end - length : end], law, index, seen)
                    index += 1
        finally:
            pool.shutdown(cancel_futures=True)


def _redraw_repeated(expression: np.ndarray, law: Law, index: int, seen: set[bytes]) -> np.ndarray:
    """Redraw an expression until it differs from all earlier ones. seen: their digests, to which its own is added."""
    redraw = 0
    while (digest := hashlib.blake2b(expression.tobytes(), digest_size=16).digest()) in seen:
        redraw += 1
        if redraw == 10_000:
            raise DataError(
                f"{law} has too few different expressions: example {index} repeats an earlier one after 10,000 redraws"
            )
        out = np.empty(law.shorter_than, np.uint8)
        bounds = (law.depth, law.arity, law.longer_than, law.shorter_than)
        expression = out[: generate(law.seed, index, redraw, *bounds, out)]
    seen.add(digest)
    return expression
