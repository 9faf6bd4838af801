"""A task small enough for tests: name the first of up to 24 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import SPLITS, Progress, Protocol, Split, Task
from lra.tasks.storage import open_split, write_documents, write_examples

COUNTS = {"train": 512, "validation": 100, "test": 150}


class Tiny(Task):
    name = "tiny"
    title = "first-token recall"
    classes = 4
    protocols: ClassVar = {"strict": Protocol("strict", length=24, vocabulary=4, counts=COUNTS)}

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        for number, split in enumerate(SPLITS):
            random = np.random.default_rng(number)
            lengths = random.integers(5, protocol.length + 1, protocol.counts[split])
            documents = [random.integers(0, 4, n).astype(np.uint8) for n in lengths]
            write_documents(folder, split, documents)
            write_examples(folder, split, np.array([d[0] for d in documents]))

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def describe(self, split: Split, example: int) -> str:
        return " ".join(map(str, split.document(int(split.index[example, 0]))))
