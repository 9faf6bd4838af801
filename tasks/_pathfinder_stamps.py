"""Tables for drawing Pathfinder images: paddles in every direction, their masks, and the possible next paddles.

A paddle is a line drawn at twice the resolution and scaled down with a Lanczos filter in 8-bit fixed point; both steps
give the pixels that Pillow gives. Its mask is the line dilated by a disc before scaling. In all 360 directions the
stamps equal those of the original generator (github.com/drewlinsley/pathfinder, 7b53886) pixel by pixel. All tables
hold integers, so images do not depend on the floating-point library of a machine.
"""

from __future__ import annotations

from functools import cache
from math import ceil, floor, hypot, pi
from typing import NamedTuple

import numpy as np

from lra.tasks._pathfinder_growth import DEGREES, FIXED, OVERLAP, SCALE, UNIT


class Stamps(NamedTuple):
    """Tables for one paddle shape.

    Directions 0..359 are the whole degrees from -180; then follows one direction for each of K candidate heads. Arrays
    are int64 unless stated; positions and displacements are (y, x). Rows of unequal length are filled up with 0.

    paddle, mask: (360 + K, S, S) uint8, centred on the end at which drawing starts; candidates start at the head.
    advance: (360 + K, 2), displacement from one pivot to the next. early: (360 + K, 2), coordinates below this get one
    more. candidate: (K, 2), displacement from pivot to head. turns: (360 + K, C, 2), number and weight of the
    candidates of each direction; choices: (360 + K,), how many it has. head: (360, 2), from tail to head. pivot: (360,
    2), from head to the first pivot. second: (360, 2), from the first paddle of the first contour to that of the
    second. footprint: (360, F, 2), pixels that must be free for a first paddle; footprints: (360,), how many, 0 if none
    may start in this direction. cover: (360 + K, A, 2), the non-zero pixels of a mask, as offsets in a flattened
    picture and values, the largest value first; solid: (360 + K,), how many of them can collide; covered: (360 + K,),
    how many there are. disc: (M,), offsets of the pixels within the margin of a head.
    """

    paddle: np.ndarray
    mask: np.ndarray
    advance: np.ndarray
    early: np.ndarray
    candidate: np.ndarray
    turns: np.ndarray
    choices: np.ndarray
    head: np.ndarray
    pivot: np.ndarray
    second: np.ndarray
    footprint: np.ndarray
    footprints: np.ndarray
    cover: np.ndarray
    solid: np.ndarray
    covered: np.ndarray
    disc: np.ndarray

    def seeding(self) -> tuple[np.ndarray, ...]:
        """Copies of the tables that start a contour: threads that share arrays slow each other down."""
        return tuple(table.copy() for table in (self.head, self.pivot, self.second, self.footprint, self.footprints))

    def growing(self) -> tuple[np.ndarray, ...]:
        """Copies of the tables that continue a contour."""
        moves = (self.advance, self.early, self.candidate, self.turns, self.choices)
        return tuple(table.copy() for table in (*moves, self.cover, self.solid, self.covered, self.disc))


def polar(angle: np.ndarray, radius: float) -> np.ndarray:
    """Displacements (y, x): (n, 2), rounded to 1e-9 because the last bits of sin and cos differ between machines."""
    return np.round(radius * np.stack([np.sin(angle), np.cos(angle)], -1), 9)


def degrees() -> np.ndarray:
    """The whole degrees from -180 in radians: (360,)."""
    return np.arange(-180, 180) * pi / 180


def round_up(displacement: np.ndarray) -> np.ndarray:
    return np.ceil(displacement).astype(np.int64)


