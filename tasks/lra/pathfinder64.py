"""Pathfinder at 64 x 64 pixels: sequences of 4,096 pixels, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._pathfinder_task import PathfinderTask, protocols


class Pathfinder64(PathfinderTask):
    name = "pathfinder64"
    title = "Pathfinder-64"
    classes = 2
    size = 64
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(
        64,
        {
            "strict": (
                "b8dba876de3a79ce6641ecc708364a7d9fec1c4666cadf98b0616d15d3982016",
                "aa37fe9d1a61e6631597c5ddaabe2faafca9504e8e2ec0f7d7798ec2bdd9a745",
                "f4b429a1dc760a87491d854c41f75145724554e1ef5073f8b2fa0fcf58afabdc",
            ),
            "strict-small": (
                "e47b89aa758c582edfca45059cd9109ec6aa1c607d4942fda16a6d7d68ebbfa8",
                "be9ac80ad2bf1ed04c42047503e9f89efa39543fa8da8ec6169c64d01716db3d",
                "08712bb099b609fa30b92942119c451a49c5ad035da6a2cb67b7130ee2af3c39",
            ),
        },
    )
