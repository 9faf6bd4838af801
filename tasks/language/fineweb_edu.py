"""Language modelling of FineWeb-Edu, byte by byte (data: Penedo et al. 2024, arXiv:2406.17557).

Web pages of educational value, from the hub's sample of 10 billion tokens. They are streamed from the hub, or read from
its Parquet files in a folder, and never held whole: validation is the first 500 different pages, test the 1,000 after
them, and training those that follow, up to the budget of the protocol.

Examples are those of `imdb_lm`: chunks of one page, of which validation and test use the first, or pieces of
all pages in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._language import HubTask, chunks, packed
from lra.tasks._source import TextHub

HUB = TextHub(
    "HuggingFaceFW/fineweb-edu",
    "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    "fineweb_edu",
    {"train": "sample/10BT/*.parquet"},
)


class FineWebEdu(HubTask):
    name = "fineweb_edu"
    title = "FineWeb-Edu, next byte"
    classes = 256
    target = "next"
    causal = True
    hub = HUB
    tested_on = "train"
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "chunks": chunks(HUB, 64_000_000, "page"),
        "packed": packed(HUB, 64_000_000),
    }
