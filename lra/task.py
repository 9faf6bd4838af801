"""The task contract: tasks, their frozen protocols and the layout of prepared splits.

A prepared split holds documents of different lengths and, for each example, the numbers of its documents:

    values: (total,) uint8, 16 or 32      tokens or pixels of all documents, concatenated; float32 for real values
    offsets: (documents + 1,) int64       document d is values[offsets[d]:offsets[d + 1]]
    index: (n, towers) int32              the documents of example i (two for Retrieval, one elsewhere)
    labels: (n,) uint8, 16 or 32          classes, below the `classes` of the task

A text that appears in a thousand pairs is therefore stored once, and a whole set fits on the accelerator. With several
channels, a document is its (L, channels) array, flattened. Other targets than classes have other labels:

    position: (positions,) int32          a class for each position of every document, UNSCORED at positions without one
    value: (n,) float32                   one number for each example
    next: (0,)                            none; the labels are the tokens themselves
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lra.errors import DataError as DataError
from lra.errors import is_users

SPLITS = ("train", "validation", "test")
TARGETS = ("class", "position", "value", "next")
"""The kinds of target: one class for each sequence, one for each scored position, a real value, or the next token."""
UNSCORED = -1
"""The label of a position that is not scored."""

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total): called repeatedly during a long operation."""


