"""`lra show`, `lra run`, `lra sweep`: the settings of a run, one run, and a grid of runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lra.cli.common import (
    Architecture,
    DryRun,
    ProtocolName,
    RecipeName,
    Settings,
    Source,
    TaskName,
    console,
    errors,
    guarded,
    process_start,
    report_interruption,
    seconds_of,
    settings_of,
)
from lra.errors import Interrupted, UserError
from lra.registry import architectures

if TYPE_CHECKING:
    from lra.config.recipe import Recipe
    from lra.config.sections import Expected
    from lra.training.request import Request

Pretrain = Annotated[
    str, typer.Option("--pretrain", help="Pretrain on the inputs: mlm (masked tokens), causal (next token) or none.")
]
Match = Annotated[str, typer.Option("--match", help="Choose d_model for a budget: params=600k, flops=1G, memory=8G.")]


@guarded
def show(
    task: TaskName,
    architecture: Architecture,
    recipe: RecipeName = "auto",
    protocol: ProtocolName = "",
    settings: Settings = None,
    pretrain: Pretrain = "",
    match: Match = "",
) -> None:
    """Show every setting of a run with its origin, differences from a published source, and the expected accuracy."""
    from lra.config import recipe as recipes
    from lra.config.sections import SECTIONS
    from lra.training.request import SHAPE, Request, resolve

    request = Request(
        task, architecture, recipe, protocol=protocol, settings=settings_of(settings), pretrain=pretrain, match=match
    )
    resolved, origin = resolve(request)
    declaration = architectures.declaration(architecture)
    stated = recipes.provenance(request.recipe_name, task, architecture)
    file = recipes.path_of(request.recipe_name, architecture).name
    table = Table(title=f"{task} x {architecture}, recipe {resolved.name}", title_justify="left", pad_edge=False)
    for column in ("key", "value", "from"):
        table.add_column(column, overflow="fold")
    values = resolved.as_dict()
    sections = ["data", "model", "encoder", "optim", "train", *(["search"] if resolved.search.rates else [])]
    for section in [*sections, *(["pretrain"] if resolved.pretrain.objective != "none" else [])]:
        for key, value in _dotted(values[section]):
            name = f"{section}.{key}"
            source = origin.get(name, "built-in default" if section in SECTIONS else "")
            if name in stated.sources and source.startswith(file):
                source += f": {stated.sources[name]}"
            table.add_row(f"{section}.{key}", escape(json.dumps(value)), escape(source))
    for key, value in declaration.options.items():
        if key not in SHAPE and key not in resolved.encoder:
            source = "variant" if key in declaration.preset else "the architecture's default"
            table.add_row(f"encoder.{key}", escape(str(value)), source)
    console.print(table)
    if url := declaration.facts.get("url"):
        title, year = declaration.facts.get("title", ""), declaration.facts.get("year", "")
        console.print(escape(f"{title}, {year}: {url}"), soft_wrap=True)
    for line in stated.differences:
        console.print(f"differs from its source: {escape(line)}", soft_wrap=True)
    for line in _expectations(resolved.expected):
        console.print(line, soft_wrap=True)
    if resolved.note:
        console.print(f"[yellow]{escape(resolved.note)}[/]", soft_wrap=True)
    console.print(f"hash {resolved.hash}", soft_wrap=True)


def _expectations(expected: Expected) -> Iterator[str]:
    if expected.accuracy:
        yield f"expected accuracy [bold]{100 * expected.accuracy:.2f} %[/] ({escape(expected.source)})"
    if expected.high > expected.low:
        yield f"published in other sources: {100 * expected.low:.2f} to {100 * expected.high:.2f} %"
    elif expected.high:
        yield "no other published figure is known"
    if expected.epoch:
        yield f"expected: at least {100 * expected.by:.0f} % on validation after epoch {expected.epoch}"


@guarded
def run(
    task: TaskName,
    architecture: Architecture,
    recipe: RecipeName = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    protocol: ProtocolName = "",
    settings: Settings = None,
    source: Source = None,
    time_limit: Annotated[str, typer.Option(help="Write a checkpoint and stop after 90s, 8m, 2h, ...")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run with these arguments.")
    ] = False,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Keep checkpoints here instead of runs/.")] = None,
    pretrain: Pretrain = "",
    match: Match = "",
    devices: Annotated[int, typer.Option(help="GPUs (or CPU processes) of each node.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="auto, ddp, zero1, zero2, zero3 (or fsdp), tensor, sequence, pipeline, expert_parallel.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; by default OMP_NUM_THREADS, else one a core.")] = 0,
    logger: Annotated[list[str] | None, typer.Option(help="In addition to csv: tensorboard, wandb, mlflow.")] = None,
    init_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Start with the weights of a run or of an exported folder.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Imitate the model of a run (knowledge distillation).")
    ] = None,
    scorer: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Measure the difficulty of examples with it (train.curriculum).")
    ] = None,
    dry_run: DryRun = False,
    search: Annotated[str, typer.Option(hidden=True)] = "",
    select_only: Annotated[bool, typer.Option("--select-only", hidden=True)] = False,
) -> None:
    """Train a model, select a checkpoint on validation, test it once, write the result and show the task's table."""
    from lra.training.placement import Placement
    from lra.training.request import Request

    request = Request(
        task, architecture, recipe, seed, protocol, settings_of(settings), source, seconds_of(time_limit), resume,
        pretrain, match, Placement(devices, nodes, strategy), checkpoint_dir, tuple(logger or ()), _search(search),
        select_only, init_from, process_start(), threads, teacher, scorer,
    )  # fmt: skip
    with _stopping_on_signals(request):
        _run(request, dry_run)


