"""Sweep files: grids of tasks, architectures, seeds and settings; each cell is one run.

    tasks = ["listops"]
    architectures = ["gru", "s4*"]           names, or patterns of registered names; one with a slash: of variants
    seeds = [0, 1]
    recipe = "quick"
    retries = 1                              how often a failed run is repeated

    [set]                                    recipe settings of every run
    "train.steps" = 200
    [grid]                                   settings of which every combination is run
    "optim.lr" = [1e-3, 3e-3]
    [run]                                    other options of `lra run`, by name
    "time-limit" = "2h"

    flops = [1e12, 4e12]                     budgets of training FLOPs, of which each is run (above the tables)

A budget determines train.steps: the work of a step, forward and backward at the full length of the protocol, follows
from the formula of the architecture. train.evaluate_every and optim.warmup change in proportion to the recipe's steps.

[search] samples settings instead of enumerating them (lra.sweeps.search). A cell that has a result is finished and not
run again. A file may hold several grids as [[part]] tables with these keys; keys above the first part apply to all
parts, and a cell of an earlier part is not repeated. A part with device = "gpu" or "cpu" is skipped on other machines.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.errors import UserError, brief, unknown

if TYPE_CHECKING:
    from lra.training.request import Request
KEYS = (
    "tasks", "architectures", "seeds", "recipe", "protocol", "retries", "flops", "set", "grid", "run", "search",
    "device",
)  # fmt: skip
DEVICES = {"": "", "gpu": "cuda", "cpu": "cpu"}
TYPES = {
    "set": dict, "grid": dict, "run": dict, "search": dict, "recipe": str, "protocol": str, "device": str,
}  # fmt: skip
MAX_CELLS = 10_000
RUN_OPTIONS = (
    "time-limit",
    "checkpoint-dir",
    "pretrain",
    "match",
    "devices",
    "nodes",
    "strategy",
    "threads",
    "logger",
    "from",
    "teacher",
    "scorer",
)


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
        settings = "".join(f" {k}={v}" for k, v in self.settings.items())
        protocol = f":{self.protocol}" if self.protocol else ""
        return f"{self.task}{protocol} {self.architecture} s{self.seed}{settings}"

    def arguments(self) -> list[str]:
        """The command-line arguments of `lra`."""
        arguments = ["run", self.task, self.architecture, "--recipe", self.recipe, "--seed", str(self.seed)]
        arguments += ["--protocol", self.protocol] if self.protocol else []
        for key, value in self.settings.items():
            arguments += ["--set", f"{key}={json.dumps(value)}"]
        for key, value in self.options.items():
            # a switch has no value
            arguments += [f"--{key}"] if value is None else [f"--{key}", str(value)]
        return arguments

    def request(self) -> Request:
        """The cell as a request, which resolves to a recipe."""
        from lra.training.request import Request

        settings = {k: json.dumps(v) for k, v in self.settings.items()}
        pretrain, match = (str(self.options.get(key, "")) for key in ("pretrain", "match"))
        initial, teacher, scorer = (
            Path(str(run)) if (run := self.options.get(key)) else None for key in ("init-from", "teacher", "scorer")
        )
        return Request(
            self.task,
            self.architecture,
            self.recipe,
            self.seed,
            self.protocol,
            settings,
            pretrain=pretrain,
            match=match,
            init_from=initial,
            teacher=teacher,
            scorer=scorer,
        )


@dataclass(frozen=True)
class Plan:
    """A sweep file with its cells. retries: per failed run; search: the [search] table."""

    file: Path
    cells: tuple[Cell, ...]
    retries: int = 0
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """The folder for the output of the runs."""
        from lra.results import result

        return result.unfinished() / f"sweep-{self.file.stem}"


def read(path: Path) -> Plan:
    """Read a sweep file and check every cell. Raises UserError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the sweep file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    parts = content.pop("part", [{}])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: part is not a list of tables; write [[part]] above each grid")
    planned: list[list[Cell]] = []
    for part in parts:
        planned.append(_cells({**content, **part}, path, MAX_CELLS - sum(map(len, planned))))
    retries = content.get("retries", 0)
    if type(retries) is not int or retries < 0:
        raise UserError(f"{path}: retries is {retries!r}; an integer from 0")
    from lra.training.request import resolve

    runs: dict[tuple[str, ...], Cell] = {}
    for cells in planned:
        part_runs = set()
        for cell in cells:
            run = (cell.task, cell.architecture, str(cell.seed), resolve(cell.request())[0].hash)
            if run in part_runs:
                raise UserError(f"{path}: two cells are the same run: {cell.name}")
            part_runs.add(run)
            runs.setdefault(run, cell)
    return Plan(path, tuple(runs.values()), retries, content.get("search", {}))


