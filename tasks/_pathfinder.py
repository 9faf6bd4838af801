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

import numpy as np

from lra.tasks._pathfinder_growth import draw
from lra.tasks._pathfinder_stamps import SCALE, half_width, lanczos, stamps


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
    plan = (drawing.contour_length, drawing.distractor_length, drawing.distractors, 2 * drawing.seed_distance)
    lights = (round(100 * drawing.contour_light), round(100 * drawing.distractor_light))
    disc = np.array([isqrt(radius**2 - y**2) for y in range(-radius, radius + 1)])
    fine = lanczos(SCALE * size, size)
    for which, margin in enumerate(drawing.paddle_margins):
        tables = stamps(*shape, margin, drawing.continuity, drawing.seed_distance, size + 2 * pad)
        choice = (np.uint64(seed), start, which, len(drawing.paddle_margins))
        frame = (size, pad, size + 2 * pad, drawing.padding)
        if not draw(*choice, frame, plan, lights, tuple(tables), disc, fine, images, labels, tips):
            raise ValueError(f"two contours of {drawing.contour_length} paddles do not fit into {drawing}")
    return images, labels, tips
