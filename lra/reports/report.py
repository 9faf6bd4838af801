"""One HTML file that holds every result, opens from disk and fetches nothing: tables, charts, evidence.

    tables    accuracy with its interval as a bar and the baselines as lines; sorted and filtered in the page
    charts    accuracy against training time, intervals, learning curves, growth with length (`charts`, drawn by Vega)
    evidence  what stands behind a row: recipe, seeds, curves, hardware, versions, checksums, the command to repeat it

Learning curves are drawn where records hold `curve`: a list of {"step": int, "validation_accuracy": float,
"validation_loss": float, "loss": float}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from lra import files
from lra.errors import UserError
from lra.registry import architectures
from lra.reports import charts, efficiency, leaderboard
from lra.reports.ranking import AVERAGES, LRA, Group, Leaderboard, Overall, Row
from lra.results.collection import Collection
from lra.results.literature import Reported
from lra.results.official import flatten
from lra.results.record import AT_CHANCE, RunRecord
from lra.results.statistics import Estimate, seeds_needed, success_rate

FILE = "report.html"
FILTERS = ("family", "task", "size", "protocol", "recipe", "regime", "device")
RUN_COLUMNS = ("seed", "test", "validation", "status", "started", "commit", "checksum", "id")
CURVE_POINTS = 20
"""Points of a learning curve at most: a report of 1,000 results stays below 3 MB."""
CHARTED = (*charts.TIPS, "row", "accuracy", "low", "high", "chance", "memory_bytes")
CURVES = {
    "accuracy": ("validation accuracy", "validation accuracy %"),
    "validation_loss": ("validation loss", "validation loss"), "loss": ("training loss", "training loss"),
}  # fmt: skip
"""What is drawn against training steps: key of a run's curve -> (title, axis label)."""
PANEL = "the names in a panel"
"""Stands for them in a specification that several panels share."""


@dataclass
class _Page:
    """What the page's script reads: specifications, the data they share, the runs' learning curves, and the charts."""

    runs: list[dict[str, Any]]
    specs: list[dict[str, Any]] = field(default_factory=list)
    datasets: dict[str, Any] = field(default_factory=dict)
    charts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, chart: Any, label: str) -> dict[str, Any]:
        """Add a chart with its data and return what the template needs to place it."""
        spec = charts.specification(chart)
        self.datasets |= spec.pop("datasets", {})
        self.specs.append(spec)
        return self.place(len(self.specs) - 1, label)

    def place(self, spec: int, label: str, rows: Sequence[str] = (), caption: str = "") -> dict[str, Any]:
        """Place a specification once more. rows: for learning curves, the table rows whose first run is drawn."""
        self.charts.append({"spec": spec, "rows": list(rows)})
        return {"number": len(self.charts) - 1, "label": label, "caption": caption}

    def add_curves(self) -> dict[str, int]:
        """Add a specification for each kind of learning curve that some run has, and one by seed: kind -> its number.
        It serves every panel: the script fills in the dataset "runs" and the names, where PANEL stands."""
        numbers = {}
        for kind, (_, label) in CURVES.items():
            if some := [run for run in self.runs if kind in run][:1]:
                numbers[kind] = self._add_runs(charts.curves(pd.DataFrame(some).assign(label=PANEL), kind, label))
        if self.runs:
            one = pd.DataFrame(self.runs[:1]).assign(seed=PANEL)
            numbers["seeds"] = self._add_runs(charts.curves(one, "accuracy", CURVES["accuracy"][1], name="seed"))
        return numbers

    def _add_runs(self, chart: Any) -> int:
        spec = charts.specification(chart)
        (name,) = spec.pop("datasets")
        self.specs.append(json.loads(json.dumps(spec).replace(name, "runs")))
        return len(self.specs) - 1


