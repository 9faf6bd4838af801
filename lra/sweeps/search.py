"""Hyper-parameter search: quasi-random settings, chosen on validation, with the trials counted in the result.

In a sweep file, beside tasks, architectures and seeds:

    [search]
    trials = 16
    seed = 0
    "optim.lr" = { low = 1e-4, high = 1e-2, log = true }
    "model.dropout" = { low = 0.0, high = 0.3 }
    "encoder.state_size" = { choose = [16, 64] }

Each trial trains once, with the first seed, and ends before the test set is opened. The best on validation is then run
with every seed; its results say how many trials it was chosen from, and which it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from scipy.stats import qmc

from lra.config.recipe import check_json
from lra.errors import UserError, brief, unknown
from lra.sweeps.plans import MOST, Cell, Plan

# significant digits a drawn number keeps, so that a recipe stays readable
DIGITS = 4


def drawn(space: Mapping[str, Any], trials: int, seed: int) -> list[dict[str, Any]]:
    """`trials` points of a scrambled Sobol sequence in the space. Raises UserError."""
    if not space:
        raise UserError('search: name at least one key to search, for example "optim.lr" = { low = 1e-4, high = 1e-2 }')
    # the sequence is balanced over powers of two only; the points beyond `trials` are left out
    points = qmc.Sobol(len(space), seed=seed).random_base2(max(math.ceil(math.log2(trials)), 0))[:trials]
    return [{key: _placed(key, place, x) for (key, place), x in zip(space.items(), row, strict=True)} for row in points]


def _placed(key: str, place: Any, x: float) -> Any:
    if not isinstance(place, dict) or ("choose" in place) == ("low" in place or "high" in place):
        raise UserError(f"search.{key} is {brief(place)}; {{ low = .., high = .. }} or {{ choose = [..] }}")
    for name in place:
        if name not in ("low", "high", "log", "choose"):
            raise unknown("key", name, ("low", "high", "log", "choose"), where=f"search.{key}")
    place = check_json(place, f"search.{key}")
    if "choose" in place:
        if not isinstance(place["choose"], list) or not place["choose"]:
            raise UserError(f"search.{key} chooses from {brief(place['choose'])}; a list of at least one value")
        return place["choose"][min(int(x * len(place["choose"])), len(place["choose"]) - 1)]
    ends: list[Any] = [place.get(name) for name in ("low", "high", "log")]
    low, high, log = ends
    numbers = all(type(end) in (int, float) for end in (low, high))
    if not numbers or not low < high or (log and low <= 0):
        raise UserError(f"search.{key} is {brief(place)}; numbers low < high, above 0 for log = true")
    value = low * (high / low) ** x if log else low + (high - low) * x
    if type(low) is int and type(high) is int:
        return min(int(low * ((high + 1) / low) ** x) if log else int(low + (high + 1 - low) * x), high)
    return float(f"{value:.{DIGITS}g}")


def settled(plan: Plan, console: Console, execute: Callable[[Plan], list[int]]) -> Plan:
    """The plan with, in place of each cell's search, the settings that were best on validation. Runs the trials."""
    space = dict(plan.search)
    trials, seed = space.pop("trials", 16), space.pop("seed", 0)
    if type(trials) is not int or not 1 <= trials <= MOST or type(seed) is not int or seed < 0:
        raise UserError(f"search.trials is a whole number from 1 to {MOST:,}, search.seed one from 0")
    points = drawn(space, trials, seed)
    groups: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault(json.dumps([cell.task, cell.architecture, dict(cell.settings)]), []).append(cell)
    chosen: list[Cell] = []
    for cells in groups.values():
        tried = [
            replace(cells[0], settings={**cells[0].settings, **point}, options={**cells[0].options, SELECT: None})
            for point in points
        ]
        todo = tuple(cell for cell in tried if outcome(cell) is None)
        if todo:
            execute(Plan(plan.file.with_name(f"{plan.file.stem}-search.toml"), todo, plan.retries))
        scores = [outcome(cell) for cell in tried]
        done = [(score, number) for number, score in enumerate(scores) if score is not None]
        if not done:
            raise UserError(f"search: none of the {trials} trials of {cells[0].name} came to an end")
        score, best = max(done, key=lambda pair: (pair[0], -pair[1]))
        console.print(
            f"{cells[0].name}: trial {best} of {trials} is best, {100 * score:.2f} % on validation: {points[best]}"
        )
        said = {"method": "scrambled Sobol sequence", "trials": trials, "finished": len(done), "best": best,
                "validation": score, "seed": seed, "space": space, "chosen": points[best]}  # fmt: skip
        chosen += [
            replace(
                cell, settings={**cell.settings, **points[best]}, options={**cell.options, "search": json.dumps(said)}
            )
            for cell in cells
        ]
    return replace(plan, cells=tuple(chosen), search={})


SELECT = "select-only"


def outcome(cell: Cell) -> float | None:
    """The validation accuracy of a finished trial."""
    from lra.training.request import folder_of, resolve

    request = cell.request()
    file = folder_of(request, resolve(request)[0]) / "selection.json"
    return float(json.loads(file.read_text())["accuracy"]) if file.is_file() else None
