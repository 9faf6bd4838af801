"""Sweeps: a grid of tasks, architectures, seeds and settings, one process for each run.

    tasks = ["listops"]
    architectures = ["gru", "s4d"]
    seeds = [0, 1]
    recipe = "quick"
    retries = 1                              times a failed run is tried again

    [set]                                    settings of every run
    "train.steps" = 200
    [grid]                                   every combination of these
    "optim.lr" = [1e-3, 3e-3]
    [run]                                    other options of `lra run`, by their names
    "time-limit" = "2h"

With [search] the rates and the like are drawn instead (lra.search). A cell whose result is on file is finished.
Several grids, one after the other, are [[part]] tables of these keys; what stands above the first holds for all, and a
part with device = "gpu" or "cpu" is left out on other machines.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from lra.errors import UserError, brief, unknown
from lra.progress import Board, watched

if TYPE_CHECKING:
    from lra.run import Request

_LIBC = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1
KEYS = ("tasks", "architectures", "seeds", "recipe", "protocol", "retries", "set", "grid", "run", "search", "device")
DEVICES = {"": "", "gpu": "cuda", "cpu": "cpu"}
KINDS = {
    "set": dict, "grid": dict, "run": dict, "search": dict, "recipe": str, "protocol": str, "device": str,
}  # fmt: skip
MOST = 10_000
"""Cells of a sweep."""
RUN_OPTIONS = ("time-limit", "checkpoint-dir", "pretrain", "match", "devices", "nodes", "strategy", "logger", "from")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, as the arguments of `lra run`."""

    task: str
    architecture: str
    seed: int
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = ""

    @property
    def name(self) -> str:
        varied = "".join(f" {k}={v}" for k, v in self.settings.items())
        return f"{self.task} {self.architecture} s{self.seed}{varied}"

    def arguments(self) -> list[str]:
        found = ["run", self.task, self.architecture, "--recipe", self.recipe, "--seed", str(self.seed)]
        found += ["--protocol", self.protocol] if self.protocol else []
        for key, value in self.settings.items():
            found += ["--set", f"{key}={json.dumps(value)}"]
        for key, value in self.options.items():
            # a switch has no value
            found += [f"--{key}"] if value is None else [f"--{key}", str(value)]
        return found

    def request(self) -> Request:
        from lra.run import Request

        settings = {k: json.dumps(v) for k, v in self.settings.items()}
        pretrain, match = (str(self.options.get(key, "")) for key in ("pretrain", "match"))
        return Request(
            self.task,
            self.architecture,
            self.recipe,
            self.seed,
            self.protocol,
            settings,
            pretrain=pretrain,
            match=match,
        )


@dataclass(frozen=True)
class Plan:
    file: Path
    cells: tuple[Cell, ...]
    retries: int = 0
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        from lra import result

        return result.unfinished() / f"sweep-{self.file.stem}"


def read(path: Path) -> Plan:
    """The plan of a sweep file, every cell resolved. Raises UserError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no sweep file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    parts = content.pop("part", [{}])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: part is not a list of tables; write [[part]] above each grid")
    cells: list[Cell] = []
    for part in parts:
        cells += _cells({**content, **part}, path, MOST - len(cells))
    retries = content.get("retries", 0)
    if type(retries) is not int or retries < 0:
        raise UserError(f"{path}: retries is {retries!r}; a whole number from 0")
    from lra.run import resolved

    known = set()
    for cell in cells:
        run = (cell.task, cell.architecture, cell.seed, resolved(cell.request())[0].hash)
        if run in known:
            raise UserError(f"{path}: two cells are the same run: {cell.name}")
        known.add(run)
    return Plan(path, tuple(cells), retries, content.get("search", {}))


def _cells(content: Mapping[str, Any], path: Path, most: int) -> list[Cell]:
    """The cells of one grid, at most so many; none where it is meant for another device."""
    for key, value in content.items():
        if key not in KEYS:
            raise unknown("key", key, KEYS, where=str(path))
        if key in KINDS and not isinstance(value, KINDS[key]):
            raise UserError(f"{path}: {key} is {brief(value)}; a {'text' if KINDS[key] is str else 'table'}")
    for key, value in content.get("run", {}).items():
        if key not in RUN_OPTIONS:
            raise unknown("option", f"run.{key}", [f"run.{k}" for k in RUN_OPTIONS], where=str(path))
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{path}: run.{key} is {brief(value)}; a text or a number")
    lists = {key: content.get(key, [0] if key == "seeds" else []) for key in ("tasks", "architectures", "seeds")}
    for key, values in lists.items():
        kind = int if key == "seeds" else str
        if not isinstance(values, list) or not values or not all(type(v) is kind for v in values):
            raise UserError(f"{path}: {key} is {brief(values)}; a list of at least one {kind.__name__}")
    if not all(0 <= seed < 2**32 for seed in lists["seeds"]):
        raise UserError(f"{path}: seeds is {brief(lists['seeds'])}; numbers from 0 to {2**32 - 1}")
    grid = content.get("grid", {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{key} is {brief(values)}; a list of at least one value")
    if (device := content.get("device", "")) not in DEVICES:
        raise unknown("device", device, [name for name in DEVICES if name], where=str(path))
    from lra.run import device as here

    if device and DEVICES[device] != here().type:
        return []
    count = math.prod(len(values) for values in (*lists.values(), *grid.values()))
    if count > most:
        raise UserError(f"{path} asks for {count:,} runs; a sweep has at most {MOST:,}")
    from lra.recipe import plain

    settings = {part: plain(content.get(part, {}), f"{path}: {part}") for part in ("set", "grid")}
    recipe, protocol = content.get("recipe", "auto"), content.get("protocol", "")
    return [
        Cell(task, architecture, seed, recipe, settings["set"] | dict(chosen), content.get("run", {}), protocol)
        for task, architecture in itertools.product(lists["tasks"], lists["architectures"])
        for chosen in _combinations(settings["grid"])
        for seed in lists["seeds"]
    ]


def _combinations(grid: Mapping[str, list[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    yield from (tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def finished(cell: Cell, root: Path) -> bool:
    """Whether a result with this cell's task, architecture, seed and recipe is on file."""
    # to resolve a cell takes the seconds that torch takes to load
    if not (root / "runs").is_dir():
        return False
    from lra import result
    from lra.registry import tasks
    from lra.run import resolved

    found, _, _ = resolved(cell.request())
    place = root / "runs" / tasks.get(cell.task).cls.name / result.slug(cell.architecture)
    pattern = f"*-{found.hash[:8]}-s{cell.seed}-*.json"
    return any(_recipe_of(path) == found.hash for path in place.glob(pattern))


