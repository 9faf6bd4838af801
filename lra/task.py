"""The task contract: tasks, their frozen protocols and the layout of prepared splits.

A prepared split holds documents of different lengths and, for each example, the numbers of its documents:

    values: (total,) uint8 or uint16      every document's tokens or pixels, end to end
    offsets: (documents + 1,) int64       document d is values[offsets[d]:offsets[d + 1]]
    index: (n, towers) int32              the documents of example i (two for Retrieval, one elsewhere)
    labels: (n,) uint8

A text that appears in a thousand pairs is therefore stored once, and a whole set fits on the accelerator. With several
channels, a document is its (L, channels) array, flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.errors import DataError as DataError

SPLITS = ("train", "validation", "test")

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total): called repeatedly during a long operation."""


def silent(phase: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Protocol:
    """A frozen definition of a task's data. Results of different protocols are never ranked together.

    length: longest sequence in tokens (longer ones are truncated); vocabulary: number of token ids, 0 for continuous
    input; channels: input values per position, for continuous input; scale: (mean, std) that normalise bytes / 255.
    hides_zeros: token 0 is hidden from the encoder like padding, wherever it stands (except at the first position).
    selection: the split that selects the checkpoint. counts, sha256: number of examples and checksum of each split,
    compared after preparation; without a sha256 any data are accepted and their checksum is recorded.
    raw: the files that the data are prepared from, in words; empty when the task generates its examples.
    """

    name: str
    length: int
    vocabulary: int = 0
    channels: int = 0
    scale: tuple[float, float] = (0.0, 1.0)
    hides_zeros: bool = False
    selection: str = "validation"
    counts: Mapping[str, int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    raw: str = ""

    @property
    def encoding(self) -> str:
        return "tokens" if self.vocabulary else "continuous"


@dataclass(frozen=True)
class Split:
    """One prepared split, memory-mapped. The module docstring gives the shapes."""

    values: np.ndarray
    offsets: np.ndarray
    index: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def document(self, number: int) -> np.ndarray:
        return self.values[self.offsets[number] : self.offsets[number + 1]]


class Task(ABC):
    """One public subclass per file in `tasks/`, named after the file.

    classes: number of labels; towers: sequences per example. protocols: name -> Protocol; the first is the default.
    version: increased when the same protocol yields other bytes, so that existing sets are prepared again.
    resumable: whether `prepare` continues in the folder that an interrupted call left; otherwise it gets an empty one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    classes: ClassVar[int]
    towers: ClassVar[int] = 1
    protocols: ClassVar[Mapping[str, Protocol]]
    version: ClassVar[int] = 1
    resumable: ClassVar[bool] = False

    def command(self, protocol: Protocol) -> str:
        """The shell command that prepares this task under `protocol`."""
        default = protocol.name == next(iter(self.protocols))
        return f"lra data prepare {self.name}{'' if default else f' --protocol {protocol.name}'}"

    @abstractmethod
    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        """Write every split of `protocol` into `folder`.

        folder: used by this call alone, empty unless the task is resumable. source: folder with the raw files; None for
        generated data. workers: processes or threads; the bytes written do not depend on it. Raises DataError.
        """

    @abstractmethod
    def load(self, folder: Path, split: str) -> Split:
        """Memory-map a prepared split. Raises DataError."""

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        """Accuracies in [0, 1] on `test` of baselines without a sequence model, by name."""
        majority = np.bincount(train.labels, minlength=self.classes).argmax()
        return {"majority class": float((np.asarray(test.labels) == majority).mean())}

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        """Encode a text as one sequence: (L,) tokens. Raises DataError if the examples of this task are not texts."""
        raise DataError(f"{self.name} does not encode texts; pass arrays of tokens or bytes")

    @abstractmethod
    def describe(self, split: Split, example: int) -> str:
        """One example as a readable line of text."""
