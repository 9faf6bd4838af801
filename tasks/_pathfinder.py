"""The Pathfinder images, arXiv:1805.08315, with the settings of the Long Range Arena, arXiv:2011.04006.

Two contours of equal length are grown in lock-step, each paddle turning little from the last and keeping clear of what
is drawn; shorter distractors follow. Two discs mark the start of one contour and the end of the same contour (label 1)
or of the other (label 0). Rebuilt from the rules of the original (github.com/drewlinsley/pathfinder, 7b53886), quirks
included: at 32 pixels distractors are brighter than contours, and most directions never start one. Departures: every
image has a random stream of its own, so image i is the same for any number of workers; odds are in steps of 2^-16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

import numpy as np

from lra.tasks._pathfinder_growth import draw
from lra.tasks._pathfinder_stamps import SCALE, half_width, lanczos, stamps


@dataclass(frozen=True)
class Drawing:
    """What an image is drawn by; lengths in pixels of the image, contours in paddles.

    seed_distance: between the starts of the contours, and half the border kept free of the first. paddle_margins: one
    is drawn per image. continuity: how much a turn is resisted. contour_light, distractor_light: brightness over that
    of the discs. Raises ValueError for what cannot be drawn.
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
            raise ValueError("contours have at least 2 paddles, distractors at least 1, and there is a paddle margin")
        if min(self.padding, self.paddle_length, *self.paddle_margins) < 1:
            raise ValueError("padding, paddle_length and paddle_margins are at least 1 pixel")
        if SCALE * self.paddle_thickness < 1 or SCALE * self.paddle_thickness % 1:
            raise ValueError(f"paddle_thickness is {self.paddle_thickness}; a multiple of {1 / SCALE}")


DISTRACTING = {32: 20, 64: 22, 128: 35, 256: 30}
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
    """The settings of the arena: size 32, 64, 128 or 256; contour_length 6 (easy), 9 (intermediate) or 14 (hard).

    Distractors are a third as long; as many as have 20, 22, 35 or 30 paddles together, unless given. The arena's notes
    say so of 14; whether its easy and intermediate sets followed is not known.
    """
    if size not in HARD:
        raise ValueError(f"size is {size}; one of {', '.join(map(str, HARD))}")
    if contour_length < 3:
        raise ValueError(f"contour_length is {contour_length}; at least 3")
    length = contour_length // 3
    many = DISTRACTING[size] // length if distractors is None else distractors
    return replace(HARD[size], contour_length=contour_length, distractor_length=length, distractors=many)


def generate(drawing: Drawing, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images start..stop - 1: pixels (n, size, size) uint8, labels (n,) uint8, disc centres (n, 2, 2) as (y, x).

    The first disc is at the start of a contour. The darkest pixel of every image is 0, the brightest 255.
    Raises ValueError when the drawing leaves no room for its contours.
    """
    n, size, radius = stop - start, drawing.size, int(SCALE * drawing.marker_radius)
    images = np.zeros((n, size, size), np.uint8)
    labels, tips = np.zeros(n, np.uint8), np.zeros((n, 2, 2), np.int64)
    shape = (drawing.paddle_length, drawing.paddle_thickness)
    # a tail may lie a pixel outside the image, because heads are rounded up
    pad = half_width(*shape, max(drawing.paddle_margins)) + 1
    frame = (size, pad, size + 2 * pad, drawing.padding)
    plan = (drawing.contour_length, drawing.distractor_length, drawing.distractors, 2 * drawing.seed_distance, 1)
    lights = (round(100 * drawing.contour_light), round(100 * drawing.distractor_light))
    disc = np.array([isqrt(radius**2 - y**2) for y in range(-radius, radius + 1)])
    fine = lanczos(SCALE * size, size)
    for which, margin in enumerate(drawing.paddle_margins):
        tables = stamps(*shape, margin, drawing.continuity, drawing.seed_distance, frame[2])
        choice = (np.uint64(seed), start, which, len(drawing.paddle_margins))
        picture = (tables.paddle.copy(), lights, disc, fine)
        if not draw(*choice, frame, plan, tables.seeding(), tables.growing(), *picture, images, labels, tips):
            raise ValueError(f"two contours of {drawing.contour_length} paddles do not fit into {drawing}")
    return images, labels, tips
