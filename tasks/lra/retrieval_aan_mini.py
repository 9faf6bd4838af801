"""A substitute for Retrieval: 20,946 citation pairs of 1,665 papers of the ACL Anthology.

The question is the same as in `retrieval` (does one paper cite the other?), with about a tenth of the data and without
the LRA release. The pairs differ from those of LRA, so results are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from lra.task import Progress, Protocol
from lra.tasks._retrieval import Pairs, write_collection


class RetrievalAanMini(Pairs):
    name = "retrieval_aan_mini"
    title = "Retrieval (AAN mini)"
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol(
            "strict",
            length=4000,
            vocabulary=256,
            counts={"train": 16_756, "validation": 2_095, "test": 2_095},
            sha256={
                "train": "f9e7992ea4ef0857c03b7acf56955082c099a7b9ae1d47d1a453355b00681937",
                "validation": "f783069716c8b4808aa74f9060f6a1f94dfcda2f86f83de8521bf6d6e110e972",
                "test": "ecb70dac64a4a647d62b59653db9b053f8a9c8725e56d592d4b8c42b9fdd1b1b",
            },
            note="bytes, 4,000 per document; not comparable with published Retrieval",
            raw="aan_mini.docs.parquet and aan_mini.{train,eval,test}.pairs.tsv.gz",
        )
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        write_collection(folder, "aan_mini", protocol.length, source, self.command(protocol), progress)
