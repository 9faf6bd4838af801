"""Retrieval stand-in: 9,408 excerpts of RFCs and 181,004 pairs: does one mention the other?

As many pairs as `retrieval` has, for work without the LRA release. Another collection and another relation: no result
here compares with a published one, which is why it is a task of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from lra.task import Progress, Protocol
from lra.tasks._retrieval import Pairs, write_collection


class RetrievalRfc(Pairs):
    name = "retrieval_rfc"
    title = "Retrieval (RFC)"
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol(
            "strict",
            length=4000,
            vocabulary=256,
            counts={"train": 144_803, "validation": 18_100, "test": 18_101},
            note="bytes, 4,000 per document; not comparable with published Retrieval",
            raw="rfc.docs.parquet and rfc.{train,eval,test}.pairs.tsv.gz",
        )
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        write_collection(folder, "rfc", protocol.length, source, self.name, progress)
