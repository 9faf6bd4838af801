"""Language modelling of TinyStories, byte by byte (data: Eldan and Li 2023, arXiv:2305.07759).

Short stories that GPT-3.5 and GPT-4 wrote with the words of a small child. They are streamed from the hub, or read from
its Parquet files in a folder, and never held whole: validation is the first 500 different stories of the split `train`,
training the stories after them up to the budget of the protocol, test the first 1,000 of the split `validation` that
validation does not have. Training leaves out what they hold.

Examples are those of `imdb_lm`: chunks of one story, of which validation and test use the first, or pieces of
all stories in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._language import HubTask, chunks, packed
from lra.tasks._source import TextHub

HUB = TextHub(
    "roneneldan/TinyStories",
    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    "tinystories",
    {"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"},
)


class TinyStories(HubTask):
    name = "tinystories"
    title = "TinyStories, next byte"
    classes = 256
    target = "next"
    causal = True
    hub = HUB
    tested_on = "validation"
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "chunks": chunks(HUB, 40_000_000, "story"),
        "packed": packed(HUB, 40_000_000),
    }
