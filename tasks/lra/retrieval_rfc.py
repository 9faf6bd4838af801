"""A substitute for Retrieval: 181,004 pairs of 9,408 excerpts of RFCs. Does one mention the other?

It has about as many pairs as `retrieval` and does not need the LRA release. Documents and relation differ from those of
LRA, so results are not comparable with published ones.
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
            sha256={
                "train": "d3f2993329161c1e2c46b1819b97d7676d9d4b04528a8d1a62aa701272eca4ce",
                "validation": "60ec23e9589647f6270e22eba3f8a0539cefebb4b13a79e34792cec9774e5fd2",
                "test": "64a50d7aa3f8fcd79aeb90fe58915c2c1d8aea4c89d48c6c68bbae5b1f155608",
            },
            note="bytes, 4,000 per document; not comparable with published Retrieval",
            raw="rfc.docs.parquet and rfc.{train,eval,test}.pairs.tsv.gz",
        )
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        write_collection(folder, "rfc", protocol.length, source, self.command(protocol), progress)
