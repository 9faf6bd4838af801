"""The evidence of a number in the report: scores, seeds, learning curves, recipe, hardware, versions, checksums, and
the commands that repeat it. Each entry is a title, runs (`RUN_COLUMNS`), commands, and parts: pairs by title."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from lra.registry import tasks
from lra.reports import efficiency, leaderboard
from lra.reports.diagnostics import Cell
from lra.reports.ranking import Group, Row
from lra.results import diagnosis
from lra.results.collection import Collection
from lra.results.literature import Reported
from lra.results.official import flatten
from lra.results.profile import Profile
from lra.results.record import AT_CHANCE, RunRecord
from lra.results.statistics import Estimate, seeds_needed, success_rate

RUN_COLUMNS = ("seed", "test", "validation", "status", "started", "commit", "checksum", "id")
CURVE_POINTS = 20
"""Points of a learning curve at most: a report of 1,000 results stays below 3 MB."""


def of_row(group: Group, row: Row, baselines: Mapping[str, float], collection: Collection) -> dict[str, Any]:
    """Sections of (name, value) pairs and the runs, as the dialog shows them."""
    a = row.accuracy
    summary = [("accuracy", f"{100 * a.mean:.2f} % [{100 * a.low:.2f}, {100 * a.high:.2f}], 95 % over the {a.source}")]
    if a.deviation is not None:
        summary.append(("standard deviation over seeds", f"{100 * a.deviation:.2f} points"))
        more = seeds_needed(a.deviation, 0.01, row.seeds)
        summary.append(("seeds still needed for ± 1 point", str(more)))
    if row.collapsed:
        rate = success_rate(row.seeds - row.collapsed, row.seeds)
        interval = f"95 % [{100 * rate.low:.0f} %, {100 * rate.high:.0f} %]"
        summary.append(("runs above chance", f"{row.seeds - row.collapsed} of {row.seeds}, {interval}"))
    if row.points_per_work is not None:
        summary.append(("points per forward MFLOP and token", f"{row.points_per_work:.3g}"))
    literature = [
        (f"{r.architecture}: {r.source}", _reported(r, group))
        for r in collection.reported
        if r.name == row.architecture and group.task in r.values
    ]
    parts = {
        "Summary": summary, "Baselines": [(name, f"{value} %") for name, value in baselines.items()],
        "Reported (not ranked)": literature,
    }  # fmt: skip
    return _of_runs(f"{row.label} on {leaderboard.title(group)}", parts, row.runs)


def of_cell(cell: Cell) -> dict[str, Any]:
    """The evidence of a cell of the heat map: verdicts and scores of each seed, and the runs."""
    first = cell.first
    verdicts = [(f"seed {run.seed}", diagnosis.verdict(run)) for run in cell.runs]
    splits = [
        (f"{name}, seed {run.seed}", f"{100 * score.share:.1f} % right, whole examples {100 * score.accuracy:.1f} %")
        for run in cell.runs
        for name, score in {"test": run.test, **run.tests}.items()
    ]
    parts = {
        "Verdict": [(seed, f"{verdict.word}: {verdict.reason}") for seed, verdict in verdicts],
        "Test splits": splits,
        "Chance and plateaus": [
            (name, f"{100 * share:.1f} %")
            for name, share in {"chance": first.chance, **first.plateaus}.items()
            if share is not None
        ],
    }
    title = f"{cell.label} on {first.task} ({first.protocol.name}), recipe {first.recipe.name}, {first.hardware}"
    return _of_runs(title, parts, cell.runs)


def of_average(name: str, title: str, mean: Estimate, rows: Mapping[str, Row]) -> dict[str, Any]:
    """The evidence of a mean over tasks. rows: the row of each task."""
    parts = {
        "Summary": [("mean", f"{100 * mean.mean:.2f} %, over the {len(rows)} tasks below")],
        "Tasks": [(task, f"{100 * row.accuracy.mean:.2f} %, seeds {row.seeds}") for task, row in rows.items()],
    }
    commands = [run.command for row in rows.values() for run in row.runs]
    return _entry(f"{name}, {title}", parts, commands=commands)


def of_baseline(name: str, group: Group, rows: Sequence[Row]) -> dict[str, Any]:
    """The evidence of a rule without a sequence model: how it is computed, and on which data."""
    (record, *_) = (run for row in rows for run in row.runs if name in run.floors)
    parts = {
        "Baseline": [("accuracy", f"{100 * record.floors[name]:.2f} %"), ("test examples", f"{record.test.n:,}"),
                     ("computed by", _rules(group.task)), ("recorded in", record.id)],
        "Data": _data(record),
    }  # fmt: skip
    return _entry(f"{name} on {leaderboard.title(group)}", parts)


def _rules(task: str) -> str:
    """The description of a task's baselines from its class, if the task is registered here. No other code that a record
    names is run."""
    known = task in tasks.names()
    return " ".join((tasks.get(task)().floors.__doc__ or "").split()) if known else "the task that the record names"


def of_profiles(name: str, shape: efficiency.Shape, cells: Sequence[Profile]) -> dict[str, Any]:
    """The evidence of the speed and memory of an encoder: the measurements at each length."""
    parts: dict[str, Any] = {}
    for cell in cells:
        stored = msgspec.to_builtins(cell)
        parts[f"{cell.cell.length:,} tokens"] = [
            *flatten({key: value for key, value in stored.items() if key not in ("cell", "environment", "rounds")}),
            *((f"rounds, {key}, s", ", ".join(f"{r[key]:.4g}" for r in cell.rounds if key in r))
              for key, _ in cell.seconds.items()),
        ]  # fmt: skip
    parts["Hardware and versions"] = list(flatten(msgspec.to_builtins(cells[0].environment)))
    c, lengths = cells[0].cell, ",".join(str(cell.cell.length) for cell in cells)
    command = f"lra profile {name} --lengths {lengths} --batch {c.batch} --d-model {c.d_model} --layers {c.n_layers}"
    command += f" --direction {c.direction} --dtype {c.dtype} --budget {c.budget:g}"
    return _entry(f"{name}: {efficiency.title(shape)}", parts, commands=[] if c.task else [command])


def curves(label: str, records: Iterable[RunRecord], name: str) -> list[dict[str, Any]]:
    """The learning curve of each run that has one, reduced to CURVE_POINTS. name: of their row."""
    runs = []
    for record in records:
        points = [(p.validation_accuracy, p) for p in record.curve if p.validation_accuracy is not None]
        if not points:
            continue
        kept = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int))]
        run: dict[str, Any] = {"row": name, "label": label, "seed": f"seed {record.seed}"}
        run |= {"step": [p.step for _, p in kept], "accuracy": [round(100 * accuracy, 1) for accuracy, _ in kept]}
        # training loss where it is known, else validation loss
        losses = {key: [getattr(p, key) for _, p in kept] for key in ("loss", "validation_loss")}
        for key in [key for key, values in losses.items() if None not in values][:1]:
            run[key] = [float(f"{loss:.3g}") for loss in losses[key]]
        runs.append(run)
    return runs


def pooled(evidence: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The data of the page's script: "evidence" refers to parts by their index in the list "parts", and parts refer to
    (name, value) pairs by their index in the list "pairs". Each part and each pair is stored once."""
    parts: dict[tuple[str, tuple[int, ...]], int] = {}
    pairs: dict[tuple[str, str], int] = {}
    for entry in evidence.values():
        for place, (name, listed) in enumerate(entry["parts"]):
            numbers = tuple(pairs.setdefault(pair, len(pairs)) for pair in listed)
            entry["parts"][place] = parts.setdefault((name, numbers), len(parts))
    return {"evidence": dict(evidence), "parts": list(parts), "pairs": list(pairs)}


