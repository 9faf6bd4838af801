"""Pathfinder at 64 x 64 pixels: 4,096 of them, row by row."""

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
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(64, {})
