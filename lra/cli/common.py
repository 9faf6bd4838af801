"""What the commands share: consoles, argument types, and one clear line for every mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lra.errors import UserError

# where nobody looks at a terminal, tables get the width they are made for
console, errors = Console(width=None if sys.stdout.isatty() else 100), Console(stderr=True)


@contextmanager
def one_line() -> Iterator[None]:
    """A user's mistake becomes one line and exit code 2."""
    try:
        yield
    except UserError as error:
        _fail(error)
    except Exception as error:
        # the contracts import torch, which listing must not: their errors are known by name
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
        if "lra.task.DataError" in kinds:
            _fail(error)
        if "lra.training.module.Interrupted" in kinds:
            errors.print(f"[yellow]{escape(str(error))}[/]\nresume with: {_resume_command()}", soft_wrap=True)
            raise typer.Exit(130) from None
        raise


def _fail(error: Exception) -> None:
    errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
    raise typer.Exit(2) from None


def _resume_command() -> str:
    from lra.results.environment import command_line

    line = command_line()
    return line if "--resume" in line else f"{line} --resume"


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def inner(*arguments: Any, **options: Any) -> None:
        with one_line():
            command(*arguments, **options)

    return inner


TaskName = Annotated[str, typer.Argument(metavar="TASK", help="listops, text, ... (see `lra list`)")]
Architecture = Annotated[str, typer.Argument(metavar="ARCH", help="s4d, s4d/inv, my.module:Net or net.py:Net")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="quick, matched, paper, a .toml file, or auto.")]
Source = Annotated[Path | None, typer.Option("--from", help="Folder with the raw files (else LRA_DATA).")]
ProtocolName = Annotated[str, typer.Option("--protocol", help="Of the task; its first by default.")]
