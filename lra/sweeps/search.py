"""Hyper-parameter search: quasi-random settings, selected on validation. Results record the number of trials.

In a sweep file, in addition to tasks, architectures and seeds:

    [search]
    trials = 16
    seed = 0
    "optim.lr" = { low = 1e-4, high = 1e-2, log = true }
    "model.dropout" = { low = 0.0, high = 0.3 }
    "encoder.state_size" = { choose = [16, 64] }

Each trial is one training run with the first seed that does not evaluate the test set. The trial with the best
validation accuracy, or the fewest bits per token where the target is the next token, is then run with every seed; its
results record the number of trials and its own number.
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
from lra.sweeps.plans import MAX_CELLS, Cell, Plan

DIGITS = 4
"""Significant digits of sampled numbers."""


def sample_points(space: Mapping[str, Any], trials: int, seed: int) -> list[dict[str, Any]]:
    """Sample `trials` points of a scrambled Sobol sequence.

    space: key -> {low, high, log} or {choose}. Returns a dict of settings for each point. Raises UserError.
    """
    if not space:
        raise UserError('search: name at least one setting, for example "optim.lr" = { low = 1e-4, high = 1e-2 }')
    # a Sobol sequence is balanced only for powers of two; surplus points are dropped
    points = qmc.Sobol(len(space), seed=seed).random_base2(max(math.ceil(math.log2(trials)), 0))[:trials]
    return [{key: _scale(key, entry, x) for (key, entry), x in zip(space.items(), row, strict=True)} for row in points]


def _scale(key: str, entry: Any, x: float) -> Any:
    """Map x in [0, 1) to a value of a setting. entry: its entry in the [search] table."""
    if not isinstance(entry, dict) or ("choose" in entry) == ("low" in entry or "high" in entry):
        raise UserError(f"search.{key} is {brief(entry)}; {{ low = .., high = .. }} or {{ choose = [..] }}")
    for name in entry:
        if name not in ("low", "high", "log", "choose"):
            raise unknown("key", name, ("low", "high", "log", "choose"), where=f"search.{key}")
    entry = check_json(entry, f"search.{key}")
    if "choose" in entry:
        choices = entry["choose"]
        if not isinstance(choices, list) or not choices:
            raise UserError(f"search.{key}.choose is {brief(choices)}; a list of at least one value")
        return choices[min(int(x * len(choices)), len(choices) - 1)]
    bounds: list[Any] = [entry.get(name) for name in ("low", "high", "log")]
    low, high, log = bounds
    numeric = all(type(bound) in (int, float) for bound in (low, high))
    if not numeric or not low < high or (log and low <= 0):
        raise UserError(f"search.{key} is {brief(entry)}; numbers low < high, both above 0 if log = true")
    value = low * (high / low) ** x if log else low + (high - low) * x
    if type(low) is int and type(high) is int:
        return min(int(low * ((high + 1) / low) ** x) if log else int(low + (high + 1 - low) * x), high)
    return float(f"{value:.{DIGITS}g}")


def unfinished_trials(plan: Plan) -> Plan:
    """The trials of a plan that `choose_settings` would run. Raises UserError."""
    _, _, points = _sample(plan)
    tried = [cell for cells in _groups(plan) for cell in _trials(cells[0], points)]
    return replace(plan, cells=tuple(cell for cell in tried if trial_scores(cell) is None), search={})


def choose_settings(plan: Plan, console: Console, execute: Callable[[Plan], list[int]]) -> Plan:
    """Run the trials of a plan and return the plan with the settings that were best on validation.

    execute: runs the cells of a plan. Raises UserError if no trial of a cell finishes.
    """
    space, seed, points = _sample(plan)
    trials = len(points)
    chosen: list[Cell] = []
    for cells in _groups(plan):
        tried = _trials(cells[0], points)
        unfinished = tuple(cell for cell in tried if trial_scores(cell) is None)
        if unfinished:
            execute(Plan(plan.file.with_name(f"{plan.file.stem}-search.toml"), unfinished, plan.retries))
        done = [(scores, number) for number, cell in enumerate(tried) if (scores := trial_scores(cell)) is not None]
        if not done:
            raise UserError(
                f"search: none of the {trials} trials of {cells[0].name} finished; their logs are in {plan.logs}-search"
            )
        scores, best = max(done, key=lambda pair: (_merit(pair[0]), -pair[1]))
        bits = scores.get("bits")
        score = scores["accuracy"] if bits is None else bits
        shown = f"{100 * score:.2f} %" if bits is None else f"{score:.3f} bits per token"
        console.print(f"{cells[0].name}: trial {best} of {trials} is best, {shown} on validation: {points[best]}")
        summary = {"method": "scrambled Sobol sequence", "trials": trials, "finished": len(done), "best": best,
                "validation": score, "seed": seed, "space": space, "chosen": points[best]}  # fmt: skip
        chosen += [
            replace(
                cell,
                settings={**cell.settings, **points[best]},
                options={**cell.options, "search": json.dumps(summary)},
            )
            for cell in cells
        ]
    return replace(plan, cells=tuple(chosen), search={})


SELECT = "select-only"


def _sample(plan: Plan) -> tuple[dict[str, Any], int, list[dict[str, Any]]]:
    """Space, seed and points of the search of a plan. Raises UserError."""
    space = dict(plan.search)
    trials, seed = space.pop("trials", 16), space.pop("seed", 0)
    if type(trials) is not int or not 1 <= trials <= MAX_CELLS or type(seed) is not int or seed < 0:
        raise UserError(f"search.trials is an integer from 1 to {MAX_CELLS:,}, search.seed an integer from 0")
    return space, seed, sample_points(space, trials, seed)


def _groups(plan: Plan) -> list[list[Cell]]:
    """The cells of a plan, those that differ in their seeds alone together."""
    groups: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault(json.dumps([cell.task, cell.architecture, dict(cell.settings)]), []).append(cell)
    return list(groups.values())


def _trials(cell: Cell, points: list[dict[str, Any]]) -> list[Cell]:
    return [
        replace(cell, settings={**cell.settings, **point}, options={**cell.options, SELECT: None}) for point in points
    ]


def trial_scores(cell: Cell) -> dict[str, Any] | None:
    """Validation scores of a trial; None if it has not finished."""
    from lra.training.request import folder_of, resolve

    request = cell.request()
    file = folder_of(request, resolve(request)[0]) / "selection.json"
    scores: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return scores


def _merit(scores: Mapping[str, Any]) -> float:
    """The score that the best trial maximises: accuracy or, for the next token, minus its bits."""
    return float(scores["accuracy"] if scores.get("bits") is None else -scores["bits"])
