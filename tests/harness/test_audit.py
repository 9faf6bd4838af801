"""The audit counts what it says, and a contact sheet shows every image once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_task import Tiny

from lra import terminal
from lra.data import audit, prepared_sets
from lra.task import Split


class Overlapping(Tiny):
    """Three test examples are copies of training examples, one of them twice."""

    def load(self, folder: Path, split: str) -> Split:
        found, train = super().load(folder, split), super().load(folder, "train")
        if split != "test":
            return found
        copied = [train.document(5), train.document(9), train.document(9)]
        values = np.concatenate([found.values, *copied])
        offsets = np.concatenate([found.offsets, found.offsets[-1] + np.cumsum([len(c) for c in copied])])
        index = np.arange(len(found) + 3, dtype=np.int32).reshape(-1, 1)
        return Split(values, offsets, index, np.concatenate([found.labels, [0, 0, 0]]).astype(np.uint8))


def test_overlap_repeats_balance_and_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))
    clean = prepared_sets.load_prepared(Tiny())
    before = audit.audit(clean)
    after = audit.audit(prepared_sets.Prepared(Overlapping(), clean.protocol, clean.folder, clean.manifest))
    pair = ("train", "test")
    assert after.overlap[pair] == before.overlap[pair] + 3
    assert after.overlap["train", "validation"] == before.overlap["train", "validation"]
    assert after.splits[2].repeated == before.splits[2].repeated + 1
    train = before.splits[0]
    split = clean.split("train")
    sizes = np.diff(split.offsets)
    assert train.count == 512
    assert train.lengths == (sizes.min(), np.median(sizes), sizes.mean(), sizes.max())
    assert train.labels[1] == np.mean(np.asarray(split.labels) == 1)


def test_a_contact_sheet_holds_every_picture(tmp_path: Path) -> None:
    pictures = [np.full((4, 4), shade, np.uint8) for shade in (10, 20, 30, 40, 50)]
    path = tmp_path / "sheet.png"
    terminal.contact_sheet(pictures, path, columns=3, scale_to=8)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 12, 3 * 12)
    assert {10, 20, 30, 40, 50} <= set(np.unique(sheet).tolist())
    assert [sheet[6, 6], sheet[6, 18], sheet[18, 6]] == [10, 20, 40]
