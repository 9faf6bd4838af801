"""Run the cells of a sweep on this machine, each in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lra.errors import UserError
from lra.results import result
from lra.sweeps.plans import Cell, Plan
from lra.sweeps.progress import Board, live_display

_LIBC = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1


def is_finished(cell: Cell, root: Path) -> bool:
    """Whether the results folder `root` has a result with the task, architecture, seed and recipe of a cell, and the
    source that a user's architecture has now."""
    # resolving a cell imports torch, which takes seconds
    if not any((root / name).is_dir() for name in result.PLACES):
        return False
    from lra.registry import architectures, tasks
    from lra.source import digest
    from lra.training.request import resolve

    recipe, _ = resolve(cell.request())
    folder = root / result.place_of(recipe) / tasks.get(cell.task).cls.name / result.slug(cell.architecture)
    pattern = f"*-{recipe.hash[:8]}-s{cell.seed}-*.json"
    wanted = (recipe.hash, digest(architectures.source(cell.architecture)))
    return any(_identity(path) == wanted for path in folder.glob(pattern))


def _identity(path: Path) -> tuple[str, str]:
    """Recipe hash and source of a result; empty for a damaged one, so that its cell is run again."""
    try:
        record = result.read(path)
    except UserError:
        return "", ""
    return record.recipe_hash, record.source.sha256 if record.source else ""


def command(cell: Cell, *more: str) -> list[str]:
    """The command that runs a cell. more: further arguments."""
    return [sys.executable, "-m", "lra.cli", *cell.arguments(), *more]


def execute_plan(
    plan: Plan,
    console: Console,
    *,
    ray: str = "",
    only: int | None = None,
    forecast: bool = True,
    dry_run: bool = False,
    seconds: float | None = None,
    jobs: int = 1,
) -> list[Cell]:
    """Run the unfinished cells of a plan. Returns the cells that failed.

    ray: address of a Ray cluster; only: number of the one cell to run; forecast: print a forecast first; dry_run: print
    the state of each cell and run none; seconds: approximate time limit; jobs: cells at a time. Raises UserError.
    """
    from lra import files

    if plan.search:
        from lra.sweeps import search

        # a dry run shows the trials: the settings of the runs are not known before them
        if dry_run:
            plan = search.unfinished_trials(plan)
        else:
            plan = search.choose_settings(plan, console, lambda trials: _run_locally(trials, console))
    deadline = None if seconds is None else time.monotonic() + seconds
    if only is not None and only >= len(plan.cells):
        raise UserError(f"--cell is {only}; {plan.file} has cells 0 to {len(plan.cells) - 1}")
    if only is not None:
        plan = Plan(plan.file, (plan.cells[only],), plan.retries)
    root = result.folder()
    files.check_writable(root)
    unfinished = [number for number, cell in enumerate(plan.cells) if not is_finished(cell, root)]
    if forecast and unfinished:
        from lra.sweeps.forecast import forecast_table

        console.print(forecast_table([plan.cells[number] for number in unfinished], console))
    if dry_run:
        for number, cell in enumerate(plan.cells):
            state = "open" if number in unfinished else "finished"
            console.print(escape(f"{number} {cell.name}: {state}"), soft_wrap=True)
        return []
    if ray:
        from lra.sweeps import cluster

        failed = cluster.run(plan, unfinished, ray, console)
    else:
        failed = _run_locally(plan, console, unfinished, deadline, jobs)
    for number in failed:
        entry = f"{plan.cells[number].name}: {plan.logs / f'{number}.log'}"
        console.print(f"[red]failed[/] {escape(entry)}", soft_wrap=True)
    done = sum(is_finished(cell, root) for cell in plan.cells)
    console.print(f"{done} of {len(plan.cells)} cells have results")
    return [plan.cells[number] for number in failed]


def _run_locally(
    plan: Plan, console: Console, unfinished: list[int] | None = None, deadline: float | None = None, jobs: int = 1
) -> list[int]:
    """Run the unfinished cells (by default all) in order, `jobs` processes at a time. Returns the numbers of those that
    failed.

    At `deadline`, running cells are stopped with a checkpoint, and no other is started.
    """
    board = Board([cell.name for cell in plan.cells], console)
    numbers = range(len(plan.cells)) if unfinished is None else unfinished
    for number in range(len(plan.cells)):
        if number not in numbers:
            board.set(number, "finished")
    waiting, lock = iter(numbers), threading.Lock()

    def run_waiting_cells() -> list[int]:
        failed: list[int] = []
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                return failed
            cell = plan.cells[number]
            if deadline is not None:
                remaining = deadline - time.monotonic()
                if remaining < 1:
                    return failed
                cell = replace(cell, options={**cell.options, "time-limit": f"{remaining:.0f}s"})
            board.set(number, "running")
            code, message = run_cell(cell, plan.logs / f"{number}.log", plan.retries)
            if code == 130 and deadline is not None and time.monotonic() > deadline - 1:
                board.set(number, "waiting", "stopped at the time limit; the next call resumes it")
                return failed
            board.set(number, "done" if code == 0 else "failed", message)
            if code == 130:
                raise KeyboardInterrupt
            if code:
                failed.append(number)

    with live_display(board):
        if jobs == 1:
            return run_waiting_cells()
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(run_waiting_cells) for _ in range(jobs)]
            return sorted(number for future in futures for number in future.result())


def run_child(*arguments: Any, **options: Any) -> Any:
    """subprocess.run. On Linux the child is killed together with this process, so that a killed sweep leaves no run."""
    if sys.platform == "linux":
        options["preexec_fn"] = _end_with_parent
    return subprocess.run(*arguments, **options)


def _end_with_parent() -> None:
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def run_cell(
    cell: Cell, log: Path, retries: int, environment: Mapping[str, str] | None = None, *more: str,
    start: Callable[..., Any] = run_child,
) -> tuple[int, str]:  # fmt: skip
    """Run a cell in a separate process, and after a failure resume it up to `retries` times.

    log: file for its output; environment: additional variables; more: further arguments of `lra run`; start: a function
    like subprocess.run. Returns the exit code and, if it is not 0, the last line of the output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    code, message = 0, ""
    for turn in range(retries + 1):
        # the run may have been killed after writing its result
        if not more and is_finished(cell, result.folder()):
            return 0, ""
        resume = ["--resume"] if has_checkpoint(cell) else []
        with open(log, "a" if turn else "w") as out:
            code = start(
                command(cell, *more, *resume), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})}, check=False,
            ).returncode  # fmt: skip
        if code in (0, 130):
            break
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        message = lines[-1][:160] if lines else f"exit code {code}"
    return code, message


def has_checkpoint(cell: Cell) -> bool:
    """Whether an earlier run of a cell has a checkpoint to resume from."""
    elsewhere = cell.options.get("checkpoint-dir")
    if not elsewhere and not result.unfinished().is_dir():
        return False
    from lra.training.request import folder_of, resolve

    request = cell.request()
    folder = folder_of(request, resolve(request)[0])
    checkpoints = Path(elsewhere) / folder.name if elsewhere else folder / "checkpoints"
    return any(
        (checkpoints / name).is_file() for name in ("last.ckpt", "pretraining/last.ckpt", "pretraining/done.ckpt")
    )
