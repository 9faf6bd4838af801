"""One HTML file that holds every result, opens from disk and fetches nothing: tables, figures, evidence.

    figures   accuracy against speed with memory as area, floors, learning curves, growth with length
    evidence  what stands behind a row: recipe, seeds, curves, hardware, versions, checksums, the command to repeat it

Curves are drawn where records hold `curve`: a list of {"step": int, "validation_accuracy": float, "loss": float}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lra import files
from lra.errors import UserError
from lra.reports import efficiency, leaderboard
from lra.reports.comparison import flat
from lra.reports.leaderboard import Group, Row
from lra.reports.plots import Series, chart
from lra.results.collection import Collection, Record
from lra.results.literature import Reported
from lra.results.statistics import seeds_needed, success_rate

FILE = "report.html"
PICKED = ("task", "protocol", "recipe", "regime", "device")


def build(collection: Collection, root: Path) -> str:
    """The page as text. A pure function of the records and of the profile below `root`."""
    found = leaderboard.rows(collection.records, collection.answers)
    names = {id(row): f"r{i}" for i, row in enumerate(row for listed in found.values() for row in listed)}
    colours = {name: i for i, name in enumerate(sorted({row.architecture for rows in found.values() for row in rows}))}
    rows = [_row(group, row, names[id(row)], collection) for group, listed in found.items() for row in listed]
    profiled = efficiency.load(root)
    pages = Environment(
        loader=PackageLoader("lra.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return pages.get_template("report.html").render(
        header=leaderboard.HEADER,
        rows=rows,
        picked={key: sorted({row[key] for row in rows}) for key in PICKED},
        overall=[_overall(key, cells, names) for key, cells in leaderboard.averages(found).items()],
        figures=[_figures(g, listed, names, colours, collection) for g, listed in found.items()],
        growth=[{"title": title, "svg": Markup(svg)} for title, svg in efficiency.charts(profiled)],
        profiles=efficiency.sheets(profiled),
        problems=[*collection.problems, *efficiency.problems(root)],
        evidence={row["id"]: row.pop("evidence") for row in rows},
        curves={row["id"]: Markup(row.pop("curves")) for row in rows},
    )


def write(collection: Collection, root: Path, folder: Path) -> Path:
    """Write <folder>/report.html. Raises UserError where that is not possible."""
    path = folder / FILE
    try:
        with files.atomic(path) as temporary:
            temporary.write_text(build(collection, root), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def _row(group: Group, row: Row, name: str, collection: Collection) -> dict[str, Any]:
    a = row.accuracy
    percent = [100 * value for value in (a.mean, a.low, a.high)]
    return {
        "id": name, "label": row.label, "rank": row.rank, "seeds": row.seeds, "seen": row.seen,
        "collapsed": row.collapsed, "accuracy": percent[0], "half": 100 * a.half_width, "source": a.source,
        "parameters": row.parameters, "flops": row.flops, "speed": row.speed, "memory": row.memory / 2**20,
        "minutes": row.minutes, "direction": row.direction, "title": leaderboard.title(group), "n": group.tested,
        **{key: getattr(group, key) for key in PICKED},
        "shown": dict(zip(leaderboard.COLUMNS, leaderboard.cells(row), strict=True)),
        "evidence": _evidence(group, row, collection), "curves": _curves(row.runs, row.runs[0]["floors"]),
    }  # fmt: skip


def _evidence(group: Group, row: Row, collection: Collection) -> dict[str, Any]:
    """Sections of (name, value) pairs and the runs, as the dialog shows them."""
    first, a = row.runs[0], row.accuracy
    summary = [("accuracy", f"{100 * a.mean:.2f} % [{100 * a.low:.2f}, {100 * a.high:.2f}], 95 % over the {a.source}")]
    if a.deviation is not None:
        summary.append(("standard deviation over seeds", f"{100 * a.deviation:.2f} points"))
        more = seeds_needed(a.deviation, 0.01, row.seeds)
        summary.append(("seeds still needed for ± 1 point", str(more)))
    if row.collapsed:
        rate = success_rate(row.seeds - row.collapsed, row.seeds)
        told = f"{row.seeds - row.collapsed} of {row.seeds}, 95 % [{100 * rate.low:.0f} %, {100 * rate.high:.0f} %]"
        summary.append(("runs that left chance", told))
    if row.points_per_work is not None:
        summary.append(("points per forward MFLOP and token", f"{row.points_per_work:.3g}"))
    if row.memory_score is not None:
        summary.append(("tokens per MiB of peak memory", f"{row.memory_score:.3g}"))
    literature = [
        (f"{r.architecture}: {r.source}", _told(r, group))
        for r in collection.reported
        if r.name == row.architecture and group.task in r.values
    ]
    floors = [(name, f"{value} %") for name, value in leaderboard.floor_cells(row.runs, group)]
    parts = {
        "Summary": summary, "Floors": floors, "Reported (not ranked)": literature,
        "Recipe": [*flat(first["recipe"]), ("hash", first["recipe_hash"])],
        "Work, speed, memory": [*flat({k: first[k] for k in ("flops", "speed", "memory", "implementations")})],
        "Hardware and versions": list(flat(first["environment"])),
        "Data": [*flat(first["data"]), *flat({"protocol": first["protocol"]})],
    }  # fmt: skip
    return {
        "title": f"{row.label} on {leaderboard.title(group)}",
        "runs": [_run(record) for record in row.runs],
        "parts": [[name, pairs] for name, pairs in parts.items() if pairs],
    }


def _told(r: Reported, group: Group) -> str:
    value, why = r.values[group.task], ", ".join(r.differs(group.task, group.protocol, group.recipe))
    return f"{'FAIL' if math.isnan(value) else f'{value:.2f} %'}; differs in: {why or 'nothing known'}"


def _run(record: Record) -> dict[str, Any]:
    commit = record["environment"].get("commit", {})
    return {
        "id": record["id"], "seed": record["seed"], "test": f"{100 * record['test']['accuracy']:.2f} %",
        "validation": f"{100 * record['validation'].get('accuracy', math.nan):.2f} %",
        "status": record.get("collapsed") or "above chance", "started": record["started"],
        "commit": f"{commit.get('hash', '')[:12]}{' + changes' if commit.get('dirty') else ''}" or "not recorded",
        "checksum": record["predictions"].get("sha256", "")[:16], "command": record["command"],
    }  # fmt: skip


def _points(record: Record) -> list[tuple[float, float]]:
    """(step, validation accuracy in %) as far as the record holds them."""
    known = [(p["step"], p.get("validation_accuracy")) for p in record.get("curve") or ()]
    return [(step, 100 * accuracy) for step, accuracy in known if isinstance(accuracy, int | float)]


def _curves(runs: Sequence[Record], floors: Mapping[str, float]) -> str:
    """Validation accuracy against step, one line a run; empty where no record holds a curve."""
    series = []
    for record in runs:
        if points := _points(record):
            series.append(Series(f"seed {record['seed']}", points, colour=record["seed"]))
    lines = [(name, 100 * value) for name, value in floors.items() if name == "majority class"]
    return chart("Learning curves", "step", "validation accuracy %", series, lines=lines)


def _overall(
    key: tuple[str, str, str, str], cells: Mapping[str, Mapping[str, Row]], names: Mapping[int, str]
) -> dict[str, Any]:
    """The table over tasks, each cell with the row that is its evidence."""
    sheet = leaderboard.overall_sheet(key, cells)
    lines = []
    for line in sheet.rows:
        by_task = cells[line[0].text]
        behind = ["", *(names[id(by_task[c])] if c in by_task else "" for c in sheet.columns[1:])]
        lines.append([{"text": c.text, "place": c.place, "row": r} for c, r in zip(line, behind, strict=True)])
    return {"title": sheet.title, "columns": sheet.columns, "rows": lines, "notes": sheet.notes}


def _figures(
    group: Group, found: Sequence[Row], names: Mapping[int, str], colours: Mapping[str, int], collection: Collection
) -> dict[str, Any]:
    known = {k: 100 * v for r in collection.records if leaderboard.group_of(r) == group for k, v in r["floors"].items()}
    floors = sorted(known.items(), key=lambda floor: floor[1])
    dots = []
    for row in found:
        at = (row.speed, 100 * row.accuracy.mean)
        dots.append(Series(row.label, [at], [row.memory], names[id(row)], colours[row.architecture], line=False))
    speed = chart("Accuracy against speed", "training examples/s", "test accuracy %", dots, log_x=True, lines=floors)
    curves = []
    for row in found:
        if points := _points(row.runs[0]):
            curves.append(Series(row.label, points, row=names[id(row)], colour=colours[row.architecture]))
    learning = chart("Learning curves", "step", "validation accuracy %", curves)
    best = max(100 * row.accuracy.mean for row in found)
    bars = [{"name": name, "value": value, "floor": True} for name, value in floors]
    return {
        "title": leaderboard.title(group), "speed": Markup(speed), "curves": Markup(learning),
        "floors": [*bars, {"name": f"best measured: {found[0].label}", "value": best, "floor": False}],
    }  # fmt: skip
