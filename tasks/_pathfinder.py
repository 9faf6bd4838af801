"""The Pathfinder generator, arXiv:1805.08315, with the settings of the Long Range Arena, arXiv:2011.04006.

Two contours of equal length are grown in lock-step, each paddle turning little from the last and keeping clear of all
that is drawn; shorter distractors follow. Two discs mark the start of one contour and the end of the same contour
(label 1) or of the other (label 0). Rebuilt from the rules of the original (github.com/drewlinsley/pathfinder,
7b53886), its quirks included: the newest paddle of a contour is no obstacle yet, the last of the first contour never
becomes one, and at 32 pixels distractors are brighter than contours. Departures: a random stream of its own per image,
so image i is the same for any number of workers, and whole numbers where the original rounds floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import numba
import numpy as np

from lra.tasks._pathfinder_stamps import DEGREES, FIXED, SCALE, UNIT, Stamps, degrees, lanczos, polar, stamps

TRIES = 3  # at placing a paddle before its contour is given up
DISTRACTOR_TRIES = 5
RESTARTS = 1_000_000  # of an image before its drawing counts as impossible; 32 pixels take some 400
GUESSES = 32  # at a free place before all of them are counted
OCCUPIED = 77  # 0.3 of 255, rounded up: no seed may touch it
OVERLAP = 459  # 1.8 times 255: two masks that add up to this collide
DEAD_END = 255 * UNIT // 10_000


@dataclass(frozen=True)
class Drawing:
    """What an image is drawn by; lengths in pixels of the image, contours in paddles.

    seed_distance: between the starts of the contours, and half the border kept free of the first. paddle_margins: one
    is drawn per image. continuity: how much a turn is resisted. contour_light, distractor_light: brightness over that
    of the markers. Raises ValueError for what cannot be drawn.
    """

    size: int = 32
    contour_length: int = 14
    distractor_length: int = 4
    distractors: int = 5
    padding: int = 1
    seed_distance: int = 7
    marker_radius: float = 1.5
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    paddle_margins: tuple[int, ...] = (1,)
    continuity: float = 1.0
    contour_light: float = 1.5
    distractor_light: float = 2.0

    def __post_init__(self) -> None:
        if 4 * self.seed_distance >= self.size:
            raise ValueError(f"size {self.size} leaves no room between borders of 2 * seed_distance {self.seed_distance}")
        if self.contour_length < 2 or self.distractor_length < 1 or self.distractors < 0 or not self.paddle_margins:
            raise ValueError("a drawing has contours of at least 2 paddles, distractors of 1 and a paddle margin")
        if min(self.paddle_margins) < 1 or self.padding < 1 or self.paddle_length < 1:
            raise ValueError("margins, padding and paddles measure at least 1 pixel")
        if SCALE * self.paddle_thickness < 1 or SCALE * self.paddle_thickness % 1:
            raise ValueError(f"paddle_thickness {self.paddle_thickness} is not a multiple of {1 / SCALE}")


class Canvas(NamedTuple):
    """What all images of a drawing share.

    second: (360, 2) from the first seed to the second; marker: half the width of the disc in each row, in fine pixels;
    filter: (size, 2 * size), scales the fine pixels down. Lights are in hundredths of a marker's.
    """

    second: np.ndarray
    marker: np.ndarray
    filter: np.ndarray
    size: int
    padding: int
    border: int
    contour: int
    distractor: int
    distractors: int
    contour_light: int
    distractor_light: int


def generate(drawing: Drawing, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images start..stop - 1: pixels (n, size, size) uint8, labels (n,) uint8, marker centres (n, 2, 2) as (y, x).

    The first marker is at the start of a contour. The darkest pixel of every image is 0, the brightest 255.
    Raises ValueError when the drawing leaves no room for its contours.
    """
    n, size, radius = stop - start, drawing.size, SCALE * drawing.marker_radius
    images = np.zeros((n, size, size), np.uint8)
    labels, tips = np.zeros(n, np.uint8), np.zeros((n, 2, 2), np.int64)
    canvas = Canvas(
        np.rint(polar(degrees(), drawing.seed_distance)).astype(np.int64),
        np.array([isqrt(int(radius**2) - y**2) for y in range(-int(radius), int(radius) + 1)]),
        lanczos(SCALE * size, size),
        size,
        drawing.padding,
        2 * drawing.seed_distance,
        drawing.contour_length,
        drawing.distractor_length,
        drawing.distractors,
        round(100 * drawing.contour_light),
        round(100 * drawing.distractor_light),
    )
    for which, margin in enumerate(drawing.paddle_margins):
        tables = stamps(drawing.paddle_length, drawing.paddle_thickness, margin, drawing.continuity)
        choice = (np.uint64(seed), start, which, len(drawing.paddle_margins))
        if not _draw_all(*choice, canvas, tables, images, labels, tips):
            raise ValueError(f"two contours of {drawing.contour_length} paddles do not fit into {drawing}")
    return images, labels, tips


