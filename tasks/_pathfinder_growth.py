"""How Pathfinder contours grow: seeds, paddles and what they keep clear of, compiled.

A mask is a flattened square picture, 255 in a frame of `pad` pixels around the image and in the padding inside it, as
wide as a stamp reaches, so that nothing needs clipping. A paddle is three numbers: its stamp, and the place of its
centre in the mask, y and x. A state is where a contour has got to: the pivot of its last paddle and its direction.
"""

from __future__ import annotations

import numba
import numpy as np

from lra.tasks._pathfinder_stamps import DEGREES, OVERLAP, UNIT

TRIES = 3  # at placing a paddle before its contour is given up
GUESSES = 32  # at a free place before all of them are counted
OCCUPIED = 77  # 0.3 of 255, rounded up: no seed may touch it
DEAD_END = 255 * UNIT // 10_000


@numba.njit(nogil=True, cache=True)
def mix(x):  # type: ignore[no-untyped-def]
    """The output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def below(stream, n):  # type: ignore[no-untyped-def]
    """The next whole number of the stream, uniform in 0..n - 1; n below 2**32."""
    stream[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mix(stream[0]) >> np.uint64(32)) * np.uint64(n) >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def clear(canvas, mask):  # type: ignore[no-untyped-def]
    """Empty the mask but for its frame. Returns nothing."""
    width, edge = canvas.width, canvas.pad + canvas.padding
    mask[:] = 255
    for y in range(edge, width - edge):
        mask[y * width + edge : (y + 1) * width - edge] = 0


@numba.njit(nogil=True, cache=True)
def grow(canvas, tables, stream, mask, border, cumulative, states, paddles):  # type: ignore[no-untyped-def]
    """Grow one contour, or two in turn. paddles: (n, contours, 3), written; False, mask half done, where one is stuck.

    border: kept free of the first seed. states: (contours, 3), cumulative: (K,), scratch. The newest paddle of a
    contour is no obstacle yet, and the last of the first of two contours never becomes one.
    """
    contours = paddles.shape[1]
    if not seed(canvas, tables, stream, mask, border, paddles[0, 0], states[0]):
        return False
    if contours == 2 and not second_seed(canvas, tables, stream, paddles[0], states[1]):
        return False
    for step in range(1, len(paddles)):
        for which in range(contours):
            last, new = paddles[step - 1, which], paddles[step, which]
            if not extend(canvas, tables, stream, mask, cumulative, states[which], last, new):
                return False
    cover(canvas, tables, mask, paddles[-1, -1])
    return True


@numba.njit(nogil=True, cache=True, forceinline=True)
def second_seed(canvas, tables, stream, paddles, state):  # type: ignore[no-untyped-def]
    """Put down the second contour's first paddle at the right distance from the first's."""
    for _ in range(TRIES):
        turn, place = below(stream, DEGREES), below(stream, DEGREES)
        paddles[1, 1] = paddles[0, 1] + canvas.second[place, 0]
        paddles[1, 2] = paddles[0, 2] + canvas.second[place, 1]
        if set_out(canvas, tables, turn, paddles[1], state):
            return True
    return False


@numba.njit(nogil=True, cache=True, forceinline=True)
def seed(canvas, tables, stream, mask, border, paddle, state):  # type: ignore[no-untyped-def]
    """Put down a first paddle in a uniform direction at a uniform place among those free, `border` from the edge."""
    low = max(border - canvas.pad, 0)
    span = canvas.size - 2 * low
    low += canvas.pad
    for _ in range(TRIES):
        turn = below(stream, DEGREES)
        if tables.footprints[turn] == 0:
            return False
        found = False
        for _ in range(GUESSES):
            paddle[1], paddle[2] = low + below(stream, span), low + below(stream, span)
            found = fits(canvas, tables, turn, mask, border, paddle[1], paddle[2])
            if found:
                break
        if not found:
            places = 0
            for place in range(span * span):
                places += fits(canvas, tables, turn, mask, border, low + place // span, low + place % span)
            if places == 0:
                return False
            left, place = below(stream, places), -1
            while left >= 0:
                place += 1
                paddle[1], paddle[2] = low + place // span, low + place % span
                left -= fits(canvas, tables, turn, mask, border, paddle[1], paddle[2])
        if set_out(canvas, tables, turn, paddle, state):
            return True
    return False


@numba.njit(nogil=True, cache=True, forceinline=True)
def fits(canvas, tables, turn, mask, border, y, x):  # type: ignore[no-untyped-def]
    """Whether a seed's footprint at (y, x) is free; what lies outside the image does not count."""
    size, pad = canvas.size, canvas.pad
    for f in range(tables.footprints[turn]):
        v, u = y + tables.footprint[turn, f, 0] - pad, x + tables.footprint[turn, f, 1] - pad
        if min(v, u) >= 0 and max(v, u) < size:
            framed = min(v, u) < border or max(v, u) >= size - border
            if framed or mask[(v + pad) * canvas.width + u + pad] >= OCCUPIED:
                return False
    return True


