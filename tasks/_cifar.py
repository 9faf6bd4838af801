"""The official CIFAR-10 for Python: `cifar-10-batches-py/` or `cifar-10-python.tar.gz`.

A batch is a pickle of {b"data": (10000, 3072) uint8, red, green and blue planes of each image, b"labels": [int], ...}.
Unpickling can run code, so only what plain arrays, bytes, numbers, lists and dicts need is allowed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lra.task import DataError
from lra.tasks._archive import contents, find_official

FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
OFFICIAL = f"the official {FOLDER}/ or {ARCHIVE}"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
LARGEST = 1 << 26
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip
"""Module and name of everything that a batch may call: arrays, and bytes in pickles of Python 3."""


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        # the name of before NumPy 2, which warns of it
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def find(source: Path | None) -> Path | None:
    """The official folder or archive in a user's folder; None if it is not there."""
    return find_official(source, "cifar10", FOLDER, ARCHIVE)


def read_batches(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) of a split, in the official order. Raises DataError."""
    batches = dict(_batches(root, BATCHES[split]))
    images, labels = zip(*(batches[name] for name in BATCHES[split]), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _batches(root: Path, names: list[str]) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    for name, content in contents(root, {f"{FOLDER}/{name}": name for name in names}, LARGEST):
        yield name, _parse(content, f"{root}: {name}")


def _parse(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072) or labels.dtype.kind != "i":
            raise ValueError(f"its data are {pixels.dtype} {pixels.shape}, with {len(labels)} labels")
    except Exception as error:  # noqa: BLE001  (damaged pickles raise anything)
        raise DataError(f"{where} is not a batch of CIFAR-10 ({error}); fetch it again") from None
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
