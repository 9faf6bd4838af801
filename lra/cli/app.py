"""The command line of the Long Range Arena suite. Errors are one line, with exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from lra import __version__
from lra.cli.check import check
from lra.cli.claims import claims
from lra.cli.common import console, errors, guarded
from lra.cli.compress import prune, quantize
from lra.cli.data import audit, data
from lra.cli.diagnose import diagnose
from lra.cli.lists import list_
from lra.cli.models import evaluate, export, generate, import_, predict
from lra.cli.operators import bench, doctor
from lra.cli.profile import profile
from lra.cli.report import compare, leaderboard, report
from lra.cli.scaling import scaling
from lra.cli.train import run, show, sweep

UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """The group of all commands. Wrong usage is reported in one line, like every other mistake."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        standalone = options.get("standalone_mode", True)
        options["standalone_mode"] = False
        if not standalone:
            return super().main(*arguments, **options)
        try:
            sys.exit(super().main(*arguments, **options) or 0)
        except UsageError as error:
            message, context = " ".join(error.format_message().split()), getattr(error, "ctx", None)  # type: ignore[attr-defined]
            if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command
                print(message) if message.startswith("Usage") else None
            else:
                message = message.removesuffix(".").replace(". Did you mean", "; did you mean")
                more = "" if message.endswith("?") else f"; see `{getattr(context, 'command_path', 'lra')} --help`"
                errors.print(f"[red]error:[/] {escape(message[:1].lower() + message[1:] + more)}", soft_wrap=True)
            sys.exit(2)


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
new = typer.Typer(no_args_is_help=True, help="Create a file from a template.")
app.add_typer(data, name="data")
app.add_typer(new, name="new")


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("list")(list_)


@new.command("architecture")
@guarded
def new_architecture(
    name: Annotated[str, typer.Argument(help="Name of the architecture, which is also the file name.")],
    family: Annotated[str, typer.Option(help="Its folder: recurrent, state_space, linear_attention, attention, ...")],
) -> None:
    """Create an architecture from a template, in the folder of its family."""
    from lra.cli import template

    path = template.architecture(name, family)
    console.print(
        f"wrote {path}: fill in its docstring, card and equations, then run `lra check {name}`", soft_wrap=True
    )


@new.command("task")
@guarded
def new_task(
    name: Annotated[str, typer.Argument(help="Name of the task, which is also the file name.")],
    target: Annotated[str, typer.Option(help="class, position or value: what a model predicts.")] = "class",
) -> None:
    """Create a generated task from a template, in the working directory."""
    from lra.cli import template

    path = template.task(name, target)
    cls = f"{path}:{template.class_name(name)}"
    console.print(f"wrote {path}: change `draw`, then run `lra check {cls}` and `lra run {cls} gru`", soft_wrap=True)


for command in (
    run, show, sweep, predict, generate, evaluate, export, quantize, prune, check, diagnose, claims, leaderboard,
    compare, scaling, report, audit, profile, bench, doctor,
):  # fmt: skip
    app.command()(command)
app.command("import")(import_)


def main() -> None:
    app(prog_name="lra")
