"""A user's own task: what its examples may hold, and when its prepared set is out of date."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lra.data import prepared_sets
from lra.data.batches import DeviceSet
from lra.data.examples import split_of
from lra.registry import tasks
from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task
from lra.tasks.storage import open_split, write_documents, write_examples

PROTOCOL = Protocol("strict", length=6, vocabulary=10)


class Numbers(Task):
    """Three documents a split, as the test wants them."""

    name = "numbers"
    title = "numbers"
    classes = 3
    protocols: ClassVar = {"strict": PROTOCOL}

    def __init__(self, documents: list[list[int]], labels: list[int], dtype: Any = np.uint8) -> None:
        self.documents, self.labels, self.dtype = documents, labels, dtype

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        for split in SPLITS:
            write_documents(folder, split, [np.array(d, self.dtype) for d in self.documents], self.dtype)
            write_examples(folder, split, np.array(self.labels))

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def describe(self, split: Split, example: int) -> str:
        return ""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("documents", "labels", "changes", "message"),
    [
        ([[1], [2], [3]], [0, 1, 3], {}, r"example 2 has the label 3; the task declares 3 classes, 0 to 2"),
        ([[1], [2], [3]], [0, 999, 1], {}, r"example 1 has the label 999; the task declares 3 classes"),
        ([[1], [], [3]], [0, 1, 2], {}, r"example 1 is empty; leave it out, or give it at least one value"),
        ([[1], [2, 3], [4, 10]], [0, 1, 2], {}, r"example 2 has the value 10; tokens are from 0 to 9"),
        ([[1], [9], [300]], [0, 1, 2], {"vocabulary": 0, "channels": 1}, r"example 2 has the value 300; bytes are"),
        ([[1, 2], [1, 2, 3], [4, 5]], [0, 1, 2], {"vocabulary": 0, "channels": 2}, r"example 1 has 3 values, which"),
    ],
)  # fmt: skip
def test_examples_that_the_task_rules_out_are_refused_with_their_number(
    cache: Path, documents: list[list[int]], labels: list[int], changes: dict[str, Any], message: str
) -> None:
    task, protocol = Numbers(documents, labels, np.uint16), dataclasses.replace(PROTOCOL, **changes)
    with pytest.raises(DataError, match=f"^numbers under 'strict': train {message}"):
        prepared_sets.load_prepared(task, protocol)
    assert prepared_sets.find_prepared(task, protocol) is None


def test_a_thousand_classes_and_tokens_beyond_65_536_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numbers, "classes", 1000)
    protocol = dataclasses.replace(PROTOCOL, vocabulary=100_000)
    task = Numbers([[1], [70_000, 2], [99_999]], [0, 999, 300], np.uint32)
    split = prepared_sets.load_prepared(task, protocol).split("test")
    batch = DeviceSet.of(split, protocol, torch.device("cpu")).batch(np.arange(3))
    assert batch.labels.tolist() == [0, 999, 300]
    assert [batch.values[i, 0][batch.mask[i, 0]].tolist() for i in range(3)] == [[1], [70_000, 2], [99_999]]
    assert split_of([[70_000]], task, protocol).values.tolist() == [70_000]


TASK = """
from pathlib import Path

import numpy as np
from words import number

from lra.task import SPLITS, Protocol, Task
from lra.tasks.storage import open_split, write_documents, write_examples


class Lines(Task):
    name, title, classes = "lines", "lines", 10
    protocols = {"strict": Protocol("strict", length=6, vocabulary=10, raw="numbers.txt")}

    def prepare(self, folder, protocol, *, source, workers, progress):
        rows = [number(word) for word in (source / "numbers.txt").read_text().split()]
        for split in SPLITS:
            write_documents(folder, split, [np.array([row]) for row in rows])
            write_examples(folder, split, np.array(rows))

    def load(self, folder, split):
        return open_split(folder, split)

    def describe(self, split, example):
        return ""
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a task, a module that it imports, and a folder of raw files."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "numbers.txt").write_text("1 2 3")
    (tmp_path / "lines.py").write_text(TASK)
    (tmp_path / "words.py").write_text("def number(word):\n    return int(word)\n")
    (tmp_path / "unrelated.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labels(folder: Path, source: Path | None = None) -> tuple[list[int], str]:
    prepared = prepared_sets.load_prepared(tasks.get("lines.py:Lines")(), source=source)
    return prepared.split("train").labels.tolist(), prepared.replaced


def edit_class(folder: Path) -> None:
    path = folder / "lines.py"
    path.write_text(path.read_text().replace("np.array(rows)", "np.array(rows) + 1"))


def edit_helper(folder: Path) -> None:
    (folder / "words.py").write_text("def number(word):\n    return int(word) + 1\n")


def edit_raw_file(folder: Path) -> None:
    (folder / "raw" / "numbers.txt").write_text("2 3 4")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_class, "the source of the task lines changed"), (edit_helper, "the source of the task lines changed"),
        (edit_raw_file, "the raw files in .*raw changed"),
    ],
)  # fmt: skip
def test_a_set_is_prepared_again_when_what_it_was_made_from_changes(
    folder: Path, change: Callable[[Path], None], reason: str
) -> None:
    assert labels(folder, folder / "raw") == ([1, 2, 3], "")
    assert labels(folder) == ([1, 2, 3], "")
    change(folder)
    # from the raw files of before, which need not be named again
    again, replaced = labels(folder)
    assert again == [2, 3, 4]
    assert re.fullmatch(reason, replaced)
    assert labels(folder) == ([2, 3, 4], "")


def test_what_does_not_change_the_content_keeps_a_set(folder: Path) -> None:
    labels(folder, folder / "raw")
    (folder / "unrelated.py").write_text("x = 1\n")
    os.utime(folder / "raw" / "numbers.txt", (1, 1))
    (folder / "raw" / ".hidden").write_text("x")
    assert labels(folder) == ([1, 2, 3], "")
    (folder / "raw" / "numbers.txt").unlink()
    (folder / "raw" / ".hidden").unlink()
    (folder / "raw").rmdir()
    assert labels(folder) == ([1, 2, 3], "")
