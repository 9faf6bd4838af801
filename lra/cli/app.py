"""The command line of the Long Range Arena suite. Errors are one line, with exit code 2."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lra import __version__
from lra.api import list_architectures
from lra.cli.check import check
from lra.cli.common import console, errors, guarded
from lra.cli.data import audit, data
from lra.cli.models import evaluate, export, import_, predict
from lra.cli.operators import bench, doctor
from lra.cli.profile import profile
from lra.cli.report import compare, leaderboard, report
from lra.cli.train import run, show, sweep
from lra.errors import UserError, unknown
from lra.registry import architectures, tasks

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
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


@app.command("list")
@guarded
def list_(
    pattern: Annotated[str, typer.Argument(help="Pattern of architecture names, such as '*former*'.")] = "*",
    family: Annotated[str, typer.Option(metavar="NAME", help="Only architectures of this family.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List architectures and, without pattern and family, tasks."""
    cards = [architectures.facts(name) for name in list_architectures(pattern)]
    families = sorted({architectures.family(name) for name in architectures.names()} - {""})
    if family and family not in families:
        raise unknown("family", family, families)
    cards = [card for card in cards if not family or card["family"] == family]
    if not cards:
        raise UserError(f"no architecture matches {pattern!r}; `lra list` shows all names")
    entries = [tasks.facts(name) for name in tasks.names()] if pattern == "*" and not family else []
    if as_json:
        print(json.dumps({"architectures": cards, "tasks": entries}, indent=1, sort_keys=True))
        return
    table = Table(title="architectures", title_justify="left", pad_edge=False)
    for column in ("name", "variants", "family", "work", "year"):
        table.add_column(column, overflow="fold")
    table.add_column("paper", no_wrap=True, max_width=len("arXiv:0000.00000"))
    for facts in cards:
        cells = [", ".join(facts["variants"]), *(str(facts.get(k, "")) for k in ("family", "scaling", "year"))]
        url = str(facts.get("url", ""))
        short_url = url.replace("https://arxiv.org/abs/", "arXiv:").replace("https://doi.org/", "doi:")
        table.add_row(facts["name"], *cells, Text(short_url, style=f"link {url}" if url else ""))
    console.print(table)
    console.print("full URLs: lra list --json, lra show TASK ARCHITECTURE")
    if not entries:
        return
    table = Table(title="tasks", title_justify="left", pad_edge=False)
    for column in ("name", "title"):
        table.add_column(column)
    for facts in entries:
        table.add_row(facts["name"], str(facts.get("title", "")))
    console.print(table)


@new.command("architecture")
@guarded
def new_architecture(
    name: Annotated[str, typer.Argument(help="Registry name, which is also the file name.")],
    family: Annotated[str, typer.Option(help="Folder: recurrent, state_space, linear_attention, attention, ...")],
) -> None:
    """Create an architecture from a template, in the folder of its family."""
    from lra.cli import template

    path = template.architecture(name, family)
    console.print(f"wrote {path}: fill in its docstring, card and equations, then `lra check {name}`", soft_wrap=True)


for command in (
    run, show, sweep, predict, evaluate, export, check, leaderboard, compare, report, audit, profile, bench, doctor,
):  # fmt: skip
    app.command()(command)
app.command("import")(import_)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        errors.print("interrupted; no incomplete file was kept")
        sys.exit(130)
