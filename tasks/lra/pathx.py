"""Path-X: Pathfinder at 128 x 128 pixels: sequences of 16,384 pixels, row by row."""

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
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(
        128,
        {
            "strict": (
                "904963372d2cc340c8068e8e2d971c4f68ecf1ba9d1c733122b36dead09c3187",
                "149a9d85eed9050a7eecd5cd36e2344b80742ba1b502c2f5af652089f20f59e7",
                "15295dc94b7c2274fa111dc0fce3c6d12f8116faa1db7266894975fed62e07bb",
            ),
            "strict-small": (
                "fa8d6009ac6342420678b4ba973e095c42a3e08c2e1d86c995378e678a936dc4",
                "86d097d95ca12a217cf4bc218479428a4b19c2aaabce31b8be7c33c124a07142",
                "36a7888b9e465b7773dce71f50cd513d832f3b7560ac1d1a4708e55701f47462",
            ),
        },
    )