def build(collection: Collection, root: Path) -> str:
    """The page as text. A pure function of the records and of the profile below `root`."""
    board = Leaderboard.of(collection)
    groups = board.groups
    profiles = efficiency.load(root)
    listed = [(group, row) for group, rows in groups.items() for row in rows]
    ids = {id(row): f"r{i}" for i, (_, row) in enumerate(listed)}
    baselines = {
        group: {name: float(value) for name, value in leaderboard.floor_cells(run for row in rows for run in row.runs)}
        for group, rows in groups.items()
    }
    table = result_frame(groups, profiles, ids)
    page = _Page(runs=[run for _, row in listed for run in _run_curves(row, ids[id(row)])])
    families = sorted({efficiency.family(name) for name in architectures.names()} | {efficiency.OUTSIDE})
    evidence, parts = _pooled({
        ids[id(row)]: _evidence(group, row, baselines[group], collection) for group, row in listed
    })  # fmt: skip
    parts_of = [table[table["group"] == i] for i in range(len(groups))]
    axes = [charts.limits(part["low"].min(), part["high"].max()) for part in parts_of]
    kinds = page.add_curves()
    figures = [
        _figures(group, part, baselines[group], families, page, kinds)
        for group, part in zip(groups, parts_of, strict=True)
    ]
    growth = [_growth(shape, cells, page) for shape, cells in efficiency.curves(profiles).items()]
    environment = Environment(loader=PackageLoader("lra.reports"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    values = {key: sorted(table[key].unique(), key=_size_order) for key in FILTERS}
    return environment.get_template("report.html").render(
        header=leaderboard.HEADER, rows=_table_rows(table, axes),
        ticks_by_group=[_ticks(baselines[group], axis) for group, axis in zip(groups, axes, strict=True)],
        filters={key: known for key, known in values.items() if len(known) > 1},
        standard=[_matrix(board, key, table, axes, ids) for key in _largest_first(board)],
        figures=figures, growth=growth, profiles=efficiency.tables(profiles),
        modified=leaderboard.modified_table(board.modified) if board.modified else None,
        problems=[*collection.problems, *efficiency.problems(root)],
        summary=_summary(collection.records), vega=charts.javascript(),
        data={
            "evidence": evidence, "parts": parts, "specs": page.specs, "charts": page.charts,
            "datasets": page.datasets, "runs": page.runs, "seeds": kinds.get("seeds"), "lines": charts.LINES,
            "runColumns": RUN_COLUMNS, "panel": PANEL, "themes": {name: charts.theme(name) for name in charts.INK},
        },
    )  # fmt: skip


def write(collection: Collection, root: Path, folder: Path) -> Path:
    """Write <folder>/report.html. Raises UserError where that is not possible."""
    path = folder / FILE
    try:
        with files.atomic(path) as temporary:
            temporary.write_text(build(collection, root), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def result_frame(
    groups: Mapping[Group, Sequence[Row]], profiles: Sequence[efficiency.AnyProfile], ids: Mapping[int, str]
) -> pd.DataFrame:
    """One row per row of the leaderboard, with all that tables and charts show. Memory is that of a profiled training
    step on the same device, where there is one."""
    rows = []
    for number, (group, listed) in enumerate(groups.items()):
        memory = efficiency.memory_near(profiles, group.device, _length(listed[0]))
        same = {key: getattr(group, key) for key in ("task", "protocol", "recipe", "regime", "device")}
        for row in listed:
            used = memory.get(row.architecture)
            text = f"{used[0] / 2**20:,.0f} MiB, a step of {used[1]:,} tokens" if used else "not profiled"
            known = {"memory": text, "memory_bytes": float(used[0]) if used else math.nan}
            rows.append(_facts(row) | same | known | {"group": number, "row": ids[id(row)]})
    columns = {*CHARTED, *FILTERS, "group", "rank", "architecture"}
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=sorted(columns))


def _facts(row: Row) -> dict[str, Any]:
    a = row.accuracy
    mean, low, high = (round(100 * value, 3) for value in (a.mean, a.low, a.high))
    lost = f"{row.collapsed} of {row.seeds} runs at chance" if row.collapsed else "above chance"
    return {
        "label": row.label, "architecture": row.architecture, "family": efficiency.family(row.architecture),
        "rank": row.rank, "accuracy": mean, "low": low, "high": high, "half": 100 * a.half_width, "source": a.source,
        "shown": f"{mean:.2f} [{low:.2f}, {high:.2f}], over the {a.source}", "chance": not row.succeeded,
        "status": lost, "seeds": row.seeds, "collapsed": row.collapsed, "minutes": round(row.minutes, 4),
        "speed": round(row.speed, 3), "seen": round(row.seen), "parameters": row.parameters,
        "size": _size(row.parameters), "gflop": None if row.flops is None else row.flops / 1e9,
        "seen_text": leaderboard.short(row.seen), "parameters_text": leaderboard.short(row.parameters),
    }  # fmt: skip


def _length(row: Row) -> int:
    return row.length or 0


SIZES = {10_000: "below 10k", 100_000: "10k to 100k", 1_000_000: "100k to 1M", math.inf: "1M and more"}
"""Ranges of the number of parameters, by their ends."""


def _size(parameters: int) -> str:
    return next(name for end, name in SIZES.items() if parameters < end)


def _size_order(value: str) -> tuple[int, str]:
    known = list(SIZES.values())
    return (known.index(value) if value in known else 0, value)


def _summary(records: Sequence[RunRecord]) -> dict[str, Any]:
    return {
        "runs": len(records), "architectures": len({r.architecture for r in records}),
        "tasks": len({r.task for r in records}), "newest": max((r.started for r in records), default="")[:10],
    }  # fmt: skip


def _bar(accuracy: float, low: float, high: float, axis: tuple[float, float]) -> dict[str, int]:
    """An interval in percent of the axis."""
    left, middle, right = (_percent(value, axis) for value in (low, accuracy, high))
    return {"left": left, "width": right - left, "middle": middle}


def _percent(value: float, axis: tuple[float, float]) -> int:
    return round(100 * (min(max(value, axis[0]), axis[1]) - axis[0]) / (axis[1] - axis[0]))


def _ticks(baselines: Mapping[str, float], axis: tuple[float, float]) -> list[int]:
    """Where the baselines on the axis are drawn, in percent of it."""
    return sorted({_percent(value, axis) for value in baselines.values() if axis[0] <= value <= axis[1]})


def _table_rows(table: pd.DataFrame, axes: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    rows = table.to_dict("records")
    return [row | {"bar": _bar(row["accuracy"], row["low"], row["high"], axes[row["group"]])} for row in rows]


def _matrix(
    board: Leaderboard, key: Overall, table: pd.DataFrame, axes: Sequence[tuple[float, float]], ids: Mapping[int, str]
) -> dict[str, Any]:
    """The table of architectures by tasks: each cell with its interval as a bar and the row that is its evidence."""
    protocol, recipe, regime, device = key
    cells = board.by_task[key]
    facts = {"protocol": protocol, "recipe": recipe, "regime": regime, "device": device}
    tasks = [t for t in LRA if any(t in by_task for by_task in cells.values())]
    group_of = dict(zip(table["row"], table["group"], strict=True))
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        rows = {name: by_task[task] for name, by_task in cells.items() if task in by_task}
        number = group_of[ids[id(next(iter(rows.values())))]]
        places = leaderboard.places([leaderboard.candidate(row) for row in rows.values()])
        columns[task] = {
            name: _cell(row.accuracy, place, axes[number]) | {
                "row": ids[id(row)], "chance": not row.succeeded, "group": number}
            for (name, row), place in zip(rows.items(), places, strict=True)
        }  # fmt: skip
    for title in AVERAGES:
        means = {name: e for name, averages in board.averages[key].items() if (e := averages[title])}
        if means:
            # the mean of single runs has no interval
            ends = [value for e in means.values() for value in (e.mean, e.low, e.high) if not math.isnan(value)]
            axis = charts.limits(100 * min(ends), 100 * max(ends))
            places = leaderboard.places([e.mean for e in means.values()])
            columns[title] = {n: _cell(e, place, axis) for (n, e), place in zip(means.items(), places, strict=True)}
    names = sorted(cells, key=lambda n: (-len(cells[n]), -sum(r.accuracy.mean for r in cells[n].values()), n))
    sizes = table.groupby("architecture")["size"].first()
    lines = [
        {"name": name, "family": efficiency.family(name), "size": sizes[name],
         "cells": [column.get(name) for column in columns.values()]}
        for name in names
    ]  # fmt: skip
    return {"title": f"Recipe {recipe}, {regime}, protocol {protocol}, {device}", "columns": list(columns),
            "tasks": tasks, "rows": lines, "facts": facts}  # fmt: skip


def _cell(estimate: Estimate, place: int, axis: tuple[float, float]) -> dict[str, Any]:
    mean, low, high = (100 * value for value in (estimate.mean, estimate.low, estimate.high))
    bar = None if math.isnan(low) else _bar(mean, low, high, axis)
    half = "" if bar is None else f"± {100 * estimate.half_width:.1f}"
    return {"value": mean, "half": half, "place": place, "bar": bar, "row": "", "chance": False, "group": None}


def _largest_first(board: Leaderboard) -> list[Overall]:
    return sorted(board.by_task, key=lambda key: (-sum(map(len, board.by_task[key].values())), key))


def _figures(
    group: Group,
    table: pd.DataFrame,
    baselines: Mapping[str, float],
    families: Sequence[str],
    page: _Page,
    kinds: Mapping[str, int],
) -> dict[str, Any]:
    """The charts of one table."""
    frame = table[list(CHARTED)]
    name = leaderboard.title(group)
    main = [
        page.add(charts.tradeoff(frame, baselines, families), f"Accuracy against training time on {name}"),
        page.add(charts.dots(frame, baselines), f"Accuracy with intervals on {name}"),
    ]
    first = {run["row"]: run for run in reversed(page.runs)}
    families_of = dict(zip(frame["row"], frame["family"], strict=True))
    known = [first[row] | {"family": family} for row, family in families_of.items() if row in first]
    learning = []
    for kind, (what, _) in CURVES.items():
        runs = pd.DataFrame([run for run in known if kind in run])
        for title, part in charts.panels(runs, "label") if len(runs) else []:
            caption = f"{title}: {what}"
            learning.append(page.place(kinds[kind], f"Learning curves, {caption}", list(part["row"]), caption))
    facts = {key: getattr(group, key) for key in ("task", "protocol", "recipe", "regime", "device")}
    return {"title": name, "main": main, "learning": learning, "facts": facts}


def _growth(shape: efficiency.Shape, cells: pd.DataFrame, page: _Page) -> dict[str, Any]:
    """Small multiples of time and memory against length."""
    title = efficiency.title(shape)
    parts = [
        {"title": f"{what}, {unit}", "charts": [
            page.add(chart, f"{what} against length, {number}: {title}")
            for number, chart in enumerate(charts.growth(cells, column, unit), 1)
        ]}
        for column, what, unit in efficiency.CURVES.values()
    ]  # fmt: skip
    return {"title": title, "parts": parts}


def _run_curves(row: Row, name: str) -> list[dict[str, Any]]:
    """The learning curve of each run that has one, thinned to CURVE_POINTS."""
    runs = []
    for record in row.runs:
        points = [(p.validation_accuracy, p) for p in record.curve if p.validation_accuracy is not None]
        if not points:
            continue
        kept = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int))]
        run: dict[str, Any] = {"row": name, "label": row.label, "seed": f"seed {record.seed}"}
        run |= {"step": [p.step for _, p in kept], "accuracy": [round(100 * accuracy, 1) for accuracy, _ in kept]}
        # training loss where it is known, else validation loss
        losses = {key: [getattr(p, key) for _, p in kept] for key in ("loss", "validation_loss")}
        for key in [key for key, values in losses.items() if None not in values][:1]:
            run[key] = [float(f"{loss:.3g}") for loss in losses[key]]
        runs.append(run)
    return runs


