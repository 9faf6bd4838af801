"""How a prepared set lies on disk: what is written reads back, and what does not fit together is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_task import Tiny

from lra.data import prepared_sets
from lra.data.prepared_sets import hash_file
from lra.task import DataError
from lra.tasks.storage import SHARED, DocumentWriter, open_split, write_documents, write_examples


def test_documents_written_in_pieces_read_back(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path, SHARED, np.uint16) as writer:
        writer.append(np.array([1, 2, 300], np.uint16))
        writer.append(np.array([4, 5, 6], np.uint16), np.array([2, 1]))
    write_examples(tmp_path, "test", np.array([1, 0]), np.array([[0, 2], [1, 1]]))
    split = open_split(tmp_path, "test")
    assert [split.document(d).tolist() for d in range(3)] == [[1, 2, 300], [4, 5], [6]]
    assert split.index.tolist() == [[0, 2], [1, 1]]
    assert split.index.dtype == np.int32
    assert split.labels.dtype == np.uint8
    assert isinstance(split.values, np.memmap)


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with (
        DocumentWriter(tmp_path, "train") as writer,
        pytest.raises(ValueError, match="lengths add up to 3, values are 2"),
    ):
        writer.append(np.zeros(2, np.uint8), np.array([3]))
    with pytest.raises(ValueError, match="1 rows of index for 2 labels"):
        write_examples(tmp_path, "train", np.zeros(2), np.zeros(1))


def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path, "train", [np.zeros(3, np.uint8)])
    write_examples(tmp_path, "train", np.zeros(1))
    np.save(tmp_path / "train.offsets.npy", np.array([0, 4]))
    with pytest.raises(DataError, match="the arrays of train do not fit together"):
        open_split(tmp_path, "train")
    (tmp_path / "train.labels.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match=r"train.labels.npy is corrupt"):
        open_split(tmp_path, "train")
    (tmp_path / "train.labels.npy").unlink()
    with pytest.raises(DataError, match=r"train.labels.npy is missing"):
        open_split(tmp_path, "train")


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    write_documents(tmp_path, "train", [np.zeros(3, np.uint8)])
    write_examples(tmp_path, "train", np.zeros(1))
    np.save(tmp_path / "train.labels.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"train.labels.npy is corrupt"):
        open_split(tmp_path, "train")


def test_a_prepared_set_is_on_disk_before_its_manifest_is_and_looking_at_it_waits_for_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))
    monkeypatch.delenv("LRA_DATA", raising=False)
    found = prepared_sets.load_prepared(Tiny())
    [manifest] = (at for at, inode in enumerate(synced) if inode == (found.folder / "manifest.json").stat().st_ino)
    assert {(found.folder / name).stat().st_ino for name in found.manifest["files"]} <= set(synced[:manifest])
    del synced[:]
    assert all(hash_file(found.folder / name) == facts["sha256"] for name, facts in found.manifest["files"].items())
    assert prepared_sets.verify(Tiny()) == []
    assert synced == []


@pytest.mark.parametrize(
    ("labels", "dtype"), [([0, 255], np.uint8), ([999, 3], np.uint16), ([70_000], np.uint32), ([2.0], np.uint8)]
)
def test_labels_are_stored_in_a_type_that_holds_them(tmp_path: Path, labels: list[float], dtype: type) -> None:
    write_documents(tmp_path, "train", [np.ones(1, np.uint8)] * len(labels))
    write_examples(tmp_path, "train", np.array(labels))
    stored = open_split(tmp_path, "train").labels
    assert stored.dtype == dtype
    assert stored.tolist() == labels


@pytest.mark.parametrize("label", [-1, 0.5, float("nan"), 2**32])
def test_a_label_that_is_no_class_is_refused_with_its_number(tmp_path: Path, label: float) -> None:
    with pytest.raises(DataError, match=f"the label of example 2 of train is {label}, not a whole number from 0 to"):
        write_examples(tmp_path, "train", np.array([0, 1, label]))


def test_values_that_do_not_fit_are_refused_with_the_number_of_their_document(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path, "train") as writer:
        writer.append(np.array([7, 255]))
        with pytest.raises(DataError, match="document 2 of train holds 256; uint8 holds whole numbers from 0 to 255"):
            writer.append(np.array([1, 2, 3, 256, 4]), np.array([2, 3]))
    with DocumentWriter(tmp_path, "test", np.uint16) as writer:
        writer.append(np.zeros(3, np.uint16))
        with pytest.raises(DataError, match=r"document 1 of test holds 0.5; uint16"):
            writer.append(np.array([0.5]))
