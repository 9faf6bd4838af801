"""What people see of many runs: a row for each, how long it took, and the time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

STATES = {"finished": "dim", "waiting": "", "running": "cyan", "done": "green", "failed": "red"}


class Board:
    """The table people watch: a row for each cell, and the time left by what finished ones took."""

    def __init__(self, names: list[str], console: Console, workers: int = 1) -> None:
        self.names, self.console, self.workers = names, console, workers
        self.state = dict.fromkeys(range(len(names)), "waiting")
        self.since: dict[int, float] = {}
        self.took: dict[int, float] = {}
        self.said: dict[int, str] = {}

    def set(self, number: int, state: str, said: str = "") -> None:
        now = time.monotonic()
        if state == "running":
            self.since[number] = now
        elif number in self.since:
            self.took[number] = now - self.since[number]
        self.state[number], self.said[number] = state, said
        if not self.console.is_terminal and state != "waiting":
            line = escape(f"{self.names[number]}: {state} {said}".rstrip())
            self.console.print(line, soft_wrap=True, highlight=False)

    def left(self) -> float | None:
        """Seconds to the end, if the rest takes as long as what is done."""
        done = [self.took[n] for n, state in self.state.items() if state == "done"]
        if not done:
            return None
        open_ = sum(state in ("waiting", "running") for state in self.state.values())
        return open_ * sum(done) / len(done) / self.workers

    def __rich__(self) -> Table:
        left = self.left()
        table = Table(
            title="" if left is None else f"about {duration(left)} left", title_justify="left", pad_edge=False
        )
        for column in ("cell", "state", "time", ""):
            table.add_column(column, overflow="fold")
        for number, name in enumerate(self.names):
            state = self.state[number]
            seconds = self.took.get(number)
            if state == "running":
                seconds = time.monotonic() - self.since[number]
            shown = f"[{STATES[state]}]{state}[/]" if STATES[state] else state
            took = "" if seconds is None else duration(seconds)
            table.add_row(escape(name), shown, took, escape(self.said.get(number, "")))
        return table


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def watched(board: Board) -> Any:
    return Live(board, console=board.console, refresh_per_second=2, transient=not board.console.is_terminal,
                auto_refresh=board.console.is_terminal)  # fmt: skip