@contextmanager
def _stopping_on_signals(request: Request) -> Iterator[None]:
    """Turn a signal into Interrupted. All processes end within seconds, and only the first one reports the reason."""
    from lra.training import interruption
    from lra.training.placement import launcher_rank

    leads, alone = launcher_rank() == 0, request.placement.world_size == 1

    def interrupted(message: str) -> Interrupted:
        return Interrupted(message, request.command(*(["--resume"] if interruption.is_resumable() else [])))

    with interruption.listening(alone, leads, lambda name: report_interruption(interrupted(f"stopped by {name}"))):
        try:
            yield
        except (interruption.Stopped, Interrupted) as stop:
            error = stop if isinstance(stop, Interrupted) else interrupted(f"stopped by {stop}")
            if alone:
                raise error from None
            if leads:
                report_interruption(error)
            # communication threads of a process that another one has left can keep Python from ending
            os._exit(interruption.EXIT_CODE if leads else 0)


def _run(request: Request, dry_run: bool) -> None:
    from lra.training.placement import launcher_rank
    from lra.training.request import check, read, resolve

    resolved, _ = read(request)
    check(request, resolved)
    if dry_run:
        show_plan(request, resolve(request)[0])
        return
    if launcher_rank() == 0:
        name = f"{request.task_name} x {request.architecture_name}, recipe {resolved.name}, seed {request.seed}"
        console.print(f"{name}: loading PyTorch", soft_wrap=True)
    if ":" in request.architecture_name:
        refuse_mistakes(request, resolved)
    from lra.training import distributed
    from lra.training.run import run as train

    path = train(request, console)
    if distributed.rank() == 0:
        console.print(f"validation only, in {path}", soft_wrap=True) if request.select_only else _show_result(path)


