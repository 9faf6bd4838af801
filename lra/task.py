"""The task contract: where examples come from, under which frozen protocol, and how they lie on disk and in memory.

A prepared split is a bag of right-ragged documents and, per example, which documents it shows:

    values: (total,) uint8 or uint16      every document's tokens or pixels, end to end
    offsets: (documents + 1,) int64       document d is values[offsets[d]:offsets[d + 1]]
    index: (n, towers) int32              the documents of example i (two for Retrieval, one elsewhere)
    labels: (n,) uint8

so a text that appears in a thousand pairs is stored once, and a whole set fits on the accelerator. Where a protocol has
several channels, a document is its positions one after the other, each with all its channels: (L, channels) flattened.
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
"""progress(what, done, total): called by preparation as it goes."""


def silent(what: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class Protocol:
    """A frozen way to pose a task. Results of different protocols never share a ranking.

    length: longest sequence in tokens (longer ones are cut); vocabulary: number of token ids, or 0 for continuous
    input; channels: input values per position when continuous; scale: (mean, std) applied to continuous bytes / 255.
    selection: the split that chooses the checkpoint. counts, sha256: per split, checked at preparation; an empty
    sha256 means the data cannot be frozen (a user's own folder) and the measured one is recorded instead.
    raw: the files it is prepared from, in words; empty when the task generates its examples.
    """

    name: str
    length: int
    vocabulary: int = 0
    channels: int = 0
    scale: tuple[float, float] = (0.0, 1.0)
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
    """One prepared split, memory-mapped. Shapes in the module docstring."""

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

    classes: number of labels; chance: accuracy of a blind guess, in [0, 1]; towers: sequences per example.
    protocols: name -> Protocol; the first is the default.
    version: raised whenever the same protocol yields other bytes, so that sets prepared before are prepared anew.
    resumable: an interrupted `prepare` is handed its folder back as it left it; otherwise it starts from an empty one.
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
        """Write every split of `protocol` into `folder` (private to this call, empty unless resumable). Deterministic:
        the same bytes for any `workers`. `source`: a folder with the raw files, where the task does not generate
        them. Raises DataError."""

    @abstractmethod
    def load(self, folder: Path, split: str) -> Split:
        """Open a prepared split without reading it whole."""

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        """Accuracies in [0, 1] on `test` that need no sequence model: what a result has to beat to mean anything."""
        majority = np.bincount(train.labels, minlength=self.classes).argmax()
        return {"majority class": float((np.asarray(test.labels) == majority).mean())}

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        """A text as one sequence of this task: (L,) tokens. Raises DataError where examples are no texts."""
        raise DataError(f"{self.name} does not encode texts; give arrays of its tokens or bytes")

    @abstractmethod
    def describe(self, split: Split, example: int) -> str:
        """One example as a line of text for people."""
