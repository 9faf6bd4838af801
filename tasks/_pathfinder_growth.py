"""Compiled drawing of Pathfinder images: first paddles, growing contours and obstacles.

All compiled code and its constants are in this file, because Numba's cache only checks the file of a function.

A mask is a flattened square picture of obstacles: 0 is free, 255 is occupied. It extends `pad` pixels beyond the image
on each side, so that stamps need no clipping; these pixels and the padding inside the image are 255. A paddle is three
numbers: its stamp and the position of its centre in the mask, y and x. The state of a contour is the pivot of its last
paddle and its direction.
"""

from __future__ import annotations

import numba
import numpy as np

SCALE = 2  # resolution at which stamps are drawn, relative to the image
FIXED = 22  # fractional bits of a filter weight
DEGREES = 360
UNIT = 1 << 16  # largest weight of a candidate
TRIES = 3  # attempts to place a paddle before its contour is discarded
GUESSES = 32  # random positions tried before all free ones are counted
OCCUPIED = 77  # 0.3 of 255, rounded up: no first paddle may touch this
OVERLAP = 459  # 1.8 times 255: masks whose sum reaches this collide
DEAD_END = 255 * UNIT // 10_000
DISTRACTOR_TRIES = 5
RESTARTS = 200_000  # attempts at an image before it counts as impossible; hundreds to thousands are usual


@numba.njit(nogil=True, cache=True)
def draw(  # type: ignore[no-untyped-def]
    seed, start, which, choices, frame, plan, seeding, growing, stamps, lights, disc, weights, images, labels, tips
):
    """Draw the images whose paddle margin is number `which` of `choices`. Returns False if one cannot be drawn.

    frame: size, pad, width of the mask (size + 2 pad), padding. plan: paddles of a contour and of a distractor, number
    of distractors, border of contours and of distractors. seeding, growing, stamps: tables of a Stamps. lights:
    brightness of contours and of distractors, in hundredths of that of a disc. disc, weights: see `_mark`. images,
    labels, tips: output.
    """
    size, pad, width, _ = frame
    steps, distractor_steps, distractors, border, distractor_border = plan
    mask, saved, empty = np.empty(width**2, np.uint8), np.empty(width**2, np.uint8), np.empty(width**2, np.uint8)
    _draw_frame(frame, empty)
    light = np.empty((width, width), np.int32)
    stream, odds = np.empty(1, np.uint64), np.empty(len(growing[2]), np.int64)
    states = np.empty((2, 3), np.int64)
    contours = np.empty((steps, 2, 3), np.int64)
    distractor = np.empty((distractor_steps, 1, 3), np.int64)
    for i in range(len(labels)):
        stream[0] = _mix(_mix(seed + np.uint64(1)) + np.uint64(start + i))
        if _draw_below(stream, choices) != which:
            continue
        labels[i] = _draw_below(stream, contours.shape[1])
        restarts, done = 0, False
        while not done:
            _copy(empty, mask)
            done = _grow(frame, seeding, growing, border, stream, mask, states, odds, contours)
            restarts += 1
            if restarts == RESTARTS:
                return False
        for y in range(width):
            for x in range(width):
                light[y, x] = 0
        _paint(light, stamps, contours, lights[0])
        for _ in range(distractors):
            for _ in range(DISTRACTOR_TRIES):
                free = _copy(mask, saved)
                if 100 * free < size**2:
                    break
                if _grow(frame, seeding, growing, distractor_border, stream, mask, states, odds, distractor):
                    _paint(light, stamps, distractor, lights[1])
                    break
                _copy(saved, mask)
        marked = _draw_below(stream, contours.shape[1])
        for axis in range(2):
            tips[i, 0, axis] = contours[0, marked, 1 + axis] - pad
            tips[i, 1, axis] = contours[-1, marked if labels[i] else 1 - marked, 1 + axis] - pad
        image = light[pad : pad + size, pad : pad + size]
        for tip in range(2):
            _mark(image, disc, weights, tips[i, tip, 0], tips[i, tip, 1])
        brightest = 0
        for y in range(size):
            for x in range(size):
                brightest = max(brightest, image[y, x])
        for y in range(size):
            for x in range(size):
                images[i, y, x] = (510 * image[y, x] + brightest) // (2 * brightest)
    return True


