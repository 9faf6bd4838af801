"""Image: CIFAR-10 (Krizhevsky 2009) as a sequence of pixels, row by row (task: arXiv:2011.04006).

Grey is ITU-R 601 luma in integers, (19595 R + 38470 G + 7471 B + 2^15) >> 16, as in torchvision's Grayscale. Only
`lra2020` uses TensorFlow's rgb_to_grayscale (0.2989, 0.587, 0.114 in float32, times 255.5, truncated), as the published
code did. Black is treated as padding in `lra2020-masked` only.

    strict          grey, continuous, normalised    validation: the 500 training images of each class with the lowest
    strict-tokens   grey, 256 token ids             SHA-256 of their RGB bytes; the same in all three protocols
    strict-colour   three channels, continuous
    lra2020         grey, 256 token ids             validation: the last 5,000 training images
    lra2020-masked  the same, black pixels hidden
    s4              grey, continuous, normalised    validation: torch's random_split with seed 42

Images keep the order of the official files. Images may be stored in any lossless format that Pillow reads.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import DataError, Progress, Protocol, Split, Task
from lra.tasks import _cifar
from lra.tasks._floors import bag_of_tokens
from lra.tasks._source import Hub, read_table
from lra.tasks.storage import DocumentWriter, open_split, write_examples

HUB = Hub("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "cifar10", _cifar.OFFICIAL)
RAW = f"{HUB.files} or {HUB.id} from the hub"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 45_000, "validation": 5_000, "test": 10_000}
GREY = (122.6 / 255, 61 / 255)
COLOUR = (0.4734, 0.2516)

LRA2020 = Protocol(
    "lra2020",
    length=1024,
    vocabulary=256,
    counts=COUNTS,
    sha256={
        "train": "afa6520d55b96d70864163eb5587f6f0d5aa467f40bbaa67403b519111020632",
        "validation": "b5973610339bda4b2880c95a69ac20505b0b86e2f746cae17033a721ac7e80b4",
        "test": "234f6c01993129a60709c8863385587ebc652a7349247832e03be59e968f4109",
    },
    note="grey by TensorFlow's formula, tokens; validation is the last 10 % of the official order (the "
    "published code took it in the order of TensorFlow Datasets, so its members differ); black is a "
    "token here, the published code hides it as padding: see lra2020-masked",
    raw=RAW,
)


class Image(Task):
    name = "image"
    title = "Image"
    classes = 10
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol(
            "strict",
            length=1024,
            channels=1,
            scale=GREY,
            counts=COUNTS,
            sha256={
                "train": "6e1aea490e0b157ebde9486cf33ce31647a4c7497cf1a2ddd475c90cd4a59630",
                "validation": "63af6d031be7605e43cbc63d9b89f319e24a18ef0d42b03d2be94258b2c6d52c",
                "test": "2a8c90ad0bf37c4d57d5ff3705a5e6978c08785c8696cd449b9445a6f2f672f5",
            },
            note="grey, continuous; validation split off train by content hash",
            raw=RAW,
        ),
        "strict-tokens": Protocol(
            "strict-tokens",
            length=1024,
            vocabulary=256,
            counts=COUNTS,
            sha256={
                "train": "6e1aea490e0b157ebde9486cf33ce31647a4c7497cf1a2ddd475c90cd4a59630",
                "validation": "63af6d031be7605e43cbc63d9b89f319e24a18ef0d42b03d2be94258b2c6d52c",
                "test": "2a8c90ad0bf37c4d57d5ff3705a5e6978c08785c8696cd449b9445a6f2f672f5",
            },
            note="grey, one token per pixel; the split of strict",
            raw=RAW,
        ),
        "strict-colour": Protocol(
            "strict-colour",
            length=1024,
            channels=3,
            scale=COLOUR,
            counts=COUNTS,
            sha256={
                "train": "30a7adcdeab31de8f3d4bf47bf1e8821ac0899dbc5c425bb03f6fb84f1198d96",
                "validation": "d051aa5d6251b9c981c0921c225a1808e2bcb0e6f8b1e597b09afeb44cdcd96d",
                "test": "b806475cb913818a89f7111bede2e694a282be94ef9b2c53278c8dfbf29e61c5",
            },
            note="colour, not comparable with grey; mean and standard deviation over all training pixels and channels; "
            "the split of strict",
            raw=RAW,
        ),
        "lra2020": LRA2020,
        "lra2020-masked": replace(
            LRA2020,
            name="lra2020-masked",
            hides_zeros=True,
            note="the images of lra2020; black pixels are hidden from attention and pooling, as the padding mask "
            "`inputs > 0` of the published code does",
        ),
        "s4": Protocol(
            "s4",
            length=1024,
            channels=1,
            scale=GREY,
            counts=COUNTS,
            sha256={
                "train": "2054828c6cf53d96dfd8d16226a1373e216d70ab84ac977fa0f48abfd5a4038e",
                "validation": "4b3af8c8a7fe74a3c97b8e74769ebd24dddb667a8884d998389f3d0f65a6ca74",
                "test": "2a8c90ad0bf37c4d57d5ff3705a5e6978c08785c8696cd449b9445a6f2f672f5",
            },
            note="grey, continuous, normalised by 122.6 and 61; validation by random_split, seed 42, as published",
            raw=RAW,
        ),
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        command = self.command(protocol)
        images, labels = _read("train", source, command, workers, progress)
        validation = _validation_rows(images, labels, protocol)
        train = np.setdiff1d(np.arange(len(labels)), validation)
        parts = [("train", images[train], labels[train]), ("validation", images[validation], labels[validation])]
        for split, pixels, classes in (*parts, ("test", *_read("test", source, command, workers, progress))):
            values = _encode(pixels, protocol).reshape(len(classes), -1)
            with DocumentWriter(folder, split) as writer:
                writer.append(values.ravel(), np.full(len(values), values.shape[1]))
            write_examples(folder, split, classes)

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        return super().floors(train, test) | {"bag of tokens": bag_of_tokens(train, test, self.classes)}

    def picture(self, split: Split, example: int) -> np.ndarray:
        """One example as an image: (32, 32) or (32, 32, 3) uint8."""
        pixels = np.asarray(split.document(split.index[example, 0]))
        return pixels.reshape((32, 32) if len(pixels) == 1024 else (32, 32, 3))

    def describe(self, split: Split, example: int) -> str:
        pixels = np.asarray(split.document(split.index[example, 0]))
        kind = "grey" if len(pixels) == 1024 else "colour"
        return f"{CLASSES[split.labels[example]]}, 32 x 32 {kind} pixels, mean {pixels.mean():.0f} of 255"


def _read(
    split: str, source: Path | None, command: str, workers: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Read RGB images (n, 32, 32, 3) uint8 and labels (n,) in the official order."""
    progress(f"reading {split} from {source or HUB.id}", 0, 0)
    if root := _cifar.find(source):
        images, classes = _cifar.read_batches(root, split)
        _check_labels(classes.tolist(), split)
        return images, classes
    files, labels = read_table(HUB, split, ("img", "label"), source, command)
    images = np.empty((len(files), 32, 32, 3), np.uint8)
    with ThreadPoolExecutor(workers) as pool:
        for row, image in enumerate(pool.map(_decode, files)):
            if isinstance(image, str):
                raise DataError(f"image {row} of {split} {image}; fetch the files again")
            images[row] = image
            if row % 1000 == 999:
                progress(f"decoding {split}", row + 1, len(files))
    _check_labels(labels, split)
    return images, np.array(labels)


