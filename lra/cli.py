"""The command `lra`. Every failure a user can act on is one line and exit code 2."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli_common import Architecture, ProtocolName, RecipeName, Settings, Source, TaskName, console, errors, guarded
from lra.cli_data import audit, data
from lra.cli_measure import bench, doctor, profile
from lra.errors import UserError
from lra.registry import architectures, tasks

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
new = typer.Typer(no_args_is_help=True, help="Start something from a template.")
app.add_typer(data, name="data")
app.add_typer(new, name="new")


@app.command("list")
@guarded
def list_(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Architectures and tasks that are registered."""
    found = [architectures.facts(name) for name in architectures.names()]
    jobs = [tasks.facts(name) for name in tasks.names()]
    if as_json:
        print(json.dumps({"architectures": found, "tasks": jobs}, indent=1, sort_keys=True))
        return
    table = Table(title="architectures", title_justify="left", pad_edge=False)
    for column in ("name", "variants", "family", "work", "year", "paper"):
        table.add_column(column, overflow="fold")
    for facts in found:
        shown = [", ".join(facts["variants"]), *(str(facts.get(k, "")) for k in ("family", "scaling", "year", "url"))]
        table.add_row(facts["name"], *shown)
    console.print(table)
    table = Table(title="tasks", title_justify="left", pad_edge=False)
    for column in ("name", "what"):
        table.add_column(column)
    for facts in jobs:
        table.add_row(facts["name"], str(facts.get("title", "")))
    console.print(table)


@app.command()
@guarded
def show(
    task: TaskName,
    architecture: Architecture,
    recipe: RecipeName = "auto",
    protocol: ProtocolName = "",
    settings: Settings = None,
) -> None:
    """The resolved recipe of a cell, and where each value comes from."""
    from lra.run import Request, resolved

    found, origin, constructor = resolved(
        Request(task, architecture, recipe, protocol=protocol, settings=_settings(settings))
    )
    table = Table(title=f"{task} x {architecture}, recipe {found.name}", title_justify="left", pad_edge=False)
    for column in ("key", "value", "from"):
        table.add_column(column)
    values = found.as_dict()
    for section in ("data", "model", "encoder", "optim", "train"):
        for key, value in _dotted(values[section]):
            table.add_row(f"{section}.{key}", escape(json.dumps(value)), origin.get(f"{section}.{key}", ""))
    for key, value in constructor.options().items():
        if key not in ("d_model", "n_layers", "length", "dropout", "direction") and key not in found.encoder:
            origin_of = "variant" if key in constructor.preset else "the architecture's default"
            table.add_row(f"encoder.{key}", escape(str(value)), origin_of)
    console.print(table)
    console.print(f"hash {found.hash}", soft_wrap=True)


@app.command()
@guarded
def run(
    task: TaskName,
    architecture: Architecture,
    recipe: RecipeName = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    protocol: ProtocolName = "",
    settings: Settings = None,
    source: Source = None,
    time_limit: Annotated[str, typer.Option(help="Stop cleanly before: 90s, 8m, 2h.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run of this cell.")] = False,
) -> None:
    """Train, select on validation, test once, write the result, show the task's table."""
    architectures.get(architecture), tasks.get(task)
    from lra import leaderboard, result
    from lra.run import Request
    from lra.run import run as train

    limit = _seconds(time_limit) if time_limit else None
    request = Request(task, architecture, recipe, seed, protocol, _settings(settings), source, limit, resume)
    path = train(request, console)
    record = result.read(path)
    records, problems = leaderboard.load(result.folder())
    for line in problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    for part in leaderboard.terminal([r for r in records if leaderboard.group_of(r) == leaderboard.group_of(record)]):
        console.print(part)
    test, where = record["test"], record["validation"]
    console.print(
        f"test accuracy [bold]{100 * test['accuracy']:.2f} %[/] of {test['n']:,} "
        f"({where['split']} {100 * where['accuracy']:.2f} % at step {where['best_step']}), in {path}",
        soft_wrap=True,
    )
    if record["collapsed"]:
        console.print(f"[yellow]this run is {record['collapsed']}[/]")


@app.command()
@guarded
def leaderboard(
    formats: Annotated[str, typer.Option("--format", help="Comma-separated: md,csv.")] = "md,csv",
    task: Annotated[str, typer.Option(help="Show one task only.")] = "",
) -> None:
    """Print the table of all results and write it beside them."""
    from lra import leaderboard as board
    from lra import result

    records, problems = board.load(result.folder())
    for line in problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    for part in board.terminal(records, task):
        console.print(part)
    if not records:
        console.print(f"no results in {result.folder() / 'runs'} yet: `make listops` makes one")
        return
    for path in board.write(result.folder(), records, [f for f in formats.split(",") if f]):
        console.print(f"wrote {path}", soft_wrap=True)
    readme = result.folder().parent / "README.md"
    if board.update_readme(readme, records):
        console.print(f"updated the table in {readme}", soft_wrap=True)


@app.command()
@guarded
def check(architecture: Architecture) -> None:
    """Conformance checks of one architecture or of your own layer; exit code 1 when one fails."""
    architectures.get(architecture)
    from lra import testing

    findings = testing.check(architecture)
    console.print(testing.render(findings))
    if any(f.status in ("fail", "stale") for f in findings):
        raise typer.Exit(1)


@new.command("architecture")
@guarded
def new_architecture(name: Annotated[str, typer.Argument(help="The registry name, also the file name.")]) -> None:
    """Copy the template of an architecture into the registry's folder."""
    from lra import template

    path = template.architecture(name)
    console.print(f"wrote {path}: fill in its docstring, card and equations, then `lra check {name}`", soft_wrap=True)


for command in (audit, profile, bench, doctor):
    app.command()(command)


def _settings(given: list[str] | None) -> dict[str, str]:
    found = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value, for example --set train.steps=500")
        found[key.strip()] = value.strip()
    return found


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match:
        raise UserError(f"--time-limit is {text!r}; expected a number and a unit, for example 90s, 8m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        errors.print("interrupted; nothing half-written is left behind")
        sys.exit(130)


if __name__ == "__main__":
    main()
