"""Pathfinder at 32 x 32 pixels: are the two discs on one contour? 1,024 pixels, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._pathfinder_task import PathfinderTask, protocols


class Pathfinder(PathfinderTask):
    name = "pathfinder"
    title = "Pathfinder"
    classes = 2
    size = 32
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(32, {})
