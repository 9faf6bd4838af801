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

from lra.tasks._pathfinder_growth import OCCUPIED, below, clear, grow, mix
from lra.tasks._pathfinder_stamps import FIXED, SCALE, degrees, half_width, lanczos, polar, stamps

DISTRACTOR_TRIES = 5
RESTARTS = 1_000_000  # of an image before its drawing counts as impossible; some hundreds are usual


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
    """What all images of a drawing share; `width` is size plus a pad on both sides.

    second: (360, 2) from the first seed to the second; marker: half the width of a disc in each row, in fine pixels;
    filter: (size, 2 * size), scales the fine pixels down. Lights are in hundredths of a marker's.
    """

    second: np.ndarray
    marker: np.ndarray
    filter: np.ndarray
    size: int
    pad: int
    width: int
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
    n, size, radius = stop - start, drawing.size, int(SCALE * drawing.marker_radius)
    images = np.zeros((n, size, size), np.uint8)
    labels, tips = np.zeros(n, np.uint8), np.zeros((n, 2, 2), np.int64)
    shape = (drawing.paddle_length, drawing.paddle_thickness)
    pad = half_width(*shape, max(drawing.paddle_margins))
    canvas = Canvas(
        np.rint(polar(degrees(), drawing.seed_distance)).astype(np.int64),
        np.array([isqrt(radius**2 - y**2) for y in range(-radius, radius + 1)]),
        lanczos(SCALE * size, size),
        size,
        pad,
        size + 2 * pad,
        drawing.padding,
        2 * drawing.seed_distance,
        drawing.contour_length,
        drawing.distractor_length,
        drawing.distractors,
        round(100 * drawing.contour_light),
        round(100 * drawing.distractor_light),
    )
    for which, margin in enumerate(drawing.paddle_margins):
        tables = stamps(*shape, margin, drawing.continuity, canvas.width)
        choice = (np.uint64(seed), start, which, len(drawing.paddle_margins))
        if not _draw(*choice, canvas, tables, images, labels, tips):
            raise ValueError(f"two contours of {drawing.contour_length} paddles do not fit into {drawing}")
    return images, labels, tips


@numba.njit(nogil=True, cache=True)
def _draw(seed, start, which, choices, canvas, tables, images, labels, tips):  # type: ignore[no-untyped-def]
    """Draw the images whose margin is number `which` of `choices`; False when one cannot be drawn."""
    size, pad, width = canvas.size, canvas.pad, canvas.width
    mask, saved = np.empty(width**2, np.uint8), np.empty(width**2, np.uint8)
    light = np.empty((width, width), np.int32)
    stream, cumulative = np.empty(1, np.uint64), np.empty(len(tables.candidate), np.int64)
    states = np.empty((2, 3), np.int64)
    contours = np.empty((canvas.contour, 2, 3), np.int64)
    distractor = np.empty((canvas.distractor, 1, 3), np.int64)
    for i in range(len(labels)):
        stream[0] = mix(mix(seed + np.uint64(1)) + np.uint64(start + i))
        if below(stream, choices) != which:
            continue
        labels[i] = below(stream, 2)
        restarts, done = 0, False
        while not done:
            clear(canvas, mask)
            done = grow(canvas, tables, stream, mask, canvas.border, cumulative, states, contours)
            restarts += 1
            if restarts == RESTARTS:
                return False
        light[:] = 0
        _lighten(light, tables.paddle, contours, canvas.contour_light)
        for _ in range(canvas.distractors):
            for _ in range(DISTRACTOR_TRIES):
                saved[:] = mask
                if 100 * (mask < OCCUPIED).sum() < size**2:
                    break
                if grow(canvas, tables, stream, mask, 1, cumulative, states, distractor):
                    _lighten(light, tables.paddle, distractor, canvas.distractor_light)
                    break
                mask[:] = saved
        marked = below(stream, 2)
        for axis in range(2):
            tips[i, 0, axis] = contours[0, marked, 1 + axis] - pad
            tips[i, 1, axis] = contours[-1, marked if labels[i] else 1 - marked, 1 + axis] - pad
        for tip in range(2):
            _mark(light, canvas, tips[i, tip, 0], tips[i, tip, 1])
        brightest = light[pad : pad + size, pad : pad + size].max()
        for y in range(size):
            for x in range(size):
                images[i, y, x] = (510 * light[pad + y, pad + x] + brightest) // (2 * brightest)
    return True


@numba.njit(nogil=True, cache=True)
def _lighten(light, stamps, contours, strength):  # type: ignore[no-untyped-def]
    """Draw contours where they are brighter than what is there."""
    side = stamps.shape[1]
    for paddle in contours.reshape(-1, 3):
        top, left = paddle[1] - side // 2, paddle[2] - side // 2
        for y in range(side):
            for x in range(side):
                bright = np.int32(strength * np.int64(stamps[paddle[0], y, x]))
                light[top + y, left + x] = max(light[top + y, left + x], bright)


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
            bright = np.int32(100 * min(max(total >> FIXED, 0), 255))
            light[canvas.pad + v, canvas.pad + column] = max(light[canvas.pad + v, canvas.pad + column], bright)
