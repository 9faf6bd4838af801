"""Progress bars for the terminal and contact sheets of example images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from lra import task


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[task.Progress]:
    """Yield a progress callback that draws one bar per phase, or prints one line per phase without a terminal."""
    if not console.is_terminal:
        printed: set[str] = set()

        def print_once(phase: str, done: int, total: int) -> None:
            if phase not in printed:
                printed.add(phase)
                console.print(f"{title}: {phase}")

        yield print_once
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        rows: dict[str, int] = {}

        def draw(phase: str, done: int, total: int) -> None:
            if phase not in rows:
                rows[phase] = int(progress.add_task(f"{title}: {phase}", total=total or None))
            progress.update(rows[phase], completed=done, total=total or None)  # type: ignore[arg-type]

        yield draw


def contact_sheet(images: list[np.ndarray], path: Path, columns: int = 8, scale_to: int = 160) -> None:
    """Write images of equal size, (H, W) or (H, W, 3) uint8, as one PNG with `columns` images per row.

    scale_to: height in pixels that small images are enlarged to, by whole factors.
    """
    from PIL import Image

    from lra.files import atomic

    factor = max(1, scale_to // images[0].shape[0])
    enlarged = [np.repeat(np.repeat(image, factor, axis=0), factor, axis=1) for image in images]
    framed = [np.pad(image, [(2, 2), (2, 2), (0, 0)][: image.ndim], constant_values=128) for image in enlarged]
    blank = np.zeros_like(framed[0])
    framed += [blank] * (-len(framed) % min(columns, len(framed)))
    width = min(columns, len(framed))
    rows = [np.concatenate(framed[i : i + width], axis=1) for i in range(0, len(framed), width)]
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")
