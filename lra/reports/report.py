"""One HTML file that holds every result, opens from disk and fetches nothing: tables, charts, evidence.

    tables       accuracy with its interval as a bar, baselines as rows and lines; sorted and filtered in the page
    charts       accuracy against training time, intervals, learning curves, growth with length (`charts`, by Vega)
    diagnostics  heat maps, right answers by test length, and published claims beside them, where there are such runs
    evidence     what stands behind a row or a cell (`evidence`), found by an id: r0 rows, d0 diagnoses, p0 profiles,
                 b0 baselines, a0-0 averages

Learning curves are drawn where records hold `curve`: a list of {"step": int, "validation_accuracy": float,
"validation_loss": float, "loss": float}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from lra import files
from lra.errors import UserError
from lra.registry import architectures
from lra.reports import charts, diagnostics, efficiency, evidence, leaderboard
from lra.reports.ranking import AVERAGES, LRA, Group, Leaderboard, Overall, Row
from lra.reports.table import Table
from lra.results import claims
from lra.results.claims import Judgement
from lra.results.collection import Collection
from lra.results.profile import AnyProfile
from lra.results.record import RunRecord
from lra.results.statistics import Estimate

FILE = "report.html"
FILTERS = ("family", "task", "size", "protocol", "recipe", "regime", "device")
CHARTED = (*charts.TIPS, "row", "accuracy", "low", "high", "chance", "memory_bytes")
CURVES = {
    "accuracy": ("validation accuracy", "validation accuracy %"),
    "validation_loss": ("validation loss", "validation loss"), "loss": ("training loss", "training loss"),
}  # fmt: skip
"""Learning curves against training steps: key of a run's curve -> (title, axis label)."""
NO_INTERVAL: dict[str, Any] = {"half": "", "bar": None}
PANEL = "the names in a panel"
"""Stands for them in a specification that several panels share."""