@numba.njit(nogil=True, cache=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """The output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _draw_below(stream, n):  # type: ignore[no-untyped-def]
    """Draw an integer uniformly from 0..n - 1 and advance the stream; n is below 2**32."""
    stream[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64((_mix(stream[0]) >> np.uint64(32)) * np.uint64(n) >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def _draw_frame(frame, mask):  # type: ignore[no-untyped-def]
    """Write a mask without paddles: 255 outside the padded image, 0 inside."""
    _, pad, width, padding = frame
    for y in range(width):
        for x in range(width):
            inside = min(y, x) >= pad + padding and max(y, x) < width - pad - padding
            mask[y * width + x] = 0 if inside else 255


@numba.njit(nogil=True, cache=True)
def _copy(mask, target):  # type: ignore[no-untyped-def]
    """Copy a mask. Returns the number of free pixels."""
    free = 0
    for place in range(len(mask)):
        target[place] = mask[place]
        free += mask[place] < OCCUPIED
    return free


@numba.njit(nogil=True, cache=True)
def _grow(frame, seeding, growing, border, stream, mask, states, odds, paddles):  # type: ignore[no-untyped-def]
    """Grow one contour, or two in turns. Returns False if a contour is stuck; the mask is then incomplete.

    border: width of the border in which the first paddle does not start. paddles: (n, contours, 3), output. states:
    (contours, 3) and odds: (K,), scratch. The newest paddle of a contour is not an obstacle yet; the last paddle of the
    first of two contours never becomes one.
    """
    advance, early, candidate, turns, choices, cover, solid, covered, disc = growing
    _, pad, width, _ = frame
    contours = paddles.shape[1]
    if not _place_first(frame, seeding, border, stream, mask, states, paddles):
        return False
    if contours == 2 and not _place_second(frame, seeding, stream, states, paddles):
        return False
    for step in range(1, len(paddles)):
        for which in range(contours):
            direction = states[which, 2]
            y, x = states[which, 0] + advance[direction, 0], states[which, 1] + advance[direction, 1]
            y += states[which, 0] - pad < early[direction, 0]
            x += states[which, 1] - pad < early[direction, 1]
            if not _weigh(frame, y, x, mask, candidate, turns[direction], choices[direction], disc, odds):
                return False
            placed = False
            for _ in range(TRIES):
                drawn, c = _draw_below(stream, odds[choices[direction] - 1]), 0
                while odds[c] <= drawn:
                    c += 1
                k = turns[direction, c, 0]
                head_y, head_x = y + candidate[k, 0], x + candidate[k, 1]
                if _is_clear(mask, head_y * width + head_x, cover[DEGREES + k], solid[DEGREES + k]):
                    placed = True
                    break
            if not placed:
                return False
            last = paddles[step - 1, which, 0]
            at = paddles[step - 1, which, 1] * width + paddles[step - 1, which, 2]
            _add_obstacle(mask, at, cover[last], covered[last])
            paddles[step, which, 0], paddles[step, which, 1], paddles[step, which, 2] = DEGREES + k, head_y, head_x
            states[which, 0], states[which, 1], states[which, 2] = y, x, DEGREES + k
    last, at = paddles[-1, -1, 0], paddles[-1, -1, 1] * width + paddles[-1, -1, 2]
    _add_obstacle(mask, at, cover[last], covered[last])
    return True


@numba.njit(nogil=True, cache=True, forceinline=True)
def _weigh(frame, pivot_y, pivot_x, mask, candidate, turns, choices, disc, odds):  # type: ignore[no-untyped-def]
    """Write the cumulative odds of the candidates: weight times free share of the mask around. False at a dead end."""
    size, pad, width, _ = frame
    total = 0
    for c in range(choices):
        y, x = pivot_y + candidate[turns[c, 0], 0], pivot_x + candidate[turns[c, 0], 1]
        if min(y, x) >= pad and max(y, x) < pad + size:
            nearest, centre = np.int64(0), y * width + x
            for d in range(len(disc)):
                value = np.int64(mask[centre + disc[d]])
                if value > nearest:
                    nearest = value
                if nearest == 255:
                    break
            total += turns[c, 1] * (255 - nearest)
        odds[c] = total
    return total >= DEAD_END


@numba.njit(nogil=True, cache=True, forceinline=True)
def _is_clear(mask, centre, cover, solid):  # type: ignore[no-untyped-def]
    """Whether a paddle collides with no obstacle."""
    hits = 0
    for c in range(solid):
        hits += np.int64(mask[centre + cover[c, 0]]) + cover[c, 1] >= OVERLAP
    return hits == 0


@numba.njit(nogil=True, cache=True, forceinline=True)
def _add_obstacle(mask, centre, cover, covered):  # type: ignore[no-untyped-def]
    """Add a paddle to the obstacles."""
    for c in range(covered):
        place = centre + cover[c, 0]
        mask[place] = max(np.int64(mask[place]), cover[c, 1])


@numba.njit(nogil=True, cache=True)
def _place_first(frame, seeding, border, stream, mask, states, paddles):  # type: ignore[no-untyped-def]
    """Place the first paddle in a uniform direction, at a uniform free position at least `border` from the edge."""
    size, pad, _, _ = frame
    _, _, _, footprints, counts = seeding
    low = max(border - pad, 0)
    span = size - 2 * low
    low += pad
    for _ in range(TRIES):
        turn = _draw_below(stream, len(counts))
        footprint = footprints[turn, : counts[turn]]
        if len(footprint) == 0:
            return False
        is_free = False
        for _ in range(GUESSES):
            y, x = low + _draw_below(stream, span), low + _draw_below(stream, span)
            is_free = _fits(frame, border, mask, footprint, y, x)
            if is_free:
                break
        if not is_free:
            places = 0
            for place in range(span * span):
                places += _fits(frame, border, mask, footprint, low + place // span, low + place % span)
            if places == 0:
                return False
            left, place = _draw_below(stream, places), -1
            while left >= 0:
                place += 1
                y, x = low + place // span, low + place % span
                left -= _fits(frame, border, mask, footprint, y, x)
        if _start_contour(frame, seeding, turn, y, x, states[0], paddles[0, 0]):
            return True
    return False


@numba.njit(nogil=True, cache=True, forceinline=True)
def _fits(frame, border, mask, footprint, y, x):  # type: ignore[no-untyped-def]
    """Whether the footprint of a first paddle at (y, x) is free. Pixels outside the image do not count."""
    size, pad, width, _ = frame
    for f in range(len(footprint)):
        v, u = y + footprint[f, 0], x + footprint[f, 1]
        low, high = min(v, u) - pad, max(v, u) - pad
        framed = low < border or high >= size - border
        if low >= 0 and high < size and (framed or mask[v * width + u] >= OCCUPIED):
            return False
    return True


@numba.njit(nogil=True, cache=True)
def _place_second(frame, seeding, stream, states, paddles):  # type: ignore[no-untyped-def]
    """Place the first paddle of the second contour, at seed_distance from that of the first, in a uniform direction."""
    _, _, second, _, _ = seeding
    for _ in range(TRIES):
        turn, place = _draw_below(stream, len(second)), _draw_below(stream, len(second))
        y, x = paddles[0, 0, 1] + second[place, 0], paddles[0, 0, 2] + second[place, 1]
        if _start_contour(frame, seeding, turn, y, x, states[1], paddles[0, 1]):
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _start_contour(frame, seeding, turn, y, x, state, paddle):  # type: ignore[no-untyped-def]
    """Start a contour with its tail at (y, x). Returns False if its head or its pivot is outside the image."""
    size, pad, _, _ = frame
    head, pivot, _, _, _ = seeding
    head_y, head_x = y + head[turn, 0], x + head[turn, 1]
    pivot_y, pivot_x = head_y + pivot[turn, 0], head_x + pivot[turn, 1]
    paddle[0], paddle[1], paddle[2] = turn, y, x
    state[0], state[1], state[2] = pivot_y, pivot_x, turn
    low, high = min(head_y, head_x, pivot_y, pivot_x), max(head_y, head_x, pivot_y, pivot_x)
    return low >= pad and high < pad + size


@numba.njit(nogil=True, cache=True)
def _paint(light, stamps, contours, strength):  # type: ignore[no-untyped-def]
    """Paint contours over darker pixels."""
    side = stamps.shape[1]
    for paddle in contours.reshape(-1, 3):
        top, left = paddle[1] - side // 2, paddle[2] - side // 2
        for y in range(side):
            for x in range(side):
                value = np.int32(strength * np.int64(stamps[paddle[0], y, x]))
                light[top + y, left + x] = max(light[top + y, left + x], value)


@numba.njit(nogil=True, cache=True)
def _mark(image, disc, weights, y, x):  # type: ignore[no-untyped-def]
    """Draw a disc around (y, x), scaled down from SCALE times the resolution: rows first, then columns, each to 8 bits.

    disc: half the width of the disc in each row at the higher resolution; weights: (size, SCALE * size), the filter.
    """
    size, radius = len(image), len(disc) // 2
    reach, half = radius // SCALE + 4, 1 << (FIXED - 1)
    top, left, right = SCALE * y - radius, max(x - reach, 0), min(x + reach + 1, size)
    across = np.zeros((2 * radius + 1, right - left), np.int64)
    for row in range(2 * radius + 1):
        for u in range(left, right):
            total = half
            for f in range(max(SCALE * x - disc[row], 0), min(SCALE * x + disc[row] + 1, SCALE * size)):
                total += 255 * weights[u, f]
            across[row, u - left] = min(max(total >> FIXED, 0), 255)
    for v in range(max(y - reach, 0), min(y + reach + 1, size)):
        for u in range(left, right):
            total = half
            for f in range(max(top, 0), min(SCALE * y + radius + 1, SCALE * size)):
                total += weights[v, f] * across[f - top, u - left]
            image[v, u] = max(image[v, u], np.int32(100 * min(max(total >> FIXED, 0), 255)))