def silent(phase: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Protocol:
    """A frozen definition of a task's data. Results of different protocols are never ranked together.

    length: longest sequence in tokens (longer ones are truncated); vocabulary: number of token ids, 0 for continuous
    input; channels: input values per position, for continuous input; scale: (mean, std) that normalise bytes / 255.
    real: continuous input is float32 instead of bytes, normalised by (mean, std) without the division by 255.
    hides_zeros: token 0 is hidden from the encoder like padding, at every position but the first.
    selection: the split that selects the checkpoint. counts, sha256: number of examples and checksum of each split,
    compared after preparation; without a sha256 any data are accepted and their checksum is recorded.
    raw: the files that the data are prepared from, in words; empty when the task generates its examples.

    law: arguments of `draw`, with which a generated task draws the examples of training, validation and test.
    tests: further test splits -> the arguments that differ from `law`; a split of longer sequences is named
    `length-<tokens>`.

    budget: what a task takes from a source that is larger, by its own names: numbers of documents, tokens and bytes.
    packed: an example is a piece of a stream of documents, each of which begins with the token `start` of the task.
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
    real: bool = False
    law: Mapping[str, Any] = field(default_factory=dict)
    tests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)
    packed: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits: SPLITS, then the further test splits."""
        return (*SPLITS, *self.tests)

    def of_split(self, split: str) -> Protocol:
        """This protocol with the length of one of its splits: that of `length-<tokens>` if it is longer."""
        tokens = split.removeprefix("length-") if split in self.tests else ""
        return replace(self, length=max(self.length, int(tokens))) if tokens.isdecimal() else self

    @property
    def amounts(self) -> str:
        """Numbers of examples of each split, and the budget, in words."""
        parts = {"": self.counts, "budget: ": self.budget}
        words = {name: ", ".join(f"{number:,} {what}" for what, number in part.items()) for name, part in parts.items()}
        return "; ".join(name + text for name, text in words.items() if text)

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
        return len(self.index)

    @property
    def target(self) -> str:
        """The target of the labels, one of TARGETS, from their type and number."""
        kind = {"f": "value", "i": "position"}.get(self.labels.dtype.kind, "class")
        return "next" if len(self.index) and not len(self.labels) else kind

    def document(self, number: int) -> np.ndarray:
        return self.values[self.offsets[number] : self.offsets[number + 1]]

    def label(self, example: int, channels: int = 1) -> Any:
        """The label of an example: a class, a value, or (L,) with a class for each position or the next token.

        channels: values per position.
        """
        if self.target in ("class", "value"):
            return self.labels[example].item()
        number = int(self.index[example, 0])
        if self.target == "next":
            return np.append(self.document(number)[1:].astype(np.int64), UNSCORED)
        start, stop = (int(offset) // channels for offset in self.offsets[number : number + 2])
        return np.array(self.labels[start:stop])

    def answers(self) -> np.ndarray:
        """The labels that are scored, example by example: (k,)."""
        if self.target == "next":
            return np.concatenate([self.document(int(number))[1:] for number in self.index[:, 0]])
        labels = np.asarray(self.labels)
        return labels[labels != UNSCORED] if self.target == "position" else labels


class Task(ABC):
    """One public subclass per file in `tasks/`, named after the file.

    classes: number of labels (1 for a real value, the vocabulary for the next token); towers: sequences per example.
    protocols: name -> Protocol; the first is the default.
    target: one of TARGETS; head, loss, metrics and baselines follow from it. tolerance: for a real value, the largest
    error that counts as right. causal: whether the task is for causal encoders only. start: the token at the start of a
    document, for protocols that pack documents.
    generated: training examples are drawn at every step by `training_batch`; the split `train` is a sample of them.
    version: increased when the same protocol yields other bytes, so that existing sets are prepared again.
    resumable: whether `prepare` continues in the folder of an interrupted call; otherwise the folder is empty.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    classes: ClassVar[int]
    towers: ClassVar[int] = 1
    target: ClassVar[str] = "class"
    tolerance: ClassVar[float] = 0.0
    start: ClassVar[int] = 0
    causal: ClassVar[bool] = False
    generated: ClassVar[bool] = False
    protocols: ClassVar[Mapping[str, Protocol]]
    version: ClassVar[int] = 1
    resumable: ClassVar[bool] = False

    def command(self, protocol: Protocol) -> str:
        """The shell command that prepares this task under `protocol`."""
        default = protocol.name == next(iter(self.protocols))
        return f"lra data prepare {self._reference()}{'' if default else f' --protocol {protocol.name}'}"

    def _reference(self) -> str:
        """The name of this task on the command line: its name, or `file.py:Class` for a user's file."""
        module = sys.modules.get(type(self).__module__)
        file = str(getattr(module, "__file__", None) or "")
        if not file or not is_users(file):
            return self.name
        path = Path(file)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"{shown}:{type(self).__qualname__}"

    @abstractmethod
    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        """Write every split of `protocol` into `folder`.

        folder: used by this call alone, empty unless the task is resumable. source: folder with the raw files; None for
        generated data. workers: processes or threads; the bytes written do not depend on it. Raises DataError.
        """

    def raw_files(self, protocol: Protocol, source: Path) -> Iterable[Path]:
        """The files below `source` that `prepare` reads: if one of them changes, the set is prepared again.

        By default every file there, except hidden ones.
        """
        for parent, folders, names in os.walk(source):
            folders[:] = [name for name in folders if name[0] != "."]
            yield from (Path(parent) / name for name in names if name[0] != ".")

    @abstractmethod
    def load(self, folder: Path, split: str) -> Split:
        """Memory-map a prepared split. Raises DataError."""

    def training_batch(self, protocol: Protocol, size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of one training step of a generated task: values (size, L[, channels]) and labels, as in a
        batch. They depend only on the arguments."""
        raise NotImplementedError(f"{self.name} reads its training examples from the prepared split")

    def chance(self, protocol: Protocol) -> float | None:
        """Accuracy of a guess; None for a real value, for which `floors` has the baselines."""
        return None if self.target == "value" else 1 / self.classes

    def plateaus(self, protocol: Protocol) -> dict[str, float]:
        """Plateaus of training: what a model has learned -> the accuracy at which training is known to pause."""
        return {}

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        """Share of right answers on `test`, in [0, 1], of baselines without a sequence model, by name."""
        seen, asked = train.answers(), test.answers()
        if self.target == "value":
            return {"mean value": float((np.abs(asked - seen.mean()) <= self.tolerance).mean())}
        majority = np.bincount(seen, minlength=self.classes).argmax()
        return {"majority class": float((asked == majority).mean())}

    def floor_bits(self, train: Split, test: Split) -> dict[str, float]:
        """Bits per token on `test` of baselines without a sequence model, by name; for the target "next"."""
        return {}

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        """Encode a text as one sequence: (L,) tokens. Raises DataError if the examples of this task are not texts."""
        raise DataError(f"{self.name} does not encode texts; pass arrays of tokens or bytes")

    def decode(self, tokens: np.ndarray) -> str:
        """The text of (n,) tokens, the inverse of `encode`. Raises DataError if the task does not generate texts."""
        raise DataError(f"{self.name} does not decode tokens to a text")

    @abstractmethod
    def describe(self, split: Split, example: int) -> str:
        """One example as a readable line of text."""