@dataclass
class _Page:
    """What the page's script reads: specifications, the data they share, the runs' learning curves, and the charts.

    lengths: for each diagnostic task with several test lengths, the specification that draws one cell of it."""

    runs: list[dict[str, Any]]
    lengths: dict[str, int] = field(default_factory=dict)
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
        It serves every panel: the script fills in the dataset "runs" and replaces PANEL by the names."""
        numbers = {}
        for kind, (_, label) in CURVES.items():
            if some := [run for run in self.runs if kind in run][:1]:
                numbers[kind] = self._add_runs(charts.curves(pd.DataFrame(some).assign(label=PANEL), kind, label))
        if self.runs:
            one = pd.DataFrame(self.runs[:1]).assign(seed=PANEL)
            numbers["seeds"] = self._add_runs(charts.curves(one, "accuracy", CURVES["accuracy"][1], name="seed"))
        return numbers

    def add_lengths(self, task: str, rows: pd.DataFrame, guess: float | None) -> None:
        """Add the specification that draws one cell of a task; the script fills in its data and name."""
        one = rows[rows["row"] == rows["row"].iloc[0]].assign(label=PANEL)
        spec = charts.specification(charts.by_test_length(one, "", guess))
        (name,) = (name for name, data in spec["datasets"].items() if any("length" in line for line in data))
        del spec["datasets"][name]
        self.datasets |= spec.pop("datasets")
        self.lengths[task] = self._add_renamed(spec, name, "lengths")

    def _add_runs(self, chart: Any) -> int:
        spec = charts.specification(chart)
        (name,) = spec.pop("datasets")
        return self._add_renamed(spec, name, "runs")

    def _add_renamed(self, spec: dict[str, Any], dataset: str, name: str) -> int:
        self.specs.append(json.loads(json.dumps(spec).replace(dataset, name)))
        return len(self.specs) - 1


def build(collection: Collection, root: Path) -> str:
    """The page as text. A pure function of the records and of the profile below `root`."""
    board = Leaderboard.of(collection)
    groups = board.groups
    profiles = efficiency.load(root)
    listed = [(group, row) for group, rows in groups.items() for row in rows]
    listed += [(entry.group, entry.row) for entry in board.modified]
    ids = {id(row): f"r{i}" for i, (_, row) in enumerate(listed)}
    rules = [(group, name) for group, rows in groups.items() for name in _rules(rows)]
    rule_ids = {rule: f"b{i}" for i, rule in enumerate(rules)}
    measurements = efficiency.by_architecture(profiles)
    profile_ids = {key: f"p{i}" for i, key in enumerate(measurements)}
    baselines = {group: baselines_of(rows) for group, rows in groups.items()}
    table = result_frame(groups, ids)
    diagnosed = Collection.read(root, "diagnostics")
    cells = diagnostics.cells(diagnosed.records)
    judged, broken = _claims(cells)
    page = _Page(runs=[run for _, row in listed for run in evidence.curves(row.label, row.runs, ids[id(row)])])
    page.runs += [run for cell in cells for run in evidence.curves(cell.label, cell.runs, cell.row)]
    parts_of = [table[table["group"] == i] for i in range(len(groups))]
    axes = [charts.limits(part["low"].min(), part["high"].max()) for part in parts_of]
    behind = evidence.pooled(
        _rows_behind(listed, baselines, collection, ids) | {cell.row: evidence.of_cell(cell) for cell in cells}
        | {profile_ids[key]: evidence.of_profiles(key[1], key[0], measured) for key, measured in measurements.items()}
        | {key: evidence.of_baseline(name, group, groups[group]) for (group, name), key in rule_ids.items()}
        | _averages_behind(board)
    )  # fmt: skip
    kinds = page.add_curves()
    figures = [
        _figures(group, part, baselines[group], page, kinds) for group, part in zip(groups, parts_of, strict=True)
    ]
    growth = [_growth(shape, part, page, profile_ids) for shape, part in efficiency.curves(profiles).items()]
    environment = Environment(loader=PackageLoader("lra.reports"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    values = {key: sorted(table[key].unique(), key=_size_order) for key in FILTERS}
    values["family"] = sorted({*values["family"], *(cell.family for cell in cells)})
    return environment.get_template("report.html").render(
        header=leaderboard.HEADER, baseline=leaderboard.BASELINE, rows=_table_rows(table, groups, axes, rule_ids),
        ticks_by_group=[_ticks(baselines[group], axis) for group, axis in zip(groups, axes, strict=True)],
        filters={key: known for key, known in values.items() if len(known) > 1},
        standard=[_matrix(board, n, key, table, axes, ids, rule_ids) for n, key in enumerate(_largest_first(board))],
        figures=figures, growth=growth, profiles=_profiles(profiles, profile_ids),
        modified=_listed(leaderboard.modified_table(board.modified), [ids[id(entry.row)] for entry in board.modified])
        if board.modified else None,
        diagnosed=_diagnosed(cells, page) if cells else None, claims=judged,
        # the literature is read with the records of each folder
        problems=list(dict.fromkeys([*collection.problems, *diagnosed.problems, *broken, *efficiency.problems(root)])),
        summary=_summary(collection.records), vega=charts.javascript(),
        data=behind | {
            "specs": page.specs, "charts": page.charts, "datasets": page.datasets, "runs": page.runs,
            "seeds": kinds.get("seeds"), "lengths": page.lengths, "lines": charts.LINES,
            "runColumns": evidence.RUN_COLUMNS, "panel": PANEL,
            "themes": {name: charts.theme(name) for name in charts.INK},
        },
    )  # fmt: skip


def families() -> list[str]:
    """Every family, so that each keeps its colour in every chart."""
    return sorted({efficiency.family(name) for name in architectures.names()} | {efficiency.OUTSIDE})


def baselines_of(rows: Sequence[Row]) -> dict[str, float]:
    """Name -> accuracy in % of what the rows of one table have to beat."""
    return {name: float(value) for name, value in leaderboard.floor_cells(run for row in rows for run in row.runs)}


def _rows_behind(
    listed: Sequence[tuple[Group, Row]],
    baselines: Mapping[Group, Mapping[str, float]],
    collection: Collection,
    ids: Mapping[int, str],
) -> dict[str, Any]:
    """The evidence of every row, the modified ones among them."""
    return {
        ids[id(row)]: evidence.of_row(group, row, baselines.get(group) or baselines_of([row]), collection)
        for group, row in listed
    }


def _averages_behind(board: Leaderboard) -> dict[str, Any]:
    """The evidence of the means in the tables over tasks."""
    found = {}
    for number, key in enumerate(_largest_first(board)):
        for name, averages in board.averages[key].items():
            for title, mean in averages.items():
                if mean:
                    rows = {task: board.by_task[key][name][task] for task in AVERAGES[title]}
                    made = evidence.of_average(f"{title} of {name}", _title(key), mean, rows)
                    found[_average_id(number, title, name)] = made
    return found


def _listed(table: Table, rows: Sequence[str]) -> dict[str, Any]:
    """A table with the id of the evidence of each row."""
    return {"table": table, "rows": list(rows)}


def _profiles(profiles: Sequence[AnyProfile], ids: Mapping[tuple[Any, str], str]) -> list[dict[str, Any]]:
    """The tables of each shape; the first column of each is the architecture."""
    return [
        _listed(table, [ids[shape, row[0].text] for row in table.rows])
        for shape, cells in efficiency.by_shape(profiles).items()
        for table in efficiency.tables(cells)
    ]


def write(collection: Collection, root: Path, folder: Path) -> Path:
    """Write <folder>/report.html. Raises UserError where that is not possible."""
    path = folder / FILE
    try:
        with files.atomic(path) as temporary:
            temporary.write_text(build(collection, root), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def result_frame(groups: Mapping[Group, Sequence[Row]], ids: Mapping[int, str]) -> pd.DataFrame:
    """One row per row of the leaderboard, with all that tables and charts show. Speed and memory are those of a
    profiled training step, all on one machine, where there is one."""
    rows = []
    for number, (group, listed) in enumerate(groups.items()):
        for row in listed:
            rows.append(_facts(row) | _shared(group) | {"group": number, "row": ids[id(row)]})
    columns = {*CHARTED, *FILTERS, "group", "rank", "architecture"}
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=sorted(columns))


def _facts(row: Row) -> dict[str, Any]:
    a = row.accuracy
    mean, low, high = (round(100 * value, 3) for value in (a.mean, a.low, a.high))
    step = row.profile
    used = math.nan if step is None else float(step.memory.peak_bytes)
    memory = "not profiled" if step is None else f"{used / 2**20:,.0f} MiB, a step of {step.cell.length:,} tokens"
    lost = f"{row.collapsed} of {row.seeds} runs at chance" if row.collapsed else "above chance"
    return {
        "label": row.label, "architecture": row.architecture, "family": efficiency.family(row.architecture),
        "rank": row.rank, "accuracy": mean, "low": low, "high": high, "half": 100 * a.half_width, "source": a.source,
        "shown": f"{mean:.2f} [{low:.2f}, {high:.2f}], over the {a.source}", "chance": not row.succeeded,
        "status": lost, "seeds": row.seeds, "collapsed": row.collapsed, "minutes": round(row.minutes, 4),
        "hardware": row.hardware,
        "speed": math.nan if step is None else round(step.tokens_per_second),
        "threads": row.threads, "dtype": row.dtype, "memory": memory, "memory_bytes": used,
        "seen": round(row.seen), "parameters": row.parameters,
        "size": _size(row.parameters), "gflop": None if row.flops is None else row.flops / 1e9,
        "seen_text": leaderboard.short(row.seen), "parameters_text": leaderboard.short(row.parameters),
    }  # fmt: skip


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
    """Positions of the baselines on the axis, in percent of it."""
    return sorted({_percent(value, axis) for value in baselines.values() if axis[0] <= value <= axis[1]})


def _table_rows(
    table: pd.DataFrame,
    groups: Mapping[Group, Sequence[Row]],
    axes: Sequence[tuple[float, float]],
    rules: Mapping[tuple[Group, str], str],
) -> list[dict[str, Any]]:
    """The rows and the baselines of each group, by accuracy. A baseline has no key `bar`."""
    lines = table.to_dict("records")
    shown = []
    for number, (group, listed) in enumerate(groups.items()):
        own = [row | {"bar": _bar(row["accuracy"], row["low"], row["high"], axes[number])}
               for row in lines if row["group"] == number]  # fmt: skip
        own += [
            _shared(group) | {"label": name, "accuracy": 100 * value, "row": rules[group, name]}
            for name, value in _rules(listed).items()
        ]
        shown += sorted(own, key=lambda row: -row["accuracy"])
    return shown


def _shared(group: Group) -> dict[str, str]:
    """The properties that all rows of a group share and that the page filters by."""
    return {key: getattr(group, key) for key in ("task", "protocol", "recipe", "regime", "device")}


def _rules(rows: Iterable[Row]) -> dict[str, float]:
    """The baselines of a group that are rules; an architecture that sees few tokens has a row of its own."""
    return leaderboard.baselines(run for row in rows for run in row.runs)


def _title(key: Overall) -> str:
    """Title of the table over tasks."""
    protocol, recipe, regime, device = key
    return f"Recipe {recipe}, {regime}, protocol {protocol}, {device}"


def _average_id(number: int, title: str, name: str) -> str:
    """Id of the evidence for the mean of an architecture in a table over tasks."""
    return f"a{number} {title} {name}"


def _matrix(
    board: Leaderboard,
    position: int,
    key: Overall,
    table: pd.DataFrame,
    axes: Sequence[tuple[float, float]],
    ids: Mapping[int, str],
    rule_ids: Mapping[tuple[Group, str], str],
) -> dict[str, Any]:
    """The table of architectures by tasks: each cell with its interval as a bar and the row that is its evidence."""
    protocol, recipe, regime, device = key
    cells = board.by_task[key]
    facts = {"protocol": protocol, "recipe": recipe, "regime": regime, "device": device}
    tasks = [t for t in LRA if any(t in by_task for by_task in cells.values())]
    group_of = dict(zip(table["row"], table["group"], strict=True))
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    rules: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        rows = {name: by_task[task] for name, by_task in cells.items() if task in by_task}
        number = group_of[ids[id(next(iter(rows.values())))]]
        places = leaderboard.places([leaderboard.candidate(row) for row in rows.values()])
        columns[task] = {
            name: _cell(row.accuracy.mean, place, _interval(row.accuracy, axes[number])) | {
                "row": ids[id(row)], "chance": not row.succeeded, "group": number}
            for (name, row), place in zip(rows.items(), places, strict=True)
        }  # fmt: skip
        for name, value in _rules(rows.values()).items():
            rules.setdefault(name, {})[task] = _cell(value, row=rule_ids[list(board.groups)[number], name])
    for title in AVERAGES:
        means = {name: e for name, averages in board.averages[key].items() if (e := averages[title])}
        if means:
            # the mean of single runs has no interval
            ends = [value for e in means.values() for value in (e.mean, e.low, e.high) if not math.isnan(value)]
            axis = charts.limits(100 * min(ends), 100 * max(ends))
            places = leaderboard.places([e.mean for e in means.values()])
            columns[title] = {
                name: _cell(e.mean, place, _interval(e, axis), _average_id(position, title, name))
                for (name, e), place in zip(means.items(), places, strict=True)
            }
    names = sorted(cells, key=lambda n: (-len(cells[n]), -sum(r.accuracy.mean for r in cells[n].values()), n))
    sizes = table.groupby("architecture")["size"].first()
    lines = [
        {"name": name, "family": efficiency.family(name), "size": sizes[name],
         "cells": [column.get(name) for column in columns.values()]}
        for name in names
    ]  # fmt: skip
    lines += [{"name": name, "cells": [by_task.get(column) for column in columns]} for name, by_task in rules.items()]
    return {"title": _title(key), "columns": list(columns), "tasks": tasks, "rows": lines, "facts": facts}


def _cell(accuracy: float, place: int = 0, interval: Mapping[str, Any] = NO_INTERVAL, row: str = "") -> dict[str, Any]:
    """A cell of the table over tasks; not at chance, unless it is said to be. row: id of its evidence."""
    return {"value": 100 * accuracy, "place": place, "row": row, "chance": False, "group": None, **interval}


def _interval(estimate: Estimate, axis: tuple[float, float]) -> dict[str, Any]:
    """Half-width in words, and the interval as a bar; neither for the mean of single runs."""
    mean, low, high = (100 * value for value in (estimate.mean, estimate.low, estimate.high))
    if math.isnan(low):
        return NO_INTERVAL
    return {"half": f"± {100 * estimate.half_width:.1f}", "bar": _bar(mean, low, high, axis)}


def _largest_first(board: Leaderboard) -> list[Overall]:
    return sorted(board.by_task, key=lambda key: (-sum(map(len, board.by_task[key].values())), key))


def _figures(
    group: Group,
    table: pd.DataFrame,
    baselines: Mapping[str, float],
    page: _Page,
    kinds: Mapping[str, int],
) -> dict[str, Any]:
    """The charts of one table."""
    frame = table[list(CHARTED)]
    name = leaderboard.title(group)
    main = [
        page.add(charts.tradeoff(frame, baselines, families()), f"Accuracy against training time on {name}"),
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
    return {"title": name, "main": main, "learning": learning, "facts": _shared(group)}


def _growth(
    shape: efficiency.Shape, cells: pd.DataFrame, page: _Page, ids: Mapping[tuple[Any, str], str]
) -> dict[str, Any]:
    """Small multiples of time and memory against length."""
    title = efficiency.title(shape)
    cells = cells.assign(row=[ids[shape, name] for name in cells["architecture"]])
    parts = [
        {"title": f"{what}, {unit}", "charts": [
            page.add(chart, f"{what} against length, {number}: {title}")
            for number, chart in enumerate(charts.growth(cells, column, unit), 1)
        ]}
        for column, what, unit in efficiency.CURVES.values()
    ]  # fmt: skip
    return {"title": title, "parts": parts}


def _diagnosed(cells: Sequence[diagnostics.Cell], page: _Page) -> dict[str, Any]:
    """Heat maps by family, right answers by test length for each task that has several, and the table of all."""
    frame, lengths = diagnostics.frame(cells), diagnostics.lengths(cells)
    tasks = sorted(frame["task"].unique())
    guesses = diagnostics.guesses(cells)
    maps = [
        page.add(charts.heatmap(part, tasks, family.replace("_", " ")), f"Diagnostics, {family}: right answers in %")
        | {"family": family}
        for family, part in frame.groupby("family")
    ]
    curves = {}
    for task, rows in lengths.groupby("task"):
        page.add_lengths(task, rows, guesses.get(task))
        curves[task] = [
            page.add(
                charts.by_test_length(part, title, guesses.get(task)), f"{task}, {title}: right answers by test length"
            )
            | {"family": part["family"].iloc[0]}
            for title, part in charts.panels(rows, "label")
        ]
    width = [charts.NAMES + column * len(tasks) for column in charts.COLUMN]
    table = diagnostics.table([run for cell in cells for run in cell.runs])
    return {"maps": maps, "width": width, "curves": curves, "table": _listed(table, [cell.row for cell in cells])}


def _claims(cells: Sequence[diagnostics.Cell]) -> tuple[list[dict[str, Any]], list[str]]:
    """The published claims of which something is measured, each with its findings and the rows that are their
    evidence, and a line for each claim that cannot be read."""
    records = [run for cell in cells for run in cell.runs]
    judged, broken = [], []
    for name in claims.names() if records else ():
        try:
            judgement = claims.judge(claims.read(name), records)
        except UserError as error:
            broken.append(f"left out the claim {name}: {error}")
            continue
        if any(finding.estimate is not None for finding in judgement.findings):
            judged.append(_judged(judgement, cells))
    return judged, broken


def _judged(judgement: Judgement, cells: Sequence[diagnostics.Cell]) -> dict[str, Any]:
    rows = []
    for finding in judgement.findings:
        measured = [cell.row for cell in cells if finding.cell.matches(cell.first)]
        settings = "".join(f" {key}={value}" for key, value in finding.cell.settings.items())
        name = finding.cell.architecture + settings
        rows.append({"name": name, "row": measured[0] if measured else "", "finding": finding})
    return {"claim": judgement.claim, "outcome": judgement.outcome, "rows": rows}
