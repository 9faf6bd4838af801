"""Pathfinder images, arXiv:1805.08315, with the settings of the Long Range Arena, arXiv:2011.04006.

Two contours of equal length grow in turns, paddle by paddle. Each paddle turns little from the previous one and does
not touch what is drawn already; shorter distractors follow. Two discs mark the start of one contour and the end of the
same contour (label 1) or of the other one (label 0).

Reimplements the original generator (github.com/drewlinsley/pathfinder, 7b53886), including its peculiarities: at 32
pixels distractors are brighter than contours, and most directions never start one. Departures: every image has its own
random stream, so image i does not depend on the number of workers; probabilities are multiples of 2^-16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

import numpy as np

from lra.tasks._pathfinder_growth import draw
from lra.tasks._pathfinder_stamps import SCALE, half_width, lanczos, stamps


@dataclass(frozen=True)
class Drawing:
    """Parameters of an image. Lengths are in pixels, those of contours and distractors in paddles.

    seed_distance: distance between the starts of the two contours, and half the width of the border in which the first
    one does not start. paddle_margins: one of them is chosen per image. continuity: larger values make turns less
    likely. contour_light, distractor_light: brightness relative to the discs. Raises ValueError for values that cannot
    be drawn.
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
            raise ValueError(f"size is {self.size}; more than 4 * seed_distance = {4 * self.seed_distance}")
        if self.contour_length < 2 or self.distractor_length < 1 or self.distractors < 0 or not self.paddle_margins:
            raise ValueError(
                "contours need at least 2 paddles, distractors at least 1, and paddle_margins at least one entry"
            )
        if min(self.padding, self.paddle_length, *self.paddle_margins) < 1:
            raise ValueError("padding, paddle_length and paddle_margins are at least 1 pixel")
        if SCALE * self.paddle_thickness < 1 or SCALE * self.paddle_thickness % 1:
            raise ValueError(f"paddle_thickness is {self.paddle_thickness}; a multiple of {1 / SCALE}")


DISTRACTOR_PADDLES = {32: 20, 64: 22, 128: 35, 256: 30}
"""Size -> paddles of all distractors together."""
HARD = {
    32: Drawing(),
    64: Drawing(
        size=64,
        distractors=5,
        seed_distance=12,
        marker_radius=2.5,
        paddle_length=5,
        paddle_thickness=1,
        continuity=1.8,
        contour_light=0.8,
        distractor_light=0.8,
    ),
    128: Drawing(
        size=128,
        distractors=8,
        seed_distance=20,
        marker_radius=3,
        paddle_length=5,
        paddle_thickness=1.5,
        paddle_margins=(2, 3),
        continuity=1.8,
        contour_light=0.9,
        distractor_light=0.9,
    ),
    256: Drawing(
        size=256,
        distractors=7,
        padding=22,
        seed_distance=27,
        marker_radius=5,
        paddle_length=5,
        paddle_thickness=2,
        paddle_margins=(3,),
        continuity=1.8,
        contour_light=1,
        distractor_light=1,
    ),
}


def lra_drawing(size: int, contour_length: int = 14, distractors: int | None = None) -> Drawing:
    """The settings of the Long Range Arena.

    size: 32, 64, 128 or 256; contour_length: 6 (easy), 9 (intermediate) or 14 (hard).

    Distractors have a third of the paddles of a contour, and their default number is such that together they have
    DISTRACTOR_PADDLES. The published notes state this for 14 paddles; for 6 and 9 it is an assumption.
    """
    if size not in HARD:
        raise ValueError(f"size is {size}; one of {', '.join(map(str, HARD))}")
    if contour_length < 3:
        raise ValueError(f"contour_length is {contour_length}; at least 3")
    length = contour_length // 3
    number = DISTRACTOR_PADDLES[size] // length if distractors is None else distractors
    return replace(HARD[size], contour_length=contour_length, distractor_length=length, distractors=number)


def generate(drawing: Drawing, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images start..stop - 1: pixels (n, size, size) uint8, labels (n,) uint8, disc centres (n, 2, 2) as (y, x).

    The first disc is at the start of a contour. Pixels range from 0 to 255 in every image. Raises ValueError if the
    contours do not fit into the image.
    """
    n, size, radius = stop - start, drawing.size, int(SCALE * drawing.marker_radius)
    images = np.zeros((n, size, size), np.uint8)
    labels, tips = np.zeros(n, np.uint8), np.zeros((n, 2, 2), np.int64)
    shape = (drawing.paddle_length, drawing.paddle_thickness)
    # heads are rounded up, so a tail may lie one pixel outside the image
    pad = half_width(*shape, max(drawing.paddle_margins)) + 1
    frame = (size, pad, size + 2 * pad, drawing.padding)
    plan = (drawing.contour_length, drawing.distractor_length, drawing.distractors, 2 * drawing.seed_distance, 1)
    lights = (round(100 * drawing.contour_light), round(100 * drawing.distractor_light))
    disc = np.array([isqrt(radius**2 - y**2) for y in range(-radius, radius + 1)])
    weights = lanczos(SCALE * size, size)
    for which, margin in enumerate(drawing.paddle_margins):
        tables = stamps(*shape, margin, drawing.continuity, drawing.seed_distance, frame[2])
        choice = (np.uint64(seed), start, which, len(drawing.paddle_margins))
        picture = (tables.paddle.copy(), lights, disc, weights)
        if not draw(*choice, frame, plan, tables.seeding(), tables.growing(), *picture, images, labels, tips):
            raise ValueError(f"two contours of {drawing.contour_length} paddles do not fit into {drawing}")
    return images, labels, tips