def _pooled(evidence: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Evidence with its parts replaced by their numbers in a list that holds each part once."""
    numbers: dict[str, int] = {}
    for entry in evidence.values():
        entry["parts"] = [numbers.setdefault(json.dumps(part), len(numbers)) for part in entry["parts"]]
    return dict(evidence), [json.loads(part) for part in numbers]


def _evidence(group: Group, row: Row, baselines: Mapping[str, float], collection: Collection) -> dict[str, Any]:
    """Sections of (name, value) pairs and the runs, as the dialog shows them."""
    first, a = row.runs[0], row.accuracy
    summary = [("accuracy", f"{100 * a.mean:.2f} % [{100 * a.low:.2f}, {100 * a.high:.2f}], 95 % over the {a.source}")]
    if a.deviation is not None:
        summary.append(("standard deviation over seeds", f"{100 * a.deviation:.2f} points"))
        more = seeds_needed(a.deviation, 0.01, row.seeds)
        summary.append(("seeds still needed for ± 1 point", str(more)))
    if row.collapsed:
        rate = success_rate(row.seeds - row.collapsed, row.seeds)
        interval = f"95 % [{100 * rate.low:.0f} %, {100 * rate.high:.0f} %]"
        summary.append(("runs that left chance", f"{row.seeds - row.collapsed} of {row.seeds}, {interval}"))
    if row.points_per_work is not None:
        summary.append(("points per forward MFLOP and token", f"{row.points_per_work:.3g}"))
    literature = [
        (f"{r.architecture}: {r.source}", _reported_text(r, group))
        for r in collection.reported
        if r.name == row.architecture and group.task in r.values
    ]
    stored = msgspec.to_builtins(first)
    parts = {
        "Summary": summary, "Baselines": [(name, f"{value} %") for name, value in baselines.items()],
        "Reported (not ranked)": literature,
        "Recipe": [*flatten(stored["recipe"]), ("hash", first.recipe_hash)],
        "Work, speed, memory": [*flatten({k: stored[k] for k in ("flops", "speed", "memory", "implementations")})],
        "Hardware and versions": list(flatten(stored["environment"])),
        "Data": [*flatten(stored["data"]), *flatten({"protocol": stored["protocol"]})],
    }  # fmt: skip
    return {
        "title": f"{row.label} on {leaderboard.title(group)}",
        "runs": [_run(record) for record in row.runs], "commands": [record.command for record in row.runs],
        "parts": [[name, pairs] for name, pairs in parts.items() if pairs],
    }  # fmt: skip


def _reported_text(r: Reported, group: Group) -> str:
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
