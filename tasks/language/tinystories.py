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
from lra.tasks._language import LONGER, PACKED, HubTask
from lra.tasks._source import TextHub
from lra.tasks.generated import longer

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
        "chunks": Protocol(
            "chunks",
            length=1024,
            vocabulary=256,
            counts={"validation": 500, "test": 1_000},
            budget={"validation": 500, "test": 1_000, "tokens": 32_000_000, "bytes": 40_000_000},
            note="bytes; an example is a chunk of one story, and nothing crosses its border; validation and test hold "
            "the first chunk of each story",
            raw=HUB.raw,
        ),
        "packed": Protocol(
            "packed",
            length=1024,
            vocabulary=256,
            budget={"validation": 500, "test": 500, "tokens": 32_000_000, "bytes": 40_000_000},
            tests=longer(*LONGER),
            packed=True,
            note=PACKED,
            raw=HUB.raw,
        ),
    }
