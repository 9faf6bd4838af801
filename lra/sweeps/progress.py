"""The progress display of a sweep: one row per run, its duration, and the remaining time."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

STATES = {"finished": "dim", "waiting": "", "running": "cyan", "done": "green", "failed": "red"}


class Board:
    """A table with one row per cell and an estimate of the remaining time.

    workers: number of cells that run at the same time. Without a terminal, one line is printed per change of state.
    """

    def __init__(self, names: list[str], console: Console, workers: int = 1) -> None:
        self.names, self.console, self.workers = names, console, workers
        self.state = dict.fromkeys(range(len(names)), "waiting")
        self.started: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        self.messages: dict[int, str] = {}

    def set(self, number: int, state: str, message: str = "") -> None:
        """Set the state of a cell, one of STATES."""
        now = time.monotonic()
        if state == "running":
            self.started[number] = now
        elif number in self.started:
            self.seconds[number] = now - self.started[number]
        self.state[number], self.messages[number] = state, message
        if not self.console.is_terminal and state != "waiting":
            line = escape(f"{self.names[number]}: {state} {message}".rstrip())
            self.console.print(line, soft_wrap=True, highlight=False)

    def remaining(self) -> float | None:
        """Estimated seconds to the end, from the mean duration of the cells that are done; None if there are none."""
        done = [self.seconds[n] for n, state in self.state.items() if state == "done"]
        if not done:
            return None
        unfinished = sum(state in ("waiting", "running") for state in self.state.values())
        return unfinished * sum(done) / len(done) / self.workers

    def __rich__(self) -> Table:
        remaining = self.remaining()
        table = Table(
            title="" if remaining is None else f"about {duration(remaining)} left", title_justify="left", pad_edge=False
        )
        for column in ("cell", "state", "time", ""):
            table.add_column(column, overflow="fold")
        for number, name in enumerate(self.names):
            state = self.state[number]
            seconds = self.seconds.get(number)
            if state == "running":
                seconds = time.monotonic() - self.started[number]
            label = f"[{STATES[state]}]{state}[/]" if STATES[state] else state
            elapsed = "" if seconds is None else duration(seconds)
            table.add_row(escape(name), label, elapsed, escape(self.messages.get(number, "")))
        return table


def duration(seconds: float) -> str:
    """A duration as text: `42 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def live_display(board: Board) -> Any:
    """A context manager that shows a board while it changes."""
    return Live(board, console=board.console, refresh_per_second=2, transient=not board.console.is_terminal,
                auto_refresh=board.console.is_terminal)  # fmt: skip