def _check_labels(labels: list[int], split: str) -> None:
    if not all(label in range(10) for label in labels):
        raise DataError(f"{split} of {HUB.id} holds labels other than 0 to 9; fetch the files again")


def _decode(file: Mapping[str, bytes]) -> np.ndarray | str:
    """Decode an image to (32, 32, 3) uint8; returns a description of the problem if that fails."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(file["bytes"])) as image:
            if image.size != (32, 32):
                return f"is {image.size[0]} x {image.size[1]} pixels, not 32 x 32"
            return np.asarray(image.convert("RGB"))
    except (OSError, TypeError, KeyError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        return f"cannot be decoded ({error})"


def _validation_rows(images: np.ndarray, labels: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Rows of the official training images that form the validation split, in ascending order."""
    count = protocol.counts["validation"]
    if protocol.name.startswith("lra2020"):
        return np.arange(len(labels) - count, len(labels))
    if protocol.name == "s4":
        import torch

        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(42)).numpy()
        return np.sort(shuffled[len(labels) - count :])
    hashes = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    order = np.argsort(hashes, kind="stable")
    return np.sort(np.concatenate([order[labels[order] == label][: count // 10] for label in range(10)]))


def _encode(images: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Convert RGB images (n, 32, 32, 3) to the values of a protocol: (n, 32, 32) or (n, 32, 32, 3) uint8."""
    if protocol.channels == 3:
        return images
    if protocol.name.startswith("lra2020"):
        # element by element, because matrix products round differently on different machines
        r, g, b = (images[..., channel] * np.float32(1 / 255) for channel in range(3))
        grey = r * np.float32(0.2989) + g * np.float32(0.587) + b * np.float32(0.114)
        return (grey * np.float32(255.5)).astype(np.uint8)
    red, green, blue = (images[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
