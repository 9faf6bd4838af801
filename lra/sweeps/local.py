"""The cells of a sweep on this machine, one process after the other."""

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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from lra.errors import UserError
from lra.sweeps.plans import Cell, Plan
from lra.sweeps.progress import Board, watched

if TYPE_CHECKING:
    pass

_LIBC = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1


def finished(cell: Cell, root: Path) -> bool:
    """Whether a result with this cell's task, architecture, seed and recipe is on file."""
    # to resolve a cell takes the seconds that torch takes to load
    if not any((root / place).is_dir() for place in ("runs", "smoke")):
        return False
    from lra.registry import tasks
    from lra.results import result
    from lra.training.request import resolve

    recipe, _ = resolve(cell.request())
    place = (
        root / ("smoke" if recipe.smoke else "runs") / tasks.get(cell.task).cls.name / result.slug(cell.architecture)
    )
    pattern = f"*-{recipe.hash[:8]}-s{cell.seed}-*.json"
    return any(_recipe_of(path) == recipe.hash for path in place.glob(pattern))


def _recipe_of(path: Path) -> str:
    """The recipe hash of a result; a damaged one is of none, so that its cell is run again."""
    from lra.results import result

    try:
        return result.read(path).recipe_hash
    except UserError:
        return ""


def command(cell: Cell, *more: str) -> list[str]:
    return [sys.executable, "-m", "lra.cli", *cell.arguments(), *more]


def carry_out(
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
    """Run what is not finished, for at most about `seconds`, `jobs` cells at a time. Returns the cells that failed."""
    from lra import files
    from lra.results import result

    if plan.search:
        from lra.sweeps import search

        plan = search.settled(plan, console, lambda trials: _local(trials, console))
    deadline = None if seconds is None else time.monotonic() + seconds
    if only is not None and only >= len(plan.cells):
        raise UserError(f"--cell is {only}; this sweep has cells 0 to {len(plan.cells) - 1}")
    if only is not None:
        plan = Plan(plan.file, (plan.cells[only],), plan.retries)
    root = result.folder()
    files.check_writable(root)
    open_ = [number for number, cell in enumerate(plan.cells) if not finished(cell, root)]
    if forecast and open_:
        from lra.sweeps import forecast as probing

        console.print(probing.table([plan.cells[n] for n in open_], console))
    if dry_run:
        for number, cell in enumerate(plan.cells):
            state = "open" if number in open_ else "finished"
            console.print(escape(f"{number} {cell.name}: {state}"), soft_wrap=True)
        return []
    if ray:
        from lra.sweeps import cluster

        failed = cluster.run(plan, open_, ray, console)
    else:
        failed = _local(plan, console, open_, deadline, jobs)
    for number in failed:
        where = f"{plan.cells[number].name}: {plan.logs / f'{number}.log'}"
        console.print(f"[red]failed[/] {escape(where)}", soft_wrap=True)
    there = sum(finished(cell, root) for cell in plan.cells)
    console.print(f"{there} of {len(plan.cells)} cells have results")
    return [plan.cells[number] for number in failed]


def _local(
    plan: Plan, console: Console, open_: list[int] | None = None, deadline: float | None = None, jobs: int = 1
) -> list[int]:
    """Run the cells in order, `jobs` processes at a time. None is started after `deadline`, and the running ones stop
    then with a checkpoint. Returns the numbers of the cells that failed."""
    board = Board([cell.name for cell in plan.cells], console)
    numbers = range(len(plan.cells)) if open_ is None else open_
    for number in range(len(plan.cells)):
        if number not in numbers:
            board.set(number, "finished")
    waiting, lock = iter(numbers), threading.Lock()

    def work() -> list[int]:
        failed: list[int] = []
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                return failed
            cell = plan.cells[number]
            if deadline is not None:
                left = deadline - time.monotonic()
                if left < 1:
                    return failed
                cell = replace(cell, options={**cell.options, "time-limit": f"{left:.0f}s"})
            board.set(number, "running")
            code, message = attempt(cell, plan.logs / f"{number}.log", plan.retries)
            if code == 130 and deadline is not None and time.monotonic() > deadline - 1:
                board.set(number, "waiting", "continues next time")
                return failed
            board.set(number, "done" if code == 0 else "failed", message)
            if code == 130:
                raise KeyboardInterrupt
            if code:
                failed.append(number)

    with watched(board):
        if jobs == 1:
            return work()
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work) for _ in range(jobs)]
            return sorted(number for future in futures for number in future.result())


def together(*arguments: Any, **options: Any) -> Any:
    """subprocess.run of a process that ends with this one: a killed sweep leaves none behind to end a cell twice."""
    if sys.platform == "linux":
        options["preexec_fn"] = _end_with_parent
    return subprocess.run(*arguments, **options)


def _end_with_parent() -> None:
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def attempt(
    cell: Cell, log: Path, retries: int, environment: Mapping[str, str] | None = None, *more: str,
    start: Callable[..., Any] = together,
) -> tuple[int, str]:  # fmt: skip
    """Run one cell in a process of its own, going on from its checkpoint after a failure. Returns its exit code and,
    when that is not 0, its last line."""
    from lra.results import result

    log.parent.mkdir(parents=True, exist_ok=True)
    code, said = 0, ""
    for turn in range(retries + 1):
        # a run killed after its last act has done its work
        if not more and finished(cell, result.folder()):
            return 0, ""
        resume = ["--resume"] if begun(cell) else []
        with open(log, "a" if turn else "w") as out:
            code = start(
                command(cell, *more, *resume), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})}, check=False,
            ).returncode  # fmt: skip
        if code in (0, 130):
            break
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        said = lines[-1][:160] if lines else f"exit code {code}"
    return code, said


def begun(cell: Cell) -> bool:
    """Whether an earlier attempt left a checkpoint to go on from."""
    from lra.results import result

    elsewhere = cell.options.get("checkpoint-dir")
    if not elsewhere and not result.unfinished().is_dir():
        return False
    from lra.training.request import folder_of, resolve

    request = cell.request()
    folder = folder_of(request, resolve(request)[0])
    place = Path(elsewhere) / folder.name if elsewhere else folder / "checkpoints"
    return any((place / name).is_file() for name in ("last.ckpt", "pretraining/last.ckpt", "pretraining/done.ckpt"))
