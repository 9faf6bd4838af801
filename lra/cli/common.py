"""What the commands share: consoles, argument types, and one clear line for every mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lra.errors import Interrupted, UserError

# where the output is not a terminal, tables get the width they are designed for
console, errors = Console(width=None if sys.stdout.isatty() else 100), Console(stderr=True)


@contextmanager
def one_line() -> Iterator[None]:
    """Print a user's mistake as one line and exit with code 2; an interrupted run, with code 130."""
    try:
        yield
    except Interrupted as error:
        errors.print(f"[yellow]{escape(str(error))}[/]\nresume with: {escape(error.command)}", soft_wrap=True)
        raise typer.Exit(130) from None
    except UserError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose mistakes are one line."""

    @wraps(command)
    def inner(*arguments: Any, **options: Any) -> None:
        with one_line():
            command(*arguments, **options)

    return inner


def settings_of(given: list[str] | None) -> dict[str, str]:
    """The settings of `--set KEY=VALUE`, values as text. Raises UserError."""
    settings = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value, for example --set train.steps=500")
        settings[key.strip()] = value.strip()
    return settings


def seconds_of(text: str) -> float | None:
    """Seconds of `--time-limit 8m`; None for an empty text. Raises UserError."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match:
        raise UserError(f"--time-limit is {text!r}; expected a number and a unit, for example 90s, 8m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


TaskName = Annotated[str, typer.Argument(metavar="TASK", help="listops, text, ... (see `lra list`)")]
Architecture = Annotated[str, typer.Argument(metavar="ARCH", help="s4d, s4d/inv, my.module:Net or net.py:Net")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="quick, matched, paper, a .toml file, or auto.")]
Source = Annotated[Path | None, typer.Option("--from", help="Folder with the raw files (else LRA_DATA).")]
ProtocolName = Annotated[str, typer.Option("--protocol", help="Of the task; its first by default.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]
