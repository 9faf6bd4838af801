"""The command `lra`. Every failure a user can act on is one line and exit code 2."""

from __future__ import annotations

import json
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
from rich.table import Table

from lra.errors import UserError
from lra.registry import architectures, tasks

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="Prepare, verify and look at the data of a task.")
new = typer.Typer(no_args_is_help=True, help="Start something from a template.")
app.add_typer(data, name="data")
app.add_typer(new, name="new")
console, errors = Console(), Console(stderr=True)


@contextmanager
def _one_line() -> Iterator[None]:
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
        if "lra.train.Interrupted" in kinds:
            errors.print(f"[yellow]{escape(str(error))}[/]\nresume with: {_resume_command()}", soft_wrap=True)
            raise typer.Exit(130) from None
        raise


def _fail(error: Exception) -> None:
    errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
    raise typer.Exit(2) from None


def _resume_command() -> str:
    from lra.result import command_line

    line = command_line()
    return line if "--resume" in line else f"{line} --resume"


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def inner(*arguments: Any, **options: Any) -> None:
        with _one_line():
            command(*arguments, **options)

    return inner


TaskName = Annotated[str, typer.Argument(metavar="TASK", help="listops, text, ... (see `lra list`)")]
Architecture = Annotated[str, typer.Argument(metavar="ARCH", help="s4d, s4d/inv, my.module:Net or net.py:Net")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="quick, matched, paper, a .toml file, or auto.")]
Source = Annotated[Path | None, typer.Option("--from", help="Folder with the raw files (else LRA_DATA).")]
ProtocolName = Annotated[str, typer.Option("--protocol", help="Of the task; its first by default.")]


@app.command("list")
@_guarded
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
@_guarded
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
@_guarded
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
@_guarded
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


@app.command()
@_guarded
def check(architecture: Architecture) -> None:
    """Conformance checks of one architecture or of your own layer; exit code 1 when one fails."""
    architectures.get(architecture)
    from lra import testing

    findings = testing.check(architecture)
    console.print(testing.render(findings))
    if any(f.status in ("fail", "stale") for f in findings):
        raise typer.Exit(1)


@app.command()
@_guarded
def doctor(
    op: Annotated[str, typer.Argument(help="One operator; all by default.")] = "",
    fresh: Annotated[bool, typer.Option(help="Check again what is known already.")] = False,
) -> None:
    """Which implementations of each operator are here, and whether each is right on this machine."""
    from lra import doctor as kit
    from lra import parity
    from lra.errors import unknown
    from lra.run import device

    if op and op not in parity.operators():
        raise unknown("operator", op, parity.operators())
    table = Table(pad_edge=False)
    for column in ("operator", "implementation", "status", "error", "detail"):
        table.add_column(column, overflow="fold")
    with console.status("checking") as status:
        ops = [op] if op else parity.operators()
        found = kit.examine(ops, device(), fresh=fresh, seen=lambda name: status.update(f"checking {name}"))
    for d in found:
        colour = {"right": "green", "wrong": "red"}.get(d.status, "dim")
        error = "" if d.status == "absent" else f"{d.error:.1e}"
        table.add_row(d.op, d.implementation, f"[{colour}]{d.status}[/]", error, escape(d.detail))
    console.print(table)
    if any(d.status == "wrong" for d in found):
        raise typer.Exit(1)


@app.command()
@_guarded
def bench(
    op: Annotated[str, typer.Argument(help="One operator; all by default.")] = "",
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
) -> None:
    """Time of each operator beside what this machine could do; written to results/bench/ when all are measured."""
    from lra import bench as kit
    from lra import parity, result
    from lra.run import device

    here = device()
    with console.status("measuring the machine") as status:
        machine, measured = kit.bench(
            [op] if op else parity.operators(), here, budget=budget, seen=lambda name: status.update(f"timing {name}")
        )
        lines = list(measured)
    table = Table(
        title=f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s, {here.type}",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("operator", "case", "by", "pass", "ms", "GB/s", "GFLOP/s", "x floor"):
        table.add_column(column, justify="left" if column in ("operator", "case", "by", "pass") else "right")
    for x in lines:
        s = x.timing.median
        table.add_row(
            x.op, x.case, x.implementation, x.passes, f"{1e3 * s:.2f}", f"{x.bytes / s / 1e9:.1f}",
            f"{x.flops / s / 1e9:.1f}", f"{s / x.floor:.1f}",
        )  # fmt: skip
    console.print(table)
    if not op:
        console.print(f"wrote {kit.write(lines, here, result.folder())}", soft_wrap=True)


@data.command("list")
@_guarded
def data_list() -> None:
    """Every task and protocol, and whether it is prepared here."""
    from lra import store

    table = Table(pad_edge=False)
    for column in ("task", "protocol", "length", "input", "prepared", "note"):
        table.add_column(column, overflow="fold")
    for name in tasks.names():
        task = tasks.get(name)()
        for protocol in task.protocols.values():
            there = store.find(task, protocol)
            table.add_row(
                name, protocol.name, str(protocol.length), protocol.encoding, "yes" if there else "", protocol.note
            )
    console.print(table)


@data.command()
@_guarded
def prepare(
    task: TaskName,
    protocol: ProtocolName = "",
    source: Source = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes or threads; all CPUs by default.")] = None,
) -> None:
    """Prepare a task's data, or say that they are there."""
    from lra import store, terminal

    with terminal.bar(console, f"preparing {task}") as progress:
        found = store.prepared(task, protocol or None, source=source, workers=workers, progress=progress)
    for split, count in found.manifest["counts"].items():
        console.print(f"{split:<11} {count:>9,}  {found.manifest['sha256'][split]}", soft_wrap=True)
    console.print(f"in {found.folder}", soft_wrap=True)


@data.command()
@_guarded
def verify(task: TaskName, protocol: ProtocolName = "") -> None:
    """Re-read every prepared byte and compare with the checksums; exit code 2 when something is wrong."""
    from lra import store, terminal

    with terminal.bar(console, f"verifying {task}") as progress:
        problems = store.verify(task, protocol or None, progress=progress)
    if problems:
        for problem in problems:
            errors.print(f"[red]error:[/] {escape(problem)}", soft_wrap=True)
        raise typer.Exit(2)
    console.print(f"{task}: every byte is as its manifest and its protocol say")


@data.command("show")
@_guarded
def show_examples(
    task: TaskName,
    protocol: ProtocolName = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=64)] = 4,
    source: Source = None,
) -> None:
    """A few examples, for the eye."""
    from lra import store, terminal
    from lra.errors import unknown
    from lra.task import SPLITS

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    with terminal.bar(console, f"preparing {task}") as progress:
        found = store.prepared(task, protocol or None, source=source, progress=progress)
    opened = found.split(split)
    for example in range(min(count, len(opened))):
        console.print(escape(found.task.describe(opened, example)), soft_wrap=True)


@new.command("architecture")
@_guarded
def new_architecture(name: Annotated[str, typer.Argument(help="The registry name, also the file name.")]) -> None:
    """Copy the template of an architecture into the registry's folder."""
    from lra import template

    path = template.architecture(name)
    console.print(f"wrote {path}: fill in its docstring, card and equations, then `lra check {name}`", soft_wrap=True)


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
