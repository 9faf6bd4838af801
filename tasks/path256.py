"""Pathfinder at 256 x 256 pixels: 65,536 of them, row by row."""

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
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(256, {})