def disc(radius: int) -> np.ndarray:
    """Offsets of the pixels within `radius`: (M, 2)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(y**2 + x**2 <= radius**2) - radius


def half_width(length: int, thickness: float, margin: int) -> int:
    """Half the side of a stamp, in pixels."""
    return length + ceil(thickness) + margin


@cache
def stamps(length: int, thickness: float, margin: int, continuity: float, seed_distance: int, width: int) -> Stamps:
    """Compute the tables of a paddle.

    length, thickness: in pixels; margin: distance to the next paddle; width: of the mask.
    """
    reach = length + margin
    samples = np.arange(ceil(2 * pi * reach)) / reach
    candidate = np.unique(np.floor(polar(samples, reach)).astype(np.int64), axis=0)
    turn = np.arctan2(candidate[:, 0], candidate[:, 1])
    angle = np.concatenate([degrees(), turn])
    ends = round_up(polar(np.concatenate([degrees(), turn + pi]), SCALE * length))
    ends[[60, 300], 1] += 1  # twice the cosine of 120 degrees exceeds -1 in the original's floats
    pictures = [_paddle(*end, length, thickness, margin) for end in ends.tolist()]
    paddle, mask = (np.stack(p) for p in zip(*pictures, strict=True))
    difference = np.abs(turn - angle[:, None])
    bend = np.minimum(np.minimum(difference, 2 * pi - difference) * continuity, pi / 2)
    weight = np.rint(UNIT * np.cos(bend) ** 2).astype(np.int64)
    turns, choices = _pad_rows([np.stack([np.flatnonzero(row), row[row > 0]], 1) for row in weight])
    footprint, footprints = _footprints(mask[:DEGREES], reach)
    cover, covered = _pad_rows([_nonzero_pixels(m, width) for m in mask])
    return Stamps(
        paddle,
        mask,
        round_up(polar(angle, length + 2 * margin)),
        _early(angle, length + 2 * margin),
        candidate,
        turns,
        choices,
        round_up(polar(degrees(), length)),
        round_up(-polar(degrees(), reach)),
        np.rint(polar(degrees(), seed_distance)).astype(np.int64),
        footprint,
        footprints,
        cover,
        (mask >= OVERLAP - 255).sum(axis=(1, 2)),
        covered,
        disc(margin) @ [width, 1],
    )


def _early(angle: np.ndarray, distance: int) -> np.ndarray:
    """Coordinates below which the original generator rounds a displacement of 0 up to 1: (n, 2).

    In floating point, the sine of pi and the cosine of pi / 2 are not exactly 0. Near the top and left border this
    moves a contour that runs along the border by one pixel (every thirtieth paddle at 32 pixels).
    """
    small = distance * np.stack([np.sin(angle), np.cos(angle)], -1)
    near = np.ceil(np.arange(64)[:, None, None] + small) > np.arange(64)[:, None, None]
    return np.where(polar(angle, distance) == 0, near.sum(axis=0), 0)


def _nonzero_pixels(mask: np.ndarray, width: int) -> np.ndarray:
    """The non-zero pixels of a mask as offsets from its centre and values, the largest value first: (A, 2)."""
    offsets = (np.argwhere(mask) - len(mask) // 2) @ [width, 1]
    values = mask[mask > 0].astype(np.int64)
    return np.stack([offsets, values], 1)[np.argsort(-values, kind="stable")]


def _pad_rows(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Stack rows of unequal lengths, padded with 0. Returns the array and the lengths."""
    lengths = np.array([len(row) for row in rows])
    table = np.zeros((len(rows), lengths.max(), *rows[0].shape[1:]), np.int64)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table, lengths