@numba.njit(nogil=True, cache=True, forceinline=True)
def set_out(canvas, tables, turn, paddle, state):  # type: ignore[no-untyped-def]
    """Start a contour with its tail at `paddle`; False when its head or its pivot is outside the image."""
    y, x = paddle[1] + tables.head[turn, 0], paddle[2] + tables.head[turn, 1]
    paddle[0] = state[2] = turn
    state[0], state[1] = y + tables.pivot[turn, 0], x + tables.pivot[turn, 1]
    low, high = min(y, x, state[0], state[1]), max(y, x, state[0], state[1])
    return low >= canvas.pad and high < canvas.pad + canvas.size


@numba.njit(nogil=True, cache=True, forceinline=True)
def extend(canvas, tables, stream, mask, cumulative, state, last, new):  # type: ignore[no-untyped-def]
    """Add a paddle: its head is drawn among the candidates around the next pivot, and `last` becomes an obstacle.

    A candidate's odds are its weight times how free the mask is around it. cumulative: scratch, (K,).
    """
    pad, width, direction = canvas.pad, canvas.width, state[2]
    pivot_y, pivot_x = state[0] + tables.advance[direction, 0], state[1] + tables.advance[direction, 1]
    total = 0
    for c in range(tables.choices[direction]):
        k = tables.choice[direction, c]
        y, x = pivot_y + tables.candidate[k, 0], pivot_x + tables.candidate[k, 1]
        if min(y, x) >= pad and max(y, x) < pad + canvas.size:
            nearest, centre = np.uint8(0), y * width + x
            for offset in tables.disc:
                nearest = max(nearest, mask[centre + offset])
                if nearest == 255:
                    break
            total += tables.weight[direction, c] * (255 - np.int64(nearest))
        cumulative[c] = total
    if total < DEAD_END:
        return False
    for _ in range(TRIES):
        draw, c = below(stream, total), 0
        while cumulative[c] <= draw:
            c += 1
        k = tables.choice[direction, c]
        new[0], new[1], new[2] = DEGREES + k, pivot_y + tables.candidate[k, 0], pivot_x + tables.candidate[k, 1]
        if not collides(canvas, tables, mask, new):
            cover(canvas, tables, mask, last)
            state[0], state[1], state[2] = pivot_y, pivot_x, new[0]
            return True
    return False


@numba.njit(nogil=True, cache=True, forceinline=True)
def collides(canvas, tables, mask, paddle):  # type: ignore[no-untyped-def]
    stamp, centre = paddle[0], paddle[1] * canvas.width + paddle[2]
    for s in range(tables.solids[stamp]):
        if np.int64(mask[centre + tables.solid[stamp, s]]) + tables.solidity[stamp, s] >= OVERLAP:
            return True
    return False


@numba.njit(nogil=True, cache=True, forceinline=True)
def cover(canvas, tables, mask, paddle):  # type: ignore[no-untyped-def]
    """Make a paddle an obstacle."""
    stamp, centre = paddle[0], paddle[1] * canvas.width + paddle[2]
    for c in range(tables.covers[stamp]):
        place = centre + tables.covered[stamp, c]
        mask[place] = max(mask[place], tables.cover[stamp, c])
