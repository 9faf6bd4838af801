"""Shared by the Pathfinder tasks: protocols, preparation and floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task
from lra.tasks._floors import MAX_FITTED, bag_of_tokens, logistic
from lra.tasks._pathfinder import Drawing, generate, lra_drawing
from lra.tasks._pathfinder_release import LEVEL, released_files, write_released
from lra.tasks.storage import DocumentWriter, open_split, write_examples

COUNTS = {"train": 160_000, "validation": 20_000, "test": 20_000}
SMALL = {"train": 8_000, "validation": 1_000, "test": 2_000}
CONTOURS = {"strict-contour6": 6, "strict-contour9": 9}
PART = 500
"""Images per intermediate file."""
CELLS = 16
"""Cells per side of the averaged centre crop."""


def protocols(size: int, sha256: Mapping[str, tuple[str, str, str]]) -> dict[str, Protocol]:
    """The protocols of an image size. sha256: protocol -> checksums of train, validation and test.

    The task of the Long Range Arena has contours of 14 paddles. Shorter contours have a protocol if checksums are
    given.
    """
    length = size * size
    frozen = {name: dict(zip(SPLITS, sums, strict=True)) for name, sums in sha256.items()}
    raw = f"pathfinder{size}/{LEVEL} of the LRA release"
    tokens = "generated from a seed, contours of {} paddles; the token is the grey level, and 0 is black, not padding"
    strict = Protocol(
        "strict",
        length,
        vocabulary=256,
        counts=COUNTS,
        sha256=frozen.get("strict", {}),
        note=tokens.format("14 (hard)"),
    )
    continuous = replace(
        strict,
        name="strict-continuous",
        vocabulary=0,
        channels=1,
        scale=(0.5, 0.5),
        note="the images of strict, grey levels centred to -1..1",
    )
    small = replace(
        strict,
        name="strict-small",
        # drawn in a few seconds at 32 pixels, in about a minute at 128
        counts=SMALL if size <= 32 else {name: count // 4 for name, count in SMALL.items()},
        sha256=frozen.get("strict-small", {}),
        note="generated like strict, but a small set for first experiments; never ranked with it",
    )
    released = replace(
        strict,
        name="lra2020",
        sha256={},
        note="released images, the token is the grey level; first 80 %, next and last 10 % in the order of the "
        "metadata files (the published code took them in an order of TensorFlow Datasets, so members differ); black "
        "is a token here, the published code hides it as padding: see lra2020-masked",
        raw=raw,
    )
    s4 = replace(
        released,
        name="s4",
        vocabulary=0,
        channels=1,
        note="released images, grey levels in 0..1; random_split with seed 42, as published",
    )
    entries = [
        continuous,
        strict,
        *(
            replace(strict, name=name, sha256=frozen[name], note=tokens.format(contour))
            for name, contour in CONTOURS.items()
            if name in frozen
        ),
        replace(
            continuous,
            name="strict-continuous-small",
            counts=small.counts,
            sha256=small.sha256,
            note="generated like strict-continuous, but a small set for first experiments; never ranked with it",
        ),
        small,
        released,
        replace(
            released,
            name="lra2020-masked",
            hides_zeros=True,
            note="the images of lra2020; black pixels, about two in three, are hidden from attention and pooling, as "
            "the padding mask `inputs > 0` of the published code does",
        ),
        s4,
        replace(
            s4,
            name="s4-centred",
            scale=(0.5, 0.5),
            note="the images and splits of s4, grey levels centred to -1..1, as in the code of S5 and MEGA",
        ),
    ]
    return {protocol.name: protocol for protocol in entries}


def seed_of(drawing: Drawing) -> int:
    """The seed of a generated set. It differs for every size and difficulty, so that their labels are independent."""
    return 1000 * drawing.size + drawing.contour_length


@dataclass(frozen=True)
class Part:
    """Images start..stop - 1 of a split, stored in a file of their own until the split is written."""

    split: str
    start: int
    stop: int
    path: Path


class PathfinderTask(Task):
    """Base class of the Pathfinder tasks. size: side of the images in pixels."""

    size: ClassVar[int]
    resumable = True

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        """Generate the images, or read the released ones, depending on the protocol.

        An interrupted call leaves finished parts in `folder`, from which the next call continues.
        """
        if protocol.raw:
            write_released(folder, protocol, self.size, source, workers, progress)
            return
        drawing = lra_drawing(self.size, CONTOURS.get(protocol.name, 14))
        parts = _parts(folder, protocol.counts)
        _draw_parts(parts, drawing, workers, progress)
        for split in SPLITS:
            labels = []
            with DocumentWriter(folder, split) as writer:
                for part in (p for p in parts if p.split == split):
                    rows = np.load(part.path, allow_pickle=False)
                    labels.append(rows[:, 0])
                    writer.append(rows[:, 1:].ravel(), np.full(len(rows), self.size**2))
                    part.path.unlink()
                    progress("writing images", part.stop, parts[-1].stop)
            write_examples(folder, split, np.concatenate(labels))
        for leftover in folder.glob("*.part*"):
            leftover.unlink()

    def raw_files(self, protocol: Protocol, source: Path) -> Iterable[Path]:
        return released_files(source, self.size)

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        """Majority class, bag of tokens, centre crop and marker distance.

        "centre crop" is logistic regression on the central half of the image, where the first contour starts, averaged
        to 16 x 16 cells; "marker distance" on the distance between the two discs, its square and its cube. They are
        fitted to at most MAX_FITTED examples, spread evenly over `train`.
        """
        return super().floors(train, test) | {
            "bag of tokens": bag_of_tokens(train, test, self.classes),
            "centre crop": self._fitted(self._centre, train, test),
            "marker distance": self._fitted(self._marker_distance, train, test),
        }

    def _fitted(self, features: Callable[[Split, np.ndarray], np.ndarray], train: Split, test: Split) -> float:
        """Test accuracy of logistic regression on `features(split, rows)`: (n, f)."""
        rows = np.linspace(0, len(train) - 1, min(MAX_FITTED, len(train))).astype(np.int64)
        weight, bias = logistic(features(train, rows), np.asarray(train.labels)[rows], self.classes)
        guess = (features(test, np.arange(len(test))) @ weight + bias).argmax(axis=1)
        return float((guess == np.asarray(test.labels)).mean())

    def _centre(self, split: Split, rows: np.ndarray) -> np.ndarray:
        """Central halves of the images `rows`, averaged to CELLS x CELLS values in [0, 1]: (n, CELLS^2)."""
        quarter, cell = self.size // 4, self.size // (2 * CELLS)
        features = np.empty((len(rows), CELLS * CELLS))
        for i, row in enumerate(rows):
            middle = self.picture(split, row)[quarter : self.size - quarter, quarter : self.size - quarter]
            features[i] = middle.reshape(CELLS, cell, CELLS, cell).mean(axis=(1, 3)).ravel() / 255
        return features

    def _marker_distance(self, split: Split, rows: np.ndarray) -> np.ndarray:
        """Distance between the two discs of the images `rows`, in image sides, its square and its cube: (n, 3)."""
        from scipy.ndimage import uniform_filter

        diameter = int(2 * lra_drawing(self.size).marker_radius)
        distance = np.empty(len(rows))
        for i, row in enumerate(rows):
            # a disc is the brightest square of its width, and the other one lies outside it
            light = uniform_filter(self.picture(split, row).astype(np.float32), diameter, mode="constant")
            discs = []
            for _ in range(2):
                y, x = divmod(int(light.argmax()), self.size)
                light[max(0, y - diameter) : y + diameter + 1, max(0, x - diameter) : x + diameter + 1] = -1
                discs.append((y, x))
            distance[i] = math.dist(*discs) / self.size
        return distance[:, None] ** np.arange(1, 4)

    def picture(self, split: Split, example: int) -> np.ndarray:
        """One example as an image: (size, size) uint8."""
        return np.asarray(split.document(split.index[example, 0])).reshape(self.size, self.size)

    def describe(self, split: Split, example: int) -> str:
        image = self.picture(split, example)
        joined = ("on two contours", "on one contour")[split.labels[example]]
        ink = f"{(image > 0).mean():.0%} of pixels not black, mean {image.mean():.1f} of 255"
        return f"{split.labels[example]}, markers {joined}, {self.size} x {self.size} pixels, {ink}"


def _parts(folder: Path, counts: Mapping[str, int]) -> list[Part]:
    """Divide all splits into parts of PART images."""
    parts, first = [], 0
    for split in SPLITS:
        last = first + counts[split]
        starts = range(first, last, PART)
        parts += [Part(split, s, min(s + PART, last), folder / f"images-{s:06d}.part") for s in starts]
        first = last
    return parts


def _draw_parts(parts: list[Part], drawing: Drawing, workers: int, progress: Progress) -> None:
    """Draw the parts that are missing in parallel."""
    missing = [part for part in parts if not _is_complete(part, drawing.size)]
    total = parts[-1].stop
    done = total - sum(part.stop - part.start for part in missing)
    progress("drawing images", done, total)
    pool = ThreadPoolExecutor(workers)
    try:
        pending = {pool.submit(_draw_part, part, drawing): part for part in missing}
        for future in as_completed(pending):
            future.result()
            done += pending[future].stop - pending[future].start
            progress("drawing images", done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_part(part: Part, drawing: Drawing) -> None:
    """Write the file of a part: one row per image, with its label followed by its pixels."""
    try:
        images, labels, _ = generate(drawing, seed_of(drawing), part.start, part.stop)
    except ValueError as error:
        raise DataError(str(error)) from None
    unfinished = part.path.with_suffix(".part-unfinished")
    with unfinished.open("wb") as file:
        np.save(file, np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1))
    unfinished.replace(part.path)


def _is_complete(part: Part, size: int) -> bool:
    """Whether the file of a part exists and has the right shape."""
    try:
        return np.load(part.path, mmap_mode="r", allow_pickle=False).shape == (part.stop - part.start, size**2 + 1)
    except (OSError, ValueError, EOFError):
        return False