def show_plan(request: Request, recipe: Recipe) -> None:
    """Print the plan of a run: command, model, data, and the forecast of time and memory."""
    from lra.config.recipe import parse_setting
    from lra.data import prepared_sets
    from lra.registry import tasks
    from lra.sweeps.forecast import run_probe
    from lra.sweeps.plans import Cell
    from lra.sweeps.progress import duration
    from lra.training.request import folder_of

    def show(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    show(f"{request.command()}: recipe {recipe.hash[:8]}, in {folder_of(request, recipe)}")
    show(
        f"model: d_model {recipe.d_model}, {recipe.n_layers} layers; {recipe.train.steps:,} steps of "
        f"{recipe.data.batch_size} examples, {recipe.train.precision} precision"
    )
    if rates := recipe.search.rates:
        trial = recipe.trial(rates[0]).train.steps
        show(f"before that, {trial:,} steps at each learning rate of {', '.join(f'{rate:g}' for rate in rates)}")
    task, protocol = prepared_sets.resolve(tasks.get(request.task)(), recipe.data.protocol or None)
    prepared = prepared_sets.find_prepared(task, protocol)
    show(f"data: {task.name} ({protocol.name}), up to {protocol.length:,} tokens; {protocol.amounts}")
    if prepared is None:
        show(f"forecast: none before the data are prepared: {task.command(protocol)}")
        return
    show(f"data are in {prepared.folder}")
    settings = {key: parse_setting(text) for key, text in (request.settings or {}).items()}
    options = {"pretrain": request.pretrain, "match": request.match, "init-from": str(request.init_from or ""),
               "teacher": str(request.teacher or ""), "scorer": str(request.scorer or "")}  # fmt: skip
    cell = Cell(
        request.task_name, request.architecture_name, request.seed, request.recipe_name, settings,
        {key: value for key, value in options.items() if value}, request.protocol,
    )  # fmt: skip
    with console.status("measuring a few steps"):
        probe = run_probe(cell)
    if "failed" in probe:
        raise UserError(probe["failed"] if probe.get("refused") else f"no forecast: {probe['failed']}")
    more = "" if request.placement.world_size == 1 else " on one device"
    show(f"forecast{more}: {duration(probe['seconds'])}, at least {probe['bytes'] / 2**20:,.0f} MiB")


def refuse_mistakes(request: Request, recipe: Recipe) -> None:
    """Raise UserError for a common mistake in a user's own layer, which would not stop the training."""
    from lra.conformance import diagnosis
    from lra.conformance.context import CheckContext

    context = CheckContext(architectures.get(request.architecture), recipe.encoder)
    if cause := diagnosis.mistake(context):
        raise UserError(f"{request.architecture_name}: {cause}")


def _show_result(path: Path) -> None:
    """Print the table that contains a record, and the scores of the record."""
    from lra.reports import diagnostics, language, table
    from lra.reports import leaderboard as board
    from lra.reports.ranking import Leaderboard
    from lra.results import diagnosis, result
    from lra.results.collection import Collection
    from lra.results.record import AT_CHANCE

    record = result.read(path)
    place = result.place_of(record.recipe)
    collection = Collection.read(result.folder(), place)
    for line in collection.problems:
        errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    beside = [run for run in collection.records if run.task == record.task]
    if place == "diagnostics":
        shown = diagnostics.table(beside)
    elif place == "language":
        group = [run for run in beside if language.group_of(run) == language.group_of(record)]
        shown, *more = language.tables(group)
        for longer in more:
            console.print(table.terminal(longer), *map(escape, longer.notes), sep="\n")
    else:
        shown = board.table_with(Leaderboard.of(collection), record)
    console.print(table.terminal(shown), *map(escape, shown.notes), sep="\n")
    test, selection = record.test, record.validation
    console.print(
        f"test accuracy [bold]{100 * test.accuracy:.2f} %[/] of {test.n:,} "
        f"({selection.split} {100 * (selection.accuracy or 0):.2f} % at step {selection.best_step}), in {path}",
        soft_wrap=True,
    )
    if test.bits is not None:
        console.print(f"[bold]{test.bits:.3f}[/] bits per token, perplexity {test.perplexity:.2f}")
    if record.diagnostics:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in record.diagnostics.items())
        console.print(f"diagnostics of the last validation: {numbers}", soft_wrap=True, highlight=False)
    if place == "diagnostics":
        verdict = diagnosis.verdict(record)
        console.print(f"[bold]{verdict.word}[/]: {verdict.reason}", soft_wrap=True)
    elif record.at_chance:
        console.print(f"[yellow]this run is {AT_CHANCE}[/]")
    if (taught := record.distillation) is not None:
        console.print(
            f"its teacher {escape(taught['architecture'])} has {100 * taught['accuracy']:.2f} % with "
            f"{taught['parameters']:,} parameters, this run has {record.parameters:,}",
            soft_wrap=True,
        )
    if record.recipe.smoke:
        console.print(
            f"This was a smoke test. For a comparison: `lra run {record.task} {record.architecture} --recipe standard` "
            f"(`make {record.task} ARCH={record.architecture} RECIPE=standard`), about an hour of one core.",
            soft_wrap=True,
        )


@guarded
def sweep(
    file: Annotated[Path, typer.Argument(help="A grid of tasks, architectures, seeds and settings in TOML.")],
    ray: Annotated[str, typer.Option(help="Run on a Ray cluster: local or an address.")] = "",
    emit: Annotated[str, typer.Option(help="slurm: print an array script instead of running.")] = "",
    cell: Annotated[int | None, typer.Option(help="Run only the cell of this number, counted from 0.", min=0)] = None,
    forecast: Annotated[bool, typer.Option(help="Measure time and memory of each cell before starting.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show cells and forecast, but run nothing.")] = False,
    time_limit: Annotated[str, typer.Option(help="Stop after 90s, 8m, 2h, ...; the next call continues.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; set OMP_NUM_THREADS to share the cores.")] = 1,
) -> None:
    """Run a grid of runs (cells), one process each. Finished cells are skipped; failed ones are listed at the end."""
    from lra.sweeps import local, plans

    plan = plans.read(file)
    if emit:
        print(plans.job_script(plan, emit), end="")
        return
    if time_limit and ray:
        raise UserError("--time-limit is for sweeps on this machine; with --ray, put time-limit under [run]")
    console.print(f"{len(plan.cells)} cells; looking for their results", soft_wrap=True)
    seconds = seconds_of(time_limit)
    if seconds is not None:
        seconds -= time.monotonic() - process_start()
    failed = local.execute_plan(
        plan, console, ray=ray, only=cell, forecast=forecast and cell is None, dry_run=dry_run, seconds=seconds,
        jobs=jobs,
    )  # fmt: skip
    if failed:
        raise typer.Exit(1)


def _search(text: str) -> Any:
    """The description of a search, which the record of the winner stores. Raises UserError."""
    try:
        return json.loads(text or "null")
    except ValueError as error:
        raise UserError(f"--search is not JSON: {error}") from None


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
