"""Checks of a prepared split against the declarations of its task and protocol."""

from __future__ import annotations

import numpy as np

from lra.task import UNSCORED, DataError, Protocol, Split, Task


def check_split(task: Task, protocol: Protocol, name: str, split: Split) -> None:
    """Raise DataError, with the number of the first example that is wrong, unless the labels are those of the task's
    target, every document holds a value, and every value is a token of the protocol (or, of continuous input, a byte or
    a finite number)."""
    where = f"{task.name} under {protocol.name!r}: {name}"
    index, channels = np.asarray(split.index), max(protocol.channels, 1)
    if protocol.real and (split.values.dtype != np.float32 or not np.isfinite(split.values).all()):
        raise DataError(f"{where} has values of type {split.values.dtype}, or not finite; store finite float32")
    if not protocol.real and split.values.dtype.kind != "u":
        raise DataError(f"{where} has values of type {split.values.dtype}; store unsigned integers")
    if index.shape[1] != task.towers:
        raise DataError(f"{where} has {index.shape[1]} documents in each example; the task declares {task.towers}")
    _check_labels(task, protocol, split, where)
    lengths = np.diff(split.offsets)
    if len(wrong := np.flatnonzero((lengths[index] == 0).any(axis=1))):
        raise DataError(f"{where} example {wrong[0]} is empty; leave it out, or give it at least one value")
    if len(wrong := np.flatnonzero((lengths[index] % channels != 0).any(axis=1))):
        size = int(lengths[index[wrong[0]]][0])
        raise DataError(
            f"{where} example {wrong[0]} has {size} values, which are not a multiple of {channels} channels"
        )
    largest = (protocol.vocabulary or 256) - 1
    if not protocol.real and len(split.values) and split.values.max() > largest:
        document = np.searchsorted(split.offsets, np.argmax(split.values > largest), side="right") - 1
        found = np.flatnonzero((index == document).any(axis=1))
        example = f"example {found[0]}" if len(found) else f"document {document}"
        value, kind = split.document(int(document)).max(), "tokens" if protocol.vocabulary else "bytes"
        raise DataError(f"{where} {example} has the value {value}; {kind} are from 0 to {largest}")


def _check_labels(task: Task, protocol: Protocol, split: Split, where: str) -> None:
    labels, channels = np.asarray(split.labels), max(protocol.channels, 1)
    sizes = np.diff(split.offsets)[np.asarray(split.index)[:, 0]] // channels
    if task.target != split.target:
        kind = {"class": "unsigned integers", "position": "int32, one for each position", "value": "float32",
                "next": "no labels"}[task.target]  # fmt: skip
        raise DataError(f"{where} has labels of type {labels.dtype}; for the target {task.target!r} store {kind}")
    if task.target == "value" and len(wrong := np.flatnonzero(~np.isfinite(labels))):
        raise DataError(f"{where} example {wrong[0]} has the label {labels[wrong[0]]}; labels are finite numbers")
    if task.target == "class" and len(wrong := np.flatnonzero(labels >= task.classes)):
        raise DataError(
            f"{where} example {wrong[0]} has the label {labels[wrong[0]]}; the task declares {task.classes} classes, "
            f"0 to {task.classes - 1}"
        )
    if task.target == "next" and len(wrong := np.flatnonzero(sizes < 2)):
        raise DataError(f"{where} example {wrong[0]} has {sizes[wrong[0]]} tokens; the next one needs at least 2")
    if task.target == "position":
        if len(wrong := np.flatnonzero(sizes > protocol.length)):
            raise DataError(
                f"{where} example {wrong[0]} has {sizes[wrong[0]]} positions; the protocol's length is "
                f"{protocol.length}, and a cut would lose scored positions"
            )
        if len(labels) * channels != len(split.values):
            raise DataError(f"{where} has {len(labels)} labels for {len(split.values) // channels} positions")
        starts = np.asarray(split.offsets) // channels
        if len(wrong := np.flatnonzero((labels < UNSCORED) | (labels >= task.classes))):
            document = np.searchsorted(starts, wrong[0], side="right") - 1
            raise DataError(
                f"{where} document {document} has the label {labels[wrong[0]]} at position "
                f"{wrong[0] - starts[document]}; classes are from 0 to {task.classes - 1}, and {UNSCORED} is not scored"
            )
        scored = np.append(0, np.cumsum(labels != UNSCORED))[starts]
        if len(wrong := np.flatnonzero(np.diff(scored)[np.asarray(split.index)[:, 0]] == 0)):
            raise DataError(f"{where} example {wrong[0]} has no scored position")