def _of_runs(title: str, parts: Mapping[str, Any], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """`parts`, the runs, and the record of the first of them."""
    first = runs[0]
    stored = msgspec.to_builtins(first)
    recorded = {
        "Recipe": [*flatten(stored["recipe"]), ("hash", first.recipe_hash)],
        "Work, speed, memory": [*flatten({k: stored[k] for k in ("flops", "speed", "memory", "implementations")})],
        "Hardware and versions": list(flatten(stored["environment"])),
        "Data": _data(first),
    }
    return _entry(title, {**parts, **recorded}, [_run(record) for record in runs], [record.command for record in runs])


def _data(record: RunRecord) -> list[tuple[str, str]]:
    stored = msgspec.to_builtins(record)
    return [*flatten(stored["data"]), *flatten({"protocol": stored["protocol"]})]


def _entry(
    title: str, parts: Mapping[str, Any], runs: Sequence[Any] = (), commands: Sequence[str] = ()
) -> dict[str, Any]:
    shown = [[name, pairs] for name, pairs in parts.items() if pairs]
    return {"title": title, "runs": list(runs), "commands": list(commands), "parts": shown}


def _reported(r: Reported, group: Group) -> str:
    value, why = r.values[group.task], ", ".join(r.differs(group.task, group.protocol, group.recipe))
    return f"{'FAIL' if math.isnan(value) else f'{value:.2f} %'}; differs in: {why or 'nothing known'}"


def _run(record: RunRecord) -> list[Any]:
    """A run in the order of RUN_COLUMNS."""
    commit, accuracy = record.environment.commit, record.validation.accuracy
    return [
        record.seed, f"{100 * record.test.accuracy:.2f} %", "-" if accuracy is None else f"{100 * accuracy:.2f} %",
        AT_CHANCE if record.at_chance else "above chance", record.started,
        f"{commit.hash[:12]}{' + changes' if commit.dirty else ''}" or "not recorded",
        record.predictions.sha256[:16], record.id,
    ]  # fmt: skip
