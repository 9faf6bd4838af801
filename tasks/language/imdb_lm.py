"""Language modelling of IMDb reviews, byte by byte (data: Maas et al. 2011).

Every review is its UTF-8 bytes after a byte 0, which marks the start and occurs in no review. Under `chunks` an example
is a chunk of one review: attention and state never cross the border of a review, nor that of a chunk. A longer review
has several chunks; each begins with the last byte of the chunk before, so that every byte is predicted once. Training
uses all chunks; validation and test use the first chunk of each review, so that their examples are independent, and an
interval over examples is one over reviews.

Validation is the 500 reviews with the lowest SHA-256 of the 25,000 official training reviews; test is the first 1,000,
in the same order, of the official test reviews that occur in no training review word for word. A review that occurs
twice is used once.

Under `packed` an example is a piece of all reviews one after the other. Test is the first 500 of its reviews, in pieces
of the length of training and, as further splits, in longer ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import ClassVar

from lra.task import Progress, Protocol
from lra.tasks import _imdb
from lra.tasks._language import LONGER, PACKED, ByteTask
from lra.tasks.generated import longer


class ImdbLm(ByteTask):
    name = "imdb_lm"
    title = "IMDb, next byte"
    classes = 256
    target = "next"
    causal = True
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "chunks": Protocol(
            "chunks",
            length=1024,
            vocabulary=256,
            counts={"train": 42_700, "validation": 500, "test": 1_000},
            sha256={
                "train": "a7695f634497aff2ed2d4fff50a22b50bc34ef668084739204f6eeefc8941cba",
                "validation": "da93bd33f4f86aabe468c3ce0621c16e47ebdf25f88ad918179c9e780a1ca7d9",
                "test": "299de85bf6614268d5577f4be8479f14261ab7cf41f13999cef6b12bac7fdba6",
            },
            note="bytes; an example is a chunk of one review, and nothing crosses its border; validation and test hold "
            "the first chunk of each review",
            raw=_imdb.RAW,
        ),
        "packed": Protocol(
            "packed",
            length=1024,
            vocabulary=256,
            counts={
                "train": 31_679,
                "validation": 642,
                "test": 681,
                "length-2048": 340,
                "length-4096": 170,
                "length-8192": 85,
            },
            sha256={
                "train": "968b88a806f19722dbb1be0a2ac264b3c8edcc6cca9aadeed104fc44e1a47bda",
                "validation": "e7bfae799a6e49b2da1d9ceaf0773ad66cd2c9e3abbc2b4874a514b654df0c35",
                "test": "0e6ad1dcee9406b2f9119be54940b8f773621d5a7a48d0798115d6b99b1f2ac9",
                "length-2048": "9b13af20feef67ad1c870e07135cf4b57001e66954189b31777040189c0b0125",
                "length-4096": "a1fbf756045ed056f8ee26e1fd206b48d9280e1dc5e046e2a2ef364aae45cb26",
                "length-8192": "30a9d7215cb4a0325613cf9e0cdd2f121cf26e9fe0566920d645847e94d5f5c2",
            },
            budget={"validation": 500, "test": 500},
            tests=longer(*LONGER),
            packed=True,
            note=PACKED,
            raw=_imdb.RAW,
        ),
    }

    def texts(self, protocol: Protocol, source: Path | None, progress: Progress) -> Mapping[str, Iterable[str]]:
        progress(f"reading {source or _imdb.HUB.id}", 0, 1)
        train, test = (
            dict.fromkeys(_imdb.read(split, source, self.command(protocol))[0]) for split in ("train", "test")
        )
        documents = {**protocol.counts, **protocol.budget}
        held_out, tested = documents["validation"], documents["test"]
        unseen = (text for text in test if text not in train)
        return {
            "train": list(train)[held_out:],
            "validation": list(train)[:held_out],
            "test": list(islice(unseen, tested)),
        }
