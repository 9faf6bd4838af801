"""Path-X: Pathfinder at 128 x 128 pixels, 16,384 of them, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._pathfinder_task import PathfinderTask, protocols


class PathX(PathfinderTask):
    name = "pathx"
    title = "Path-X"
    classes = 2
    size = 128
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(128, {})
