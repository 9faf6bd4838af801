"""A task of the next byte that needs no files: short sentences, packed or in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from lra.task import SPLITS, Progress, Protocol
from lra.tasks._language import ByteTask
from lra.tasks.generated import longer

TRAINED, LONGEST = 16, 64


class Sentences(ByteTask):
    name = "sentences"
    title = "short sentences"
    classes = 256
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "packed": Protocol("packed", length=TRAINED, vocabulary=256, tests=longer(32, LONGEST), packed=True),
        "chunks": Protocol("chunks", length=TRAINED, vocabulary=256),
    }

    def texts(self, protocol: Protocol, source: Path | None, progress: Progress) -> Mapping[str, Iterable[str]]:
        return {split: [f"{split} {number}. " * (1 + number % 4) for number in range(20)] for split in SPLITS}