def _recipe_of(path: Path) -> str:
    """The recipe hash of a result; a damaged one is of none, so that its cell is run again."""
    from lra import result

    try:
        return str(result.read(path)["recipe_hash"])
    except UserError:
        return ""


def command(cell: Cell, *more: str) -> list[str]:
    return [sys.executable, "-m", "lra.cli", *cell.arguments(), *more]


def slurm(plan: Plan, kind: str) -> str:
    """A job array, one task for each cell; finished cells end at once."""
    if kind != "slurm":
        raise unknown("kind of script", kind, ("slurm",), where="--emit")
    return "\n".join([
        "#!/bin/bash",
        f"#SBATCH --job-name={shlex.quote('lra-' + plan.file.stem)}",
        f"#SBATCH --array=0-{len(plan.cells) - 1}",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@60",
        "# partition, time, memory and devices: as `sbatch` options",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"exec {shlex.quote(sys.executable)} -m lra.cli sweep {shlex.quote(str(plan.file.resolve()))} "
        "--cell $SLURM_ARRAY_TASK_ID",
        "",
    ])  # fmt: skip


def carry_out(
    plan: Plan,
    console: Console,
    *,
    ray: str = "",
    only: int | None = None,
    forecast: bool = True,
    dry_run: bool = False,
    seconds: float | None = None,
) -> list[Cell]:
    """Run what is not finished, for at most about `seconds`. Returns the cells that failed."""
    from lra import result

    if plan.search:
        from lra import search

        plan = search.settled(plan, console, lambda trials: _local(trials, console))
    deadline = None if seconds is None else time.monotonic() + seconds
    if only is not None and only >= len(plan.cells):
        raise UserError(f"--cell is {only}; this sweep has cells 0 to {len(plan.cells) - 1}")
    if only is not None:
        plan = Plan(plan.file, (plan.cells[only],), plan.retries)
    root = result.folder()
    result.check_writable(root / "runs")
    open_ = [number for number, cell in enumerate(plan.cells) if not finished(cell, root)]
    if forecast and open_:
        from lra import forecast as probing

        console.print(probing.table([plan.cells[n] for n in open_], console))
    if dry_run:
        for number, cell in enumerate(plan.cells):
            state = "open" if number in open_ else "finished"
            console.print(escape(f"{number} {cell.name}: {state}"), soft_wrap=True)
        return []
    if ray:
        from lra import cluster

        failed = cluster.run(plan, open_, ray, console)
    else:
        failed = _local(plan, console, open_, deadline)
    for number in failed:
        where = f"{plan.cells[number].name}: {plan.logs / f'{number}.log'}"
        console.print(f"[red]failed[/] {escape(where)}", soft_wrap=True)
    there = sum(finished(cell, root) for cell in plan.cells)
    console.print(f"{there} of {len(plan.cells)} cells have results")
    return [plan.cells[number] for number in failed]


def _local(plan: Plan, console: Console, open_: list[int] | None = None, deadline: float | None = None) -> list[int]:
    """One process after the other, none begun after `deadline`, and the one it finds running stopped with a checkpoint.
    Returns the numbers of those that failed."""
    board = Board([cell.name for cell in plan.cells], console)
    for number in range(len(plan.cells)):
        if open_ is not None and number not in open_:
            board.set(number, "finished")
    failed = []
    with watched(board):
        for number in range(len(plan.cells)) if open_ is None else open_:
            cell = plan.cells[number]
            if deadline is not None:
                left = deadline - time.monotonic()
                if left < 1:
                    break
                cell = replace(cell, options={**cell.options, "time-limit": f"{left:.0f}s"})
            board.set(number, "running")
            code, said = attempt(cell, plan.logs / f"{number}.log", plan.retries)
            if code == 130 and deadline is not None and time.monotonic() > deadline - 1:
                board.set(number, "waiting", "goes on next time")
                break
            board.set(number, "done" if code == 0 else "failed", said)
            if code == 130:
                raise KeyboardInterrupt
            if code:
                failed.append(number)
    return failed


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
    from lra import result

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
    from lra import result

    elsewhere = cell.options.get("checkpoint-dir")
    if not elsewhere and not result.unfinished().is_dir():
        return False
    from lra.run import folder_of, resolved

    request = cell.request()
    folder = folder_of(request, resolved(request)[0])
    place = Path(elsewhere) / folder.name if elsewhere else folder / "checkpoints"
    return any((place / name).is_file() for name in ("last.ckpt", "pretraining/last.ckpt", "pretraining/done.ckpt"))
