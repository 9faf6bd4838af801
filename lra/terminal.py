"""Progress bars for the terminal, and sheets of example images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from lra import task


@contextmanager
def bar(console: Console, title: str) -> Iterator[task.Progress]:
    """A progress callback that draws a bar for each phase; where there is no terminal it prints a line for each."""
    if not console.is_terminal:
        printed: set[str] = set()

        def print_once(what: str, done: int, total: int) -> None:
            if what not in printed:
                printed.add(what)
                console.print(f"{title}: {what}")

        yield print_once
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        rows: dict[str, int] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = int(progress.add_task(f"{title}: {what}", total=total or None))
            progress.update(rows[what], completed=done, total=total or None)  # type: ignore[arg-type]

        yield draw


def contact_sheet(pictures: list[np.ndarray], path: Path, columns: int = 8, scale_to: int = 160) -> None:
    """Write a PNG that shows images of one size, (H, W) or (H, W, 3) uint8, side by side, `columns` to a row."""
    from PIL import Image

    from lra.files import atomic

    times = max(1, scale_to // pictures[0].shape[0])
    large = [np.repeat(np.repeat(p, times, axis=0), times, axis=1) for p in pictures]
    framed = [np.pad(p, [(2, 2), (2, 2), (0, 0)][: p.ndim], constant_values=128) for p in large]
    blank = np.zeros_like(framed[0])
    framed += [blank] * (-len(framed) % min(columns, len(framed)))
    width = min(columns, len(framed))
    rows = [np.concatenate(framed[i : i + width], axis=1) for i in range(0, len(framed), width)]
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")
