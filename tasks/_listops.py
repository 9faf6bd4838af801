"""The law of ListOps: expressions drawn from a seed, and their exact evaluation.

As published with arXiv:2011.04006: starting at depth 1, a node above depth 10 is an operator with probability 1/4, else
a uniform digit; at depth 10 always a digit. An operator is uniform on MIN, MAX, MED, SM and has 2..10 arguments,
uniform. MED truncates the half of an even arity, SM is the sum modulo 10. Length counts operators, closing brackets
and digits, and only 500 < length < 2000 is kept. Example i comes from a random stream of its own, a function of the
seed, i and how often i repeated an earlier example; no expression occurs twice. A uniform choice among n is taken from
32 random bits by multiplication, so no choice is off by more than n / 2^32.
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
DEEPEST = 100


@dataclass(frozen=True)
class Law:
    """The parameters of the generator; the lengths are exclusive bounds."""

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
    """Draw expressions from the stream of example `index` until one is kept; write it to `out`, return its length."""
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
def evaluate(tokens: np.ndarray, deepest: int = DEEPEST) -> int:
    """The value of an expression, with or without EOS at its end; -1 where it is malformed.

    Operators deeper than `deepest` (the root's depth is 1) are left out of their parents' arguments with all they
    hold; an operator left without arguments is itself left out, and -1 is returned when that is the root.
    """
    seen = np.zeros((DEEPEST + 1, 10), np.int64)
    arguments = np.zeros(DEEPEST + 1, np.int64)
    operator = np.zeros(DEEPEST + 1, np.int64)
    level = 0
    for i in range(len(tokens)):
        value = int(tokens[i])
        if MIN <= value <= SM:
            level += 1
            if level > DEEPEST:
                return -1
            operator[level] = value
            arguments[level] = 0
            seen[level] = 0
            continue
        if value == CLOSE:
            if level == 0 or (arguments[level] == 0 and deepest >= DEEPEST):
                return -1
            value = _apply(operator[level], seen[level], arguments[level])
            level -= 1
            if level > 0 and (value < 0 or level + 1 > deepest):
                continue
        elif value > CLOSE:
            return -1
        if level == 0:
            at_end = i + 1 == len(tokens) or (i + 2 == len(tokens) and tokens[i + 1] == EOS)
            return value if at_end else -1
        seen[level, value] += 1
        arguments[level] += 1
    return -1


@numba.njit(nogil=True, cache=True)
def _apply(operator: int, seen: np.ndarray, arguments: int) -> int:
    """An operator over a histogram of its arguments; -1 when there are none."""
    if arguments == 0:
        return -1
    if operator == SM:
        total = 0
        for digit in range(10):
            total += digit * seen[digit]
        return total % 10
    low, high = 0, 0
    if operator == MAX:
        low, high = arguments - 1, arguments - 1
    elif operator == MED:
        low, high = (arguments - 1) // 2, arguments // 2
    below, first, second = 0, -1, -1
    for digit in range(10):
        below += seen[digit]
        if first < 0 and below > low:
            first = digit
        if second < 0 and below > high:
            second = digit
    return (first + second) // 2


@numba.njit(nogil=True, cache=True)
def evaluate_many(values: np.ndarray, offsets: np.ndarray, deepest: int = DEEPEST) -> np.ndarray:
    """`evaluate` of every document: (n,) int64."""
    found = np.empty(len(offsets) - 1, np.int64)
    for i in range(len(found)):
        found[i] = evaluate(values[offsets[i] : offsets[i + 1]], deepest)
    return found


@numba.njit(nogil=True, cache=True)
def _generate_chunk(
    seed: int, start: int, stop: int, depth: int, arity: int, longer_than: int, shorter_than: int
) -> tuple[np.ndarray, np.ndarray]:
    values = np.empty((stop - start) * shorter_than, np.uint8)
    lengths = np.empty(stop - start, np.int64)
    total = 0
    for i in range(stop - start):
        out = values[total:]
        lengths[i] = generate(seed, start + i, 0, depth, arity, longer_than, shorter_than, out)
        total += lengths[i]
    return values[:total].copy(), lengths


def expressions(law: Law, count: int, workers: int) -> Iterator[np.ndarray]:
    """The first `count` expressions of a law, all different: uint8 token ids. The same for any number of workers."""
    bounds = (law.depth, law.arity, law.longer_than, law.shorter_than)
    seen: set[bytes] = set()
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for start in range(0, count, CHUNK):
            ahead.append(pool.submit(_generate_chunk, law.seed, start, min(start + CHUNK, count), *bounds))
        index = 0
        try:
            while ahead:
                values, lengths = ahead.popleft().result()
                for end, length in zip(lengths.cumsum(), lengths, strict=True):
                    yield _unseen(values[end - length : end], law, index, seen)
                    index += 1
        finally:
            pool.shutdown(cancel_futures=True)


def _unseen(expression: np.ndarray, law: Law, index: int, seen: set[bytes]) -> np.ndarray:
    """`expression`, or where it repeats an earlier one the first redraw of its index that does not."""
    redraw = 0
    while (digest := hashlib.blake2b(expression.tobytes(), digest_size=16).digest()) in seen:
        redraw += 1
        if redraw == 10_000:
            raise DataError(f"{law} has too few different expressions: number {index} cannot be made new")
        out = np.empty(law.shorter_than, np.uint8)
        bounds = (law.depth, law.arity, law.longer_than, law.shorter_than)
        expression = out[: generate(law.seed, index, redraw, *bounds, out)]
    seen.add(digest)
    return expression