def _cells(content: Mapping[str, Any], path: Path, limit: int) -> list[Cell]:
    """The cells of one grid, at most `limit`; none if the grid is for another device. Raises UserError."""
    for key, value in content.items():
        if key not in KEYS:
            raise unknown("key", key, KEYS, where=str(path))
        if key in TYPES and not isinstance(value, TYPES[key]):
            raise UserError(f"{path}: {key} is {brief(value)}; a {'string' if TYPES[key] is str else 'table'}")
    for key, value in content.get("run", {}).items():
        if key not in RUN_OPTIONS:
            raise unknown("option", f"run.{key}", [f"run.{k}" for k in RUN_OPTIONS], where=str(path))
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{path}: run.{key} is {brief(value)}; a string or a number")
    lists = {key: content.get(key, [0] if key == "seeds" else []) for key in ("tasks", "architectures", "seeds")}
    for key, values in lists.items():
        kind = int if key == "seeds" else str
        if not isinstance(values, list) or not values or not all(type(v) is kind for v in values):
            raise UserError(f"{path}: {key} is {brief(values)}; a list of at least one {kind.__name__}")
    if not all(0 <= seed < 2**32 for seed in lists["seeds"]):
        raise UserError(f"{path}: seeds is {brief(lists['seeds'])}; numbers from 0 to {2**32 - 1}")
    lists["architectures"] = [name for entry in lists["architectures"] for name in _matching(entry, path)]
    grid = content.get("grid", {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{key} is {brief(values)}; a list of at least one value")
    if (device := content.get("device", "")) not in DEVICES:
        raise unknown("device", device, [name for name in DEVICES if name], where=str(path))
    from lra.training import device as devices

    if device and DEVICES[device] != devices.device_type():
        return []
    budgets = content.get("flops", [])
    if not isinstance(budgets, list) or not all(type(f) in (int, float) and 0 < f < math.inf for f in budgets):
        raise UserError(f"{path}: flops is {brief(budgets)}; a list of numbers above 0")
    own = {"train.steps", "train.evaluate_every", "optim.warmup"} & {*content.get("set", {}), *grid}
    if budgets and (own or content.get("search")):
        raise UserError(f"{path}: flops sets the steps of each run; leave out {', '.join(sorted(own)) or '[search]'}")
    count = math.prod(len(values) for values in (*lists.values(), *grid.values(), budgets or [0]))
    if count > limit:
        raise UserError(f"{path} has {count:,} runs; a sweep has at most {MAX_CELLS:,}")
    from lra.config.recipe import check_json

    settings = {part: check_json(content.get(part, {}), f"{path}: {part}") for part in ("set", "grid")}
    recipe, protocol = content.get("recipe", "auto"), content.get("protocol", "")
    cells = [
        Cell(task, architecture, 0, recipe, settings["set"] | dict(combination), content.get("run", {}), protocol)
        for task, architecture in itertools.product(lists["tasks"], lists["architectures"])
        for combination in _combinations(settings["grid"])
    ]
    if budgets:
        cells = [paid for cell in cells for paid in _within(cell, budgets)]
    return [replace(cell, seed=seed) for cell in cells for seed in lists["seeds"]]


def _within(cell: Cell, budgets: list[float]) -> Iterator[Cell]:
    """The cell with the number of steps for each budget of training FLOPs. Raises UserError for a budget below one."""
    from lra.config.match import build_on_meta, flops_of_example
    from lra.data import prepared_sets
    from lra.registry import architectures, tasks
    from lra.training.construction import build
    from lra.training.request import resolve

    recipe, _ = resolve(cell.request())
    task, protocol = prepared_sets.resolve(tasks.get(cell.task)(), recipe.data.protocol or None)
    model = build_on_meta(lambda: build(recipe, architectures.get(cell.architecture), task, protocol, 0))
    try:
        of_step = recipe.data.batch_size * flops_of_example(model, recipe, protocol)
    except NotImplementedError:
        raise UserError(f"flops: {cell.architecture} declares no cost; set train.steps for it") from None
    train = recipe.train
    validations = max(1, round(train.steps / min(train.evaluate_every, train.steps)))
    for budget in budgets:
        # whole intervals, so that the last step is validated
        every = round(budget / of_step / validations)
        if not every:
            raise UserError(
                f"flops: {budget:.3g} allows {budget / of_step:.2g} steps of {cell.architecture} on {cell.task}, "
                f"which has {validations} validations; at least {validations * of_step:.3g}"
            )
        steps = every * validations
        warmup = math.ceil(recipe.optim.warmup * steps / train.steps)
        paid = {"train.steps": steps, "train.evaluate_every": every, "optim.warmup": warmup}
        yield replace(cell, settings={**cell.settings, **paid})


def _matching(entry: str, path: Path) -> list[str]:
    """An architecture, or the registered ones that match a pattern. Raises UserError."""
    if "*" not in entry:
        return [entry]
    from lra.registry import architectures

    if names := fnmatch.filter(architectures.names(variants="/" in entry), entry):
        return names
    raise UserError(f"{path}: no architecture matches {entry!r}; see `lra list`")


def _combinations(grid: Mapping[str, list[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of the values of a grid, as (key, value) pairs."""
    yield from (tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def job_script(plan: Plan, scheduler: str) -> str:
    """A job script for a scheduler: a Slurm job array with one task per cell. Finished cells exit immediately."""
    if scheduler != "slurm":
        raise unknown("scheduler", scheduler, ("slurm",), where="--emit")
    return "\n".join([
        "#!/bin/bash",
        f"#SBATCH --job-name={shlex.quote('lra-' + plan.file.stem)}",
        f"#SBATCH --array=0-{len(plan.cells) - 1}",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@60",
        "# pass partition, time, memory and devices as options of `sbatch`",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"exec {shlex.quote(sys.executable)} -m lra.cli sweep {shlex.quote(str(plan.file.resolve()))} "
        "--cell $SLURM_ARRAY_TASK_ID",
        "",
    ])  # fmt: skip
