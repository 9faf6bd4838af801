"""A prepared task as sequences of examples, and a user's own inputs in the layout of a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from lra.data import prepared_sets
from lra.data.prepared_sets import Prepared
from lra.errors import UserError, brief, unknown
from lra.task import Progress, Protocol, Split, Task


class Example(NamedTuple):
    """values: (L,) tokens, or (L, channels) bytes or real values of a continuous protocol; of a task with two towers, a
    pair of them. label: the class or value; (L,) classes or next tokens, UNSCORED at positions without one."""

    values: Any
    label: Any


class Examples(Sequence[Example]):
    """One split as a sequence: `len(split)`, `split[0].values`, `split[0].label`. Read from disk as it is used."""

    def __init__(self, split: Split, protocol: Protocol) -> None:
        self.split, self.protocol = split, protocol

    def __len__(self) -> int:
        return len(self.split)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        channels = max(self.protocol.channels, 1)
        documents = []
        for number in np.asarray(self.split.index[index]):
            values = np.array(self.split.document(int(number)))[: self.protocol.length * channels]
            documents.append(values.reshape(-1, channels) if self.protocol.channels else values)
        label = self.split.label(index, channels)
        if self.split.target in ("position", "next"):
            label = label[: self.protocol.length]
        return Example(documents[0] if len(documents) == 1 else tuple(documents), label)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"


class LoadedTask:
    """A task under one protocol, prepared: `task.train[0]`, `task.sizes`, `task.classes`."""

    def __init__(self, prepared: Prepared, reference: str | type) -> None:
        self.prepared, self.reference = prepared, reference
        self.task, self.protocol = prepared.task, prepared.protocol
        self.name, self.title = self.task.name, self.task.title
        self.classes, self.towers = self.task.classes, self.task.towers

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples by split."""
        return dict(self.prepared.manifest["counts"])

    @property
    def train(self) -> Examples:
        return self.split("train")

    @property
    def validation(self) -> Examples:
        return self.split("validation")

    @property
    def test(self) -> Examples:
        return self.split("test")

    def split(self, name: str) -> Examples:
        """A split by name. Raises UserError."""
        if name not in self.protocol.splits:
            raise unknown("split", name, self.protocol.splits)
        return Examples(self.prepared.split(name), self.protocol.of_split(name))

    def describe(self, split: str, example: int) -> str:
        """One example as a line of text."""
        return self.task.describe(self.split(split).split, example)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.sizes.items())
        shape = f"length {self.protocol.length:,}, {self.classes} classes"
        return f"<task {self.name} ({self.protocol.name}): {sizes}; {shape}>"


def load(
    task: str | type | Task, protocol: str = "", *, source: Any = None, progress: Progress | None = None
) -> LoadedTask:
    """A task under a protocol (its first by default), prepared now if it is not. source: folder with the raw files.
    Raises UserError."""
    from lra.registry import tasks

    instance = task if isinstance(task, Task) else tasks.get(task)()
    prepared = prepared_sets.load_prepared(instance, protocol or None, source=source, progress=progress)
    return LoadedTask(prepared, type(task) if isinstance(task, Task) else task)


def split_of(inputs: Any, task: Task, protocol: Protocol) -> Split:
    """A user's inputs as an unlabelled split.

    inputs: one example or a list of them; an example is a text where the task encodes texts, or an array or tensor of
    shape (L,), with several channels (L, channels). Several examples of one length may be one array (B, L[, channels]).
    A task with two towers takes pairs (a, b). Longer sequences are cut to the protocol's length. Raises UserError.
    """
    if isinstance(inputs, str) or (task.towers == 2 and _is_pair(inputs)):
        inputs = [inputs]
    elif not isinstance(inputs, list | tuple):
        array = _array(inputs)
        inputs = [array] if array.ndim == 1 + (protocol.channels > 1) else list(array)
    if not len(inputs):
        raise UserError("there is no input to predict")
    documents: list[np.ndarray] = []
    index: list[list[int]] = []
    for number, example in enumerate(inputs):
        if task.towers == 2 and not _is_pair(example):
            raise UserError(f"input {number} is {brief(example)}; {task.name} takes pairs (a, b)")
        rows = []
        for part in example if task.towers == 2 else (example,):
            rows.append(len(documents))
            documents.append(_document(part, task, protocol, f"input {number}"))
        index.append(rows)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    count, kind = {
        "class": (len(index), np.uint8), "value": (len(index), np.float32), "next": (0, np.uint8),
        "position": (offsets[-1] // max(protocol.channels, 1), np.int32),
    }[task.target]  # fmt: skip
    return Split(np.concatenate(documents), offsets, np.array(index, np.int32), np.zeros(count, kind))


def _is_pair(inputs: Any) -> bool:
    return isinstance(inputs, tuple) and len(inputs) == 2


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(f"an input is {brief(values)}: {error}") from None


def _document(example: Any, task: Task, protocol: Protocol, name: str) -> np.ndarray:
    """One encoded sequence, flattened. Raises UserError."""
    channels = max(protocol.channels, 1)
    array = _array(task.encode(example, protocol) if isinstance(example, str) else example)
    shape = f"(L, {channels})" if channels > 1 else "(L,)"
    if array.ndim == 2 and array.shape[1] == channels:
        array = array.reshape(-1)
    elif array.ndim != 1 or channels > 1:
        raise UserError(f"{name} has shape {array.shape}; one example of {task.name} has shape {shape}")
    if protocol.real:
        if not len(array) or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise UserError(f"{name} is {brief(example)}; a sequence of at least one finite number")
        return array[: protocol.length * channels].astype(np.float32)
    if not len(array) or array.dtype.kind not in "iu":
        raise UserError(f"{name} is {brief(example)}; a sequence of at least one whole number")
    largest = (protocol.vocabulary or 256) - 1
    if array.min() < 0 or array.max() > largest:
        kind = "tokens" if protocol.vocabulary else "bytes"
        raise UserError(f"{name} has values from {array.min()} to {array.max()}; {kind} are from 0 to {largest}")
    return array[: protocol.length * channels].astype(np.min_scalar_type(largest))
