"""The files of a prepared set: plain `.npy` files, memory-mapped when read.

    <split>.values.npy, <split>.offsets.npy         documents of one split, or
    documents.values.npy, documents.offsets.npy     documents shared by all splits
    <split>.index.npy, <split>.labels.npy           examples; labels of each target as in `lra.task`
    notes.json                                      remarks of the preparation (optional)

Values are appended to a file, not to a writable memory map, because on a full disk a memory map kills the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lra.task import DataError, Split

SHARED = "documents"


class DocumentWriter:
    """A context manager that appends documents to `<name>.values.npy` and writes `<name>.offsets.npy` on exit.

    name: a split, or SHARED for documents that all splits use. dtype: uint8, uint16 or uint32; float32 for real values.
    """

    def __init__(self, folder: Path, name: str, dtype: type[np.number] = np.uint8) -> None:
        self.folder, self.name, self.dtype = folder, name, np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._total = 0

    def __enter__(self) -> DocumentWriter:
        self._file = (self.folder / f"{self.name}.values.npy").open("wb")
        self._write_header()
        return self

    def _write_header(self) -> None:
        # numpy pads the header, so it can be overwritten with a larger shape
        shape = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self._total,)}
        np.lib.format.write_array_header_1_0(self._file, shape)

    def append(self, values: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Append one document, or several with their `lengths` (documents,).

        values: (total,) whole numbers, or finite ones where `dtype` is float32. Raises DataError for others.
        """
        values = np.asarray(values)
        lengths = np.array([len(values)]) if lengths is None else np.asarray(lengths)
        if lengths.sum() != len(values):
            raise ValueError(f"lengths add up to {lengths.sum()}, values are {len(values)}")
        if self.dtype == np.float32:
            if not np.isfinite(values).all():
                raise DataError(f"documents of {self.name} hold {values[~np.isfinite(values)][0]}; finite numbers only")
        elif values.dtype != self.dtype:
            place = _first_unfit(values, np.iinfo(self.dtype).max)
            if place is not None:
                document = sum(map(len, self._lengths)) + int(np.searchsorted(lengths.cumsum(), place, side="right"))
                raise DataError(
                    f"document {document} of {self.name} holds {values[place]}; {self.dtype} holds whole numbers from "
                    f"0 to {np.iinfo(self.dtype).max}"
                )
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self._lengths.append(lengths.astype(np.int64))
        self._total += len(values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._write_header()
        finally:
            self._file.close()
        if kind is None:
            offsets = np.concatenate([np.zeros(1, np.int64), *self._lengths]).cumsum()
            np.save(self.folder / f"{self.name}.offsets.npy", offsets)


def write_documents(
    folder: Path, name: str, documents: Iterable[np.ndarray], dtype: type[np.number] = np.uint8
) -> None:
    """Write documents. name: as in DocumentWriter."""
    with DocumentWriter(folder, name, dtype) as writer:
        for document in documents:
            writer.append(document)


def write_examples(folder: Path, split: str, labels: np.ndarray, index: np.ndarray | None = None) -> None:
    """Write the examples of a split.

    labels: (n,) whole numbers, stored as uint8, uint16 or uint32, whichever is the smallest that holds them all;
    index: (n,) or (n, towers) numbers of documents, by default document i for example i. Raises DataError for a label
    that is not a whole number from 0 to 2^32 - 1. Labels of other targets: `write_values`, `write_positions`.
    """
    labels = np.asarray(labels)
    index = np.arange(len(labels)) if index is None else np.asarray(index)
    if len(index) != len(labels):
        raise ValueError(f"{len(index)} rows of index for {len(labels)} labels")
    largest = np.iinfo(np.uint32).max
    if (example := _first_unfit(labels, largest)) is not None:
        raise DataError(
            f"the label of example {example} of {split} is {labels[example]}, not a whole number from 0 to {largest}"
        )
    np.save(folder / f"{split}.index.npy", (index[:, None] if index.ndim == 1 else index).astype(np.int32))
    np.save(folder / f"{split}.labels.npy", labels.astype(np.min_scalar_type(int(labels.max(initial=0)))))


def write_values(folder: Path, split: str, labels: np.ndarray) -> None:
    """Write the examples of a split whose labels are real values: (n,); document i is example i. Raises DataError for a
    label that is not finite."""
    labels = np.asarray(labels, np.float32)
    if not np.isfinite(labels).all():
        raise DataError(f"the label of example {int(np.argmin(np.isfinite(labels)))} of {split} is not a finite number")
    np.save(folder / f"{split}.index.npy", np.arange(len(labels), dtype=np.int32)[:, None])
    np.save(folder / f"{split}.labels.npy", labels)


def write_positions(folder: Path, split: str, labels: Iterable[np.ndarray] | None, count: int = 0) -> None:
    """Write the examples of a split with a label at every position; document i is example i.

    labels: (L,) classes for each document, UNSCORED where none is asked; None for the next token, with the `count` of
    documents.
    """
    rows = None if labels is None else [np.asarray(row, np.int32) for row in labels]
    number = count if rows is None else len(rows)
    np.save(folder / f"{split}.index.npy", np.arange(number, dtype=np.int32)[:, None])
    np.save(folder / f"{split}.labels.npy", np.zeros(0, np.uint8) if rows is None else np.concatenate(rows))


def _first_unfit(numbers: np.ndarray, largest: int) -> int | None:
    """Position of the first entry that is not a whole number from 0 to `largest`; None if there is none."""
    if numbers.dtype.kind not in "biuf":
        raise DataError(f"{numbers.dtype} are not numbers")
    fits = (numbers >= 0) & (numbers <= largest) & (numbers == np.floor(numbers))
    return None if fits.all() else int(np.argmin(fits))


def write_notes(folder: Path, notes: Mapping[str, Any]) -> None:
    """Write remarks of the preparation, such as dropped duplicates or truncated texts, to notes.json."""
    (folder / "notes.json").write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_split(folder: Path, split: str) -> Split:
    """Memory-map a prepared split. Raises DataError if arrays are missing, unreadable or inconsistent."""
    name = SHARED if (folder / f"{SHARED}.values.npy").is_file() else split
    parts = (f"{name}.values", f"{name}.offsets", f"{split}.index", f"{split}.labels")
    values, offsets, index, labels = (_open(folder / f"{part}.npy") for part in parts)
    unsigned = {"uint8", "uint16", "uint32"}
    per_example = labels.dtype.name in unsigned | {"float32"} and len(index) == len(labels)
    consistent = (
        values.dtype.name in unsigned | {"float32"} and offsets.dtype == np.int64 and index.dtype == np.int32
        and values.ndim == 1 and offsets.ndim == 1 and len(offsets) and offsets[0] == 0 and offsets[-1] == len(values)
        and (np.diff(offsets) >= 0).all()
        and index.ndim == 2 and labels.ndim == 1
        and (per_example or not len(labels) or (labels.dtype == np.int32 and len(values) % len(labels) == 0))
        and index.min(initial=0) >= 0 and index.max(initial=-1) < len(offsets) - 1
    )  # fmt: skip
    if not consistent:
        raise DataError(f"{folder}: the arrays of {split} do not fit together; remove the folder and prepare it again")
    return Split(values, offsets, index, labels)


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; remove {path.parent} and prepare it again") from None
    except Exception as error:  # noqa: BLE001  (numpy parses the header as Python and raises whatever that raises)
        raise DataError(f"{path} is corrupt ({error}); remove {path.parent} and prepare it again") from None
