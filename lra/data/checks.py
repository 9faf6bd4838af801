"""Whether a prepared split holds what its task and protocol declare."""

from __future__ import annotations

import numpy as np

from lra.task import DataError, Protocol, Split, Task


def check_split(task: Task, protocol: Protocol, name: str, split: Split) -> None:
    """Raise DataError, with the number of the first example that is wrong, unless every label is a class of the task,
    every document holds a value, and every value is a token of the protocol (or, of continuous input, a byte)."""
    where = f"{task.name} under {protocol.name!r}: {name}"
    labels, index = np.asarray(split.labels), np.asarray(split.index)
    for what, array in (("labels", labels), ("values", split.values)):
        if array.dtype.kind != "u":
            raise DataError(f"{where} has {what} of type {array.dtype}; store unsigned integers")
    if index.shape[1] != task.towers:
        raise DataError(f"{where} has {index.shape[1]} documents in each example; the task declares {task.towers}")
    if len(wrong := np.flatnonzero(labels >= task.classes)):
        raise DataError(
            f"{where} example {wrong[0]} has the label {labels[wrong[0]]}; the task declares {task.classes} classes, "
            f"0 to {task.classes - 1}"
        )
    lengths, channels = np.diff(split.offsets), max(protocol.channels, 1)
    if len(wrong := np.flatnonzero((lengths[index] == 0).any(axis=1))):
        raise DataError(f"{where} example {wrong[0]} is empty; leave it out, or give it at least one value")
    if len(wrong := np.flatnonzero((lengths[index] % channels != 0).any(axis=1))):
        size = int(lengths[index[wrong[0]]][0])
        raise DataError(
            f"{where} example {wrong[0]} has {size} values, which are not a multiple of {channels} channels"
        )
    largest = (protocol.vocabulary or 256) - 1
    if len(split.values) and split.values.max() > largest:
        document = np.searchsorted(split.offsets, np.argmax(split.values > largest), side="right") - 1
        found = np.flatnonzero((index == document).any(axis=1))
        example = f"example {found[0]}" if len(found) else f"document {document}"
        value, kind = split.document(int(document)).max(), "tokens" if protocol.vocabulary else "bytes"
        raise DataError(f"{where} {example} has the value {value}; {kind} are from 0 to {largest}")