@numba.njit(nogil=True, cache=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """The output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _below(stream, n):  # type: ignore[no-untyped-def]
    """The next whole number of the stream, uniform in 0..n - 1; n below 2**32."""
    stream[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64((_mix(stream[0]) >> np.uint64(32)) * np.uint64(n) >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def _draw_all(seed, start, which, choices, canvas, tables, images, labels, tips):  # type: ignore[no-untyped-def]
    """Draw the images whose margin is number `which` of `choices`; False when one cannot be drawn."""
    size = canvas.size
    mask, saved = np.empty((size, size), np.uint8), np.empty((size, size), np.uint8)
    light = np.empty((size, size), np.int32)
    stream, cumulative = np.empty(1, np.uint64), np.empty(len(tables.candidate), np.int64)
    contours = np.empty((canvas.contour, 2, 3), np.int64)
    distractor = np.empty((canvas.distractor, 3), np.int64)
    for i in range(len(labels)):
        stream[0] = _mix(_mix(seed + np.uint64(1)) + np.uint64(start + i))
        if _below(stream, choices) != which:
            continue
        labels[i] = _below(stream, 2)
        restarts = 0
        while not _two_contours(canvas, tables, stream, mask, cumulative, contours):
            restarts += 1
            if restarts == RESTARTS:
                return False
        light[:] = 0
        for step in range(canvas.contour):
            for contour in range(2):
                _lighten(light, tables.paddle, contours[step, contour], canvas.contour_light)
        for _ in range(canvas.distractors):
            for _ in range(DISTRACTOR_TRIES):
                saved[:] = mask
                if _contour(tables, stream, mask, cumulative, distractor):
                    for step in range(canvas.distractor):
                        _lighten(light, tables.paddle, distractor[step], canvas.distractor_light)
                    break
                mask[:] = saved
        marked = _below(stream, 2)
        tips[i, 0] = contours[0, marked, 1:]
        tips[i, 1] = contours[-1, marked if labels[i] else 1 - marked, 1:]
        for tip in range(2):
            _mark(light, canvas, tips[i, tip, 0], tips[i, tip, 1])
        brightest = light.max()
        for y in range(size):
            for x in range(size):
                images[i, y, x] = (510 * light[y, x] + brightest) // (2 * brightest)
    return True


@numba.njit(nogil=True, cache=True)
def _two_contours(canvas, tables, stream, mask, cumulative, contours):  # type: ignore[no-untyped-def]
    """Grow both contours over an empty mask. contours: (n, 2, 3), the stamp, y and x of every paddle."""
    size, edge = canvas.size, canvas.padding
    mask[:] = 255
    mask[edge : size - edge, edge : size - edge] = 0
    states = np.empty((2, 3), np.int64)
    if not _seed(tables, stream, mask, canvas.border, contours[0, 0], states[0]):
        return False
    for _ in range(TRIES):
        turn, place = _below(stream, DEGREES), _below(stream, DEGREES)
        contours[0, 1, 1:] = contours[0, 0, 1:] + canvas.second[place]
        placed = _set_out(tables, turn, size, contours[0, 1], states[1])
        if placed:
            break
    if not placed:
        return False
    for step in range(1, canvas.contour):
        for which in range(2):
            last, new = contours[step - 1, which], contours[step, which]
            if not _extend(tables, stream, mask, cumulative, states[which], last, new):
                return False
    _cover(mask, tables.mask, contours[-1, 1])
    return True


@numba.njit(nogil=True, cache=True)
def _contour(tables, stream, mask, cumulative, paddles):  # type: ignore[no-untyped-def]
    """Grow one distractor anywhere. paddles: (n, 3)."""
    free = 0
    for y in range(len(mask)):
        for x in range(len(mask)):
            free += mask[y, x] < OCCUPIED
    state = np.empty(3, np.int64)
    if 100 * free < mask.size or not _seed(tables, stream, mask, 1, paddles[0], state):
        return False
    for step in range(1, len(paddles)):
        if not _extend(tables, stream, mask, cumulative, state, paddles[step - 1], paddles[step]):
            return False
    _cover(mask, tables.mask, paddles[-1])
    return True


@numba.njit(nogil=True, cache=True)
def _seed(tables, stream, mask, border, paddle, state):  # type: ignore[no-untyped-def]
    """A first paddle in a uniform direction at a uniform free place. state: y and x of the pivot, direction."""
    size = len(mask)
    low = max(border - len(tables.mask[0]), 0)
    span = size - 2 * low
    for _ in range(TRIES):
        turn = _below(stream, DEGREES)
        found = False
        for _ in range(GUESSES):
            y, x = low + _below(stream, span), low + _below(stream, span)
            if _fits(tables, turn, mask, border, y, x):
                found = True
                break
        if not found:
            places = 0
            for place in range(span * span):
                places += _fits(tables, turn, mask, border, low + place // span, low + place % span)
            if places == 0:
                return False
            left, place = _below(stream, places), -1
            while left >= 0:
                place += 1
                left -= _fits(tables, turn, mask, border, low + place // span, low + place % span)
            y, x = low + place // span, low + place % span
        paddle[1], paddle[2] = y, x
        if _set_out(tables, turn, size, paddle, state):
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _fits(tables, turn, mask, border, y, x):  # type: ignore[no-untyped-def]
    """Whether a seed's footprint at (y, x) is free; what lies outside the image does not count."""
    size = len(mask)
    for f in range(tables.footprints[turn]):
        v, u = y + tables.footprint[turn, f, 0], x + tables.footprint[turn, f, 1]
        if 0 <= v < size and 0 <= u < size:
            framed = min(v, u) < border or max(v, u) >= size - border
            if framed or mask[v, u] >= OCCUPIED:
                return False
    return True


@numba.njit(nogil=True, cache=True)
def _set_out(tables, turn, size, paddle, state):  # type: ignore[no-untyped-def]
    """Start a contour with its tail at `paddle`; False when its head or its pivot is outside the image."""
    y, x = paddle[1] + tables.head[turn, 0], paddle[2] + tables.head[turn, 1]
    paddle[0] = state[2] = turn
    state[0], state[1] = y + tables.pivot[turn, 0], x + tables.pivot[turn, 1]
    return 0 <= min(y, x, state[0], state[1]) and max(y, x, state[0], state[1]) < size


@numba.njit(nogil=True, cache=True)
def _extend(tables, stream, mask, cumulative, state, last, new):  # type: ignore[no-untyped-def]
    """Add a paddle: its head is drawn among the candidates around the next pivot; `last` becomes an obstacle."""
    size, direction = len(mask), state[2]
    pivot_y, pivot_x = state[0] + tables.advance[direction, 0], state[1] + tables.advance[direction, 1]
    total = 0
    for k in range(len(cumulative)):
        y, x = pivot_y + tables.candidate[k, 0], pivot_x + tables.candidate[k, 1]
        if tables.weight[direction, k] and 0 <= min(y, x) and max(y, x) < size:
            nearest = 0
            for d in range(len(tables.disc)):
                v, u = y + tables.disc[d, 0], x + tables.disc[d, 1]
                if 0 <= min(v, u) and max(v, u) < size:
                    nearest = max(nearest, np.int64(mask[v, u]))
                    if nearest == 255:
                        break
            total += tables.weight[direction, k] * (255 - nearest)
        cumulative[k] = total
    if total < DEAD_END:
        return False
    for _ in range(TRIES):
        draw, k = _below(stream, total), 0
        while cumulative[k] <= draw:
            k += 1
        new[0], new[1], new[2] = DEGREES + k, pivot_y + tables.candidate[k, 0], pivot_x + tables.candidate[k, 1]
        if not _collides(mask, tables.mask, new):
            _cover(mask, tables.mask, last)
            state[0], state[1], state[2] = pivot_y, pivot_x, new[0]
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _collides(mask, stamps, paddle):  # type: ignore[no-untyped-def]
    size, width = len(mask), stamps.shape[1]
    top, left = paddle[1] - width // 2, paddle[2] - width // 2
    for y in range(max(top, 0), min(top + width, size)):
        for x in range(max(left, 0), min(left + width, size)):
            if np.int64(mask[y, x]) + np.int64(stamps[paddle[0], y - top, x - left]) >= OVERLAP:
                return True
    return False


@numba.njit(nogil=True, cache=True)
def _cover(mask, stamps, paddle):  # type: ignore[no-untyped-def]
    size, width = len(mask), stamps.shape[1]
    top, left = paddle[1] - width // 2, paddle[2] - width // 2
    for y in range(max(top, 0), min(top + width, size)):
        for x in range(max(left, 0), min(left + width, size)):
            mask[y, x] = max(mask[y, x], stamps[paddle[0], y - top, x - left])


@numba.njit(nogil=True, cache=True)
def _lighten(light, stamps, paddle, strength):  # type: ignore[no-untyped-def]
    size, width = len(light), stamps.shape[1]
    top, left = paddle[1] - width // 2, paddle[2] - width // 2
    for y in range(max(top, 0), min(top + width, size)):
        for x in range(max(left, 0), min(left + width, size)):
            light[y, x] = max(light[y, x], strength * np.int32(stamps[paddle[0], y - top, x - left]))


@numba.njit(nogil=True, cache=True)
def _mark(light, canvas, y, x):  # type: ignore[no-untyped-def]
    """A disc, scaled down from fine pixels: along the rows, then along the columns, each rounded to 8 bits."""
    size, radius = canvas.size, len(canvas.marker) // 2
    reach, half = radius // SCALE + 4, 1 << (FIXED - 1)
    first, last = max(x - reach, 0), min(x + reach + 1, size)
    across = np.zeros((2 * radius + 1, last - first), np.int64)
    for row in range(2 * radius + 1):
        width = canvas.marker[row]
        for column in range(first, last):
            total = half
            for fine in range(max(SCALE * x - width, 0), min(SCALE * x + width + 1, SCALE * size)):
                total += 255 * canvas.filter[column, fine]
            across[row, column - first] = min(max(total >> FIXED, 0), 255)
    top = SCALE * y - radius
    for v in range(max(y - reach, 0), min(y + reach + 1, size)):
        for column in range(first, last):
            total = half
            for fine in range(max(top, 0), min(SCALE * y + radius + 1, SCALE * size)):
                total += canvas.filter[v, fine] * across[fine - top, column - first]
            light[v, column] = max(light[v, column], np.int32(100 * min(max(total >> FIXED, 0), 255)))
