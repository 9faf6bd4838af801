"""Shared by the commands: consoles, argument types and error messages."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lra.errors import Interrupted, UserError
from lra.registry import architectures, tasks

# tables are designed for 100 columns
console, errors = Console(width=None if sys.stdout.isatty() else 100), Console(stderr=True)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn UserError into one line and exit code 2, and Interrupted into exit code 130."""
    try:
        yield
    except Interrupted as error:
        report_interruption(error)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        errors.print("interrupted; no incomplete file was kept")
        raise typer.Exit(130) from None
    except UserError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def report_interruption(error: Interrupted) -> None:
    """Print the reason why a run stopped, and the command that continues it."""
    verb = "resume with" if error.command.endswith(" --resume") else "run it again with"
    errors.print(f"[yellow]{escape(str(error))}[/]\n{verb}: {escape(error.command)}", soft_wrap=True)


def process_start() -> float:
    """The time of `time.monotonic` at which this process started; the time now if the system does not provide it."""
    now = time.monotonic()
    with suppress(OSError, AttributeError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return now - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return now


def announce_loading() -> None:
    """Print on a terminal that PyTorch is loading, which takes seconds. Called after the arguments are checked."""
    if errors.is_terminal:
        errors.print("loading PyTorch", style="dim")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: report the errors of a command as one line (see `one_line`)."""

    @wraps(command)
    def wrapper(*arguments: Any, **options: Any) -> None:
        with one_line():
            command(*arguments, **options)

    return wrapper


def settings_of(arguments: list[str] | None) -> dict[str, str]:
    """Parse the arguments of `--set KEY=VALUE`. Values stay text. Raises UserError."""
    settings = {}
    for text in arguments or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value, for example --set train.steps=500")
        settings[key.strip()] = value.strip()
    return settings


def seconds_of(text: str) -> float | None:
    """Parse the argument of `--time-limit`, such as 8m, to seconds; None if it is empty. Raises UserError."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match:
        raise UserError(f"--time-limit is {text!r}; expected a number and a unit, for example 90s, 8m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def complete_task(incomplete: str) -> list[str]:
    return [name for name in tasks.names() if name.startswith(incomplete)]


def complete_architecture(incomplete: str) -> list[str]:
    return [name for name in architectures.names(variants="/" in incomplete) if name.startswith(incomplete)]


TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="listops, text, ... (see `lra list`)", autocompletion=complete_task)
]
Architecture = Annotated[
    str,
    typer.Argument(
        metavar="ARCH", help="s4d, s4d/inv, my.module:Net or net.py:Net", autocompletion=complete_architecture
    ),
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="quick, standard, matched, paper, a .toml file, or auto (by task and device).")
]
Source = Annotated[Path | None, typer.Option("--from", help="Folder with the raw files; default: LRA_DATA.")]
ProtocolName = Annotated[str, typer.Option("--protocol", help="Protocol of the task; default: its first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan, but write nothing.")]
