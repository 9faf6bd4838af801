"""Pathfinder: the generator against the original's own stamps, steps and images, and the frozen bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from golden_tensors import golden
from raw_data import raw_data
from scipy import ndimage

from lra.tasks import _pathfinder_growth as growth
from lra.tasks._pathfinder import Drawing, generate, lra_drawing
from lra.tasks._pathfinder_stamps import Stamps, degrees, half_width, lanczos, stamps
from lra.tasks._pathfinder_task import seed_of

GOLDEN = {key: tensor.numpy() for key, tensor in golden("pathfinder_original").items()}
SHAPES = [(32, 1), (64, 1), (128, 2), (128, 3), (256, 3)]
FIRST: dict[tuple[int, int], str] = {
    (32, 14): "351ac63e9900e29fa3890d6dd4a7b6b8c00eb62967e2b4b24b2d846e011172ed",
    (32, 9): "14df7c49d63dceafeb99d27bdd524c3ea29f569a8151411a60cffcbe9f748887",
    (32, 6): "5f160cde82d352ce94dd14521f423a60551ab5a3e28de25eb0059a0181aa8310",
    (64, 14): "8683086d141650e8a0f37650c878df69dc46d0fbe6068dd4eedf58d27e47ed7f",
    (128, 14): "ceefc0681d5010d2e9b4ef8a84facaaffbd0cd23a85c5ccb318d00ed807c48a2",
    (256, 14): "c92495f64f29c0b09d48c7d2276d43d90dbd451d8159449037cc6a90af5af9cf",
}


def tables(size: int, margin: int) -> tuple[Stamps, tuple[int, int, int, int]]:
    """The stamps of an LRA drawing and its frame: size, pad, width, padding."""
    d = lra_drawing(size)
    pad = half_width(d.paddle_length, d.paddle_thickness, max(d.paddle_margins)) + 1
    width = size + 2 * pad
    shape = (d.paddle_length, d.paddle_thickness, margin, d.continuity, d.seed_distance, width)
    return stamps(*shape), (size, pad, width, d.padding)


def padded(mask: np.ndarray, pad: int) -> np.ndarray:
    return np.pad(mask, pad, constant_values=255).ravel()


@pytest.mark.parametrize(("size", "margin"), SHAPES)
def test_paddles_and_masks_are_the_originals_in_every_direction(size: int, margin: int) -> None:
    own, _ = tables(size, margin)
    np.testing.assert_array_equal(own.paddle[:360], GOLDEN[f"line_{size}_{margin}"])
    np.testing.assert_array_equal(own.mask[:360], GOLDEN[f"mask_{size}_{margin}"])


@pytest.mark.parametrize("size", [32, 128])
def test_discs_are_the_originals_at_the_border_too(size: int) -> None:
    radius = int(2 * lra_drawing(size).marker_radius)
    disc = np.array([int((radius**2 - y**2) ** 0.5) for y in range(-radius, radius + 1)])
    for (y, x), expected in zip(GOLDEN[f"disc_at_{size}"].tolist(), GOLDEN[f"disc_{size}"], strict=True):
        image = np.zeros((size, size), np.int32)
        growth._mark(image, disc, lanczos(2 * size, size), y, x)
        np.testing.assert_array_equal(image, 100 * expected.astype(np.int32))


@pytest.mark.parametrize("size", [32, 128])
def test_the_odds_of_the_next_paddle_are_the_originals(size: int) -> None:
    dead = 0
    for row, margin in enumerate(GOLDEN[f"step_margin_{size}"].tolist()):
        own, frame = tables(size, margin)
        pad = frame[1]
        turns = np.arctan2(own.candidate[:, 0], own.candidate[:, 1])
        angle = GOLDEN[f"step_direction_{size}"][row]
        direction = int(np.abs(np.concatenate([degrees(), turns]) - angle).argmin())
        last = GOLDEN[f"step_pivot_{size}"][row]
        pivot = last + own.advance[direction] + (last < own.early[direction])
        np.testing.assert_array_equal(pivot, GOLDEN[f"step_next_{size}"][row])
        count, sums = int(own.choices[direction]), np.zeros(len(turns), np.int64)
        mask = padded(GOLDEN[f"step_mask_{size}"][row], pad)
        y, x = (pivot + pad).tolist()
        alive = growth._weigh(frame, y, x, mask, own.candidate, own.turns[direction], count, own.disc, sums)
        expected = GOLDEN[f"step_odds_{size}"][row]
        assert alive == (expected.sum() > 0)
        dead += not alive
        if alive:
            odds = np.zeros((size, size))
            for weight, k in zip(np.diff(sums[:count], prepend=0), own.turns[direction, :count, 0], strict=True):
                if weight:
                    odds[tuple(pivot + own.candidate[k])] = weight / sums[count - 1]
            # weights are in steps of 2^-16; a dilated mask of 254 leaves one step of 255 to a candidate
            np.testing.assert_allclose(odds, expected, atol=2e-3)
    assert dead


@pytest.mark.parametrize("size", [32, 128])
def test_a_seed_has_as_many_free_places_as_in_the_original(size: int) -> None:
    for row, margin in enumerate(GOLDEN[f"seed_margin_{size}"].tolist()):
        own, frame = tables(size, margin)
        pad, turn = frame[1], 180 + int(GOLDEN[f"seed_degrees_{size}"][row])
        footprint = own.footprint[turn, : own.footprints[turn]]
        mask = padded(GOLDEN[f"seed_mask_{size}"][row], pad)
        places = range(pad, pad + size) if len(footprint) else ()
        free = sum(growth._fits(frame, 1, mask, footprint, y, x) for y in places for x in places)
        assert free == GOLDEN[f"seed_free_{size}"][row]


@pytest.mark.parametrize(("size", "margin"), [(32, 1), (128, 2)])
def test_all_paddles_but_the_last_of_the_first_contour_are_obstacles(size: int, margin: int) -> None:
    own, frame = tables(size, margin)
    _, pad, width, padding = frame
    empty, mask = np.empty(width**2, np.uint8), np.empty(width**2, np.uint8)
    growth._draw_frame(frame, empty)
    contours, states = np.zeros((14, 2, 3), np.int64), np.zeros((2, 3), np.int64)
    stream, odds = np.array([1], np.uint64), np.zeros(len(own.candidate), np.int64)
    border, grown = 2 * lra_drawing(size).seed_distance, False
    while not grown:
        growth._copy(empty, mask)
        grown = growth._grow(frame, own.seeding(), own.growing(), border, stream, mask, states, odds, contours)
    expected = np.pad(np.zeros((size - 2 * padding,) * 2, np.uint8), pad + padding, constant_values=255)
    half = own.mask.shape[1] // 2
    for stamp, y, x in [*contours[:-1].reshape(-1, 3), contours[-1, 1]]:
        place = expected[y - half : y + half + 1, x - half : x + half + 1]
        np.maximum(place, own.mask[stamp], out=place)
    np.testing.assert_array_equal(mask.reshape(width, width), expected)


@pytest.mark.parametrize(("size", "count"), [(32, 1500), (128, 150)])
def test_images_have_the_statistics_of_the_originals(size: int, count: int) -> None:
    name = f"pathfinder_reference/pathfinder{size}_hard_refgen.npz"
    reference = np.load(raw_data(name) / name, allow_pickle=False)["images"]
    images, _, _ = generate(lra_drawing(size), 7, 0, count)
    for measure in (
        lambda x: x.mean(axis=(1, 2)),
        lambda x: (x > 0).mean(axis=(1, 2)),
        lambda x: (x > 200).mean(axis=(1, 2)),
        lambda x: x[:, :4].mean(axis=(1, 2)),
        lambda x: x[:, -4:].mean(axis=(1, 2)),
        lambda x: np.array([ndimage.label(image > 25)[1] for image in x]),
    ):
        own, theirs = measure(images), measure(reference)
        error = np.hypot(own.std() / len(own) ** 0.5, theirs.std() / len(theirs) ** 0.5)
        assert abs(own.mean() - theirs.mean()) < 4 * error
        assert own.std() == pytest.approx(theirs.std(), rel=0.25)


def test_discs_lie_where_the_originals_do() -> None:
    theirs = GOLDEN["tips_32"].astype(np.int64)
    _, labels, tips = generate(lra_drawing(32), 7, 0, 1500)
    for own, other in ((tips[:, 0], theirs[:, 0]), (tips[:, 1], theirs[:, 1])):
        np.testing.assert_array_equal([own.min(0), own.max(0)], [other.min(0), other.max(0)])
        assert (np.abs(own.mean(0) - other.mean(0)) < 4 * np.hypot(own.std(0), other.std(0)) / 1500**0.5).all()
    for label in range(2):
        both = ((tips, labels), (theirs, GOLDEN["labels_32"]))
        own, other = (np.hypot(*(t[:, 0] - t[:, 1])[chosen == label].T) for t, chosen in both)
        assert abs(own.mean() - other.mean()) < 4 * np.hypot(own.std(), other.std()) / 700**0.5


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_every_image_has_ink_and_two_visible_discs(size: int) -> None:
    images, labels, tips = generate(lra_drawing(size), 3, 0, 40)
    assert images.shape == (40, size, size)
    assert (images.min(axis=(1, 2)) == 0).all()
    assert (images.max(axis=(1, 2)) == 255).all()
    assert set(labels.tolist()) == {0, 1}
    assert (tips[:, 0] != tips[:, 1]).any(axis=1).all()
    for image, ends in zip(images, tips, strict=True):
        for y, x in ends:
            assert image[y, x] > 200
            assert image[y - 1 : y + 2, x - 1 : x + 2].mean() > 120  # a paddle alone covers a third of that


def test_labels_are_balanced() -> None:
    _, labels, _ = generate(lra_drawing(32), 3, 0, 2000)
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / 2000**0.5


def test_the_label_says_whether_both_discs_are_on_one_contour() -> None:
    """Two contours of two paddles, closed up by dilation: where they are apart, the discs share a piece or do not."""
    images, labels, tips = generate(replace(lra_drawing(64), contour_length=2, distractors=0), 5, 0, 80)
    apart = []
    for image, label, ((y, x), (v, u)) in zip(images, labels, tips.tolist(), strict=True):
        pieces, count = ndimage.label(ndimage.binary_dilation(image > 60, iterations=2), np.ones((3, 3)))
        if count == 2:
            apart.append(bool(label))
            assert (pieces[y, x] == pieces[v, u]) == label
    assert min(apart.count(True), apart.count(False)) >= 10


def test_an_image_depends_on_seed_and_number_alone() -> None:
    drawing = lra_drawing(128)
    whole = generate(drawing, 1, 0, 8)
    for own, both in zip(whole, zip(generate(drawing, 1, 0, 3), generate(drawing, 1, 3, 8), strict=True), strict=True):
        np.testing.assert_array_equal(own, np.concatenate(both))
    assert (generate(drawing, 2, 0, 8)[0] != whole[0]).any(axis=(1, 2)).all()


@pytest.mark.parametrize(("size", "contour"), FIRST)
def test_the_frozen_images_are_still_generated(size: int, contour: int) -> None:
    """The first of each split, taken from the sets whose checksums the protocols hold."""
    drawing, digest = lra_drawing(size, contour), hashlib.sha256()
    for start in (0, 160_000, 180_000):
        images, labels, _ = generate(drawing, seed_of(drawing), start, start + 2)
        digest.update(labels.tobytes() + images.tobytes())
    assert digest.hexdigest() == FIRST[size, contour]


def test_the_arenas_drawings() -> None:
    hard = {size: lra_drawing(size) for size in (32, 64, 128, 256)}
    assert [(d.distractor_length, d.distractors) for d in hard.values()] == [(4, 5), (4, 5), (4, 8), (4, 7)]
    easy = [lra_drawing(size, 6) for size in hard]
    assert [(d.contour_length, d.distractor_length, d.distractors) for d in easy] == [
        (6, 2, 10), (6, 2, 11), (6, 2, 17), (6, 2, 15)
    ]  # fmt: skip
    assert lra_drawing(32, 9, distractors=0) == replace(hard[32], contour_length=9, distractor_length=3, distractors=0)
    ink = [generate(lra_drawing(32, contour), 3, 0, 200)[0].mean() for contour in (6, 9, 14)]
    assert ink == sorted(ink)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed_distance": 8}, "more than 4 \\* seed_distance = 32"),
        ({"contour_length": 1}, "at least 2 paddles"),
        ({"distractors": -1}, "at least 1"),
        ({"paddle_margins": ()}, "paddle_margins at least one"),
        ({"paddle_margins": (0,)}, "at least 1 pixel"),
        ({"paddle_thickness": 0.7}, "multiple of 0.5"),
    ],
)
def test_a_drawing_that_cannot_be_says_why(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Drawing(**change)


def test_contours_without_room_and_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="two contours of 60 paddles do not fit"):
        generate(Drawing(contour_length=60), 0, 0, 1)
    with pytest.raises(ValueError, match="one of 32, 64, 128, 256"):
        lra_drawing(48)
    with pytest.raises(ValueError, match="at least 3"):
        lra_drawing(32, 2)
