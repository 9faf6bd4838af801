"""Pathfinder at 256 x 256 pixels: sequences of 65,536 pixels, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._pathfinder_task import PathfinderTask, protocols


class Path256(PathfinderTask):
    name = "path256"
    title = "Path-256"
    classes = 2
    size = 256
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(
        256,
        {
            "strict": (
                "0e7e48cc3c5b1908339ed3ef0fdc77ab3bb310bb8c63eac0fd2155d8a249302e",
                "c18e196a5aa23478ff3a797e92cdb08aa35cbf45b43db31ed90641d1548d584c",
                "a919bea2ea524dd42deab4431da1a7dab657beeddcf3f8907f3510dec971e54c",
            ),
            "strict-small": (
                "71bf9b6e6e68838a49018edc9d17e4c59be3cbc5e5cafda66b64796a6875d287",
                "895930798fa0c93ba8d451e7199cf77a0076095b73cc26a6751e0e76aa1892de",
                "db0576129f49a6c4cc987398536abffe67132797c372693e361dd92be863930d",
            ),
        },
    )