def _footprints(masks: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Solid pixels of the masks of first paddles, shifted down and right by one pixel as in the original: see Stamps.

    The original finds no position for a direction whose footprint, placed on a corner of the image, lies outside the
    image. Such directions get an empty footprint.
    """
    footprints = []
    for mask in masks:
        offsets = np.argwhere(mask == 255) - len(mask) // 2 + 1
        offsets = offsets[(np.abs(offsets) <= reach).all(axis=1)]
        corners = [(sy * offsets[:, 0] >= 0) & (sx * offsets[:, 1] >= 0) for sy in (1, -1) for sx in (1, -1)]
        footprints.append(offsets if all(inside.any() for inside in corners) else offsets[:0])
    return _pad_rows(footprints)


@cache
def _paddle(dy: int, dx: int, length: int, thickness: float, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a line from the centre to (dy, dx) and its mask, both scaled down: (S, S) uint8 each."""
    half, width = half_width(length, thickness, margin), round(SCALE * thickness)
    fine = np.zeros((2 * SCALE * half + 1,) * 2, np.uint8)
    centre = SCALE * half
    if width == 1:
        _thin_line(fine, centre, dy, dx)
    else:
        _wide_line(fine, centre, dy, dx, width)
    dilated = np.zeros_like(fine)
    ys, xs = np.nonzero(fine)
    for oy, ox in disc(SCALE * margin):
        dilated[ys + oy, xs + ox] = 255
    return shrink(fine, 2 * half + 1), shrink(dilated, 2 * half + 1)


def _thin_line(image: np.ndarray, centre: int, dy: int, dx: int) -> None:
    """Draw Bresenham's line, one pixel wide, from the centre to (dy, dx)."""
    long, short = max(abs(dy), abs(dx)), min(abs(dy), abs(dx))
    sy, sx = (1 if dy > 0 else -1), (1 if dx > 0 else -1)
    error, aside = 2 * short - long, 0
    for along in range(long):
        y, x = (aside, along) if abs(dx) > abs(dy) else (along, aside)
        image[centre + sy * y, centre + sx * x] = 255
        if error >= 0:
            aside += 1
            error -= 2 * long
        error += 2 * short
    image[centre + dy, centre + dx] = 255


def _wide_line(image: np.ndarray, centre: int, dy: int, dx: int, width: int) -> None:
    """Draw a filled quadrilateral around the line from the centre to (dy, dx); corners and spans are whole pixels."""
    inner, outer = (width - 1) // 2 / hypot(dy, dx), width // 2 / hypot(dy, dx)
    left, right = _round_half_in(inner * dy), _round_half_in(outer * dy)
    above, below = _round_half_out(inner * dx), _round_half_out(outer * dx)
    corners = [(below, -left), (dy + below, dx - left), (dy - above, dx + right), (-above, right)]
    sides = list(zip(corners, corners[1:] + corners[:1], strict=True))
    for y in range(min(y for y, _ in corners), max(y for y, _ in corners) + 1):
        crossings: list[float] = []
        for (ya, xa), (yb, xb) in sides:
            if ya == yb == y:
                crossings += [xa, xb]
            elif ya != yb and min(ya, yb) <= y <= max(ya, yb):
                crossings.append(xa + (xb - xa) * (y - ya) / (yb - ya))
        first, last = floor(min(crossings) + 0.5), ceil(max(crossings) - 0.5)
        image[centre + y, centre + first : centre + last + 1] = 255


def _round_half_out(value: float) -> int:
    """Round to the nearest integer, halves away from zero."""
    return floor(value + 0.5) if value >= 0 else -floor(0.5 - value)


def _round_half_in(value: float) -> int:
    """Round to the nearest integer, halves towards zero."""
    return ceil(value - 0.5) if value >= 0 else -ceil(-value - 0.5)


@cache
def lanczos(source: int, target: int) -> np.ndarray:
    """Fixed-point weights of a Lanczos-3 filter from `source` to `target` < source pixels: (target, source) int64."""
    ratio = source / target
    weights = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * ratio
        first, last = max(int(centre - 3 * ratio + 0.5), 0), min(int(centre + 3 * ratio + 0.5), source)
        x = (np.arange(first, last) - centre + 0.5) / ratio
        raw = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        weights[row, first:last] = raw / raw.sum()
    return np.rint(weights * (1 << FIXED)).astype(np.int64)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Scale a square uint8 image down to (size, size), first along rows, then along columns, each rounded to 8 bits."""
    weights, half = lanczos(len(image), size), 1 << (FIXED - 1)
    across = np.clip((image.astype(np.int64) @ weights.T + half) >> FIXED, 0, 255)
    return np.clip((weights @ across + half) >> FIXED, 0, 255).astype(np.uint8)
