"""What people see while they wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
