"""What people see while they wait."""

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
    """A progress callback that draws one bar per phase, and prints a line per phase where there is no terminal."""
    if not console.is_terminal:
        seen: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                console.print(f"{title}: {what}")

        yield line
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
    """Draw images (H, W) or (H, W, 3) uint8, of one size, side by side to a PNG."""
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
