"""Tables from result files, and from nothing else: terminal, Markdown and CSV.

Rows are compared only inside one group: same task, protocol, recipe name, regime, test subset and kind of device.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lra import result
from lra.errors import UserError
from lra.statistics import Estimate, estimate

COLUMNS = (
    "architecture", "acc %", "± 95 %", "seeds", "params", "GFLOP", "ex/s", "MiB", "min", "direction",
    "note",
)  # fmt: skip
WORDS = ("architecture", "direction", "note")


@dataclass(frozen=True)
class Group:
    """What rows of one table share."""

    task: str
    protocol: str
    recipe: str
    regime: str
    device: str
    tested: int


@dataclass(frozen=True)
class Row:
    """One architecture in a group: its runs differ in the seed and nothing else."""

    architecture: str
    accuracy: Estimate
    seeds: int
    collapsed: int
    tested: int
    parameters: int
    flops: float | None
    speed: float
    memory: float
    minutes: float
    direction: str
    hardware: str


def load(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every readable record below <root>/runs, in order of id, and one line for each file that was left out."""
    records: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for path in sorted((root / "runs").rglob("*.json")):
        try:
            record = result.read(path)
        except UserError as error:
            problems.append(f"left out {error}")
            continue
        if record["id"] in records and records[record["id"]] != record:
            problems.append(f"left out {path}: another record has the same id {record['id']}")
            continue
        records[record["id"]] = record
    return [records[key] for key in sorted(records)], problems


def group_of(record: dict[str, Any]) -> Group:
    environment = record["environment"]
    hardware = environment.get("gpu") or environment["cpu"]
    return Group(
        record["task"], record["protocol"]["name"], record["recipe"]["name"], record["regime"],
        hardware, record["test"]["n"],
    )  # fmt: skip


def rows(records: Iterable[dict[str, Any]]) -> dict[Group, list[Row]]:
    """Rows by group, best first. Of several runs with one recipe hash and seed, the newest counts."""
    cells: dict[tuple[Group, str, str], dict[int, dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r["started"], r["id"])):
        key = (group_of(record), record["architecture"], record["recipe_hash"])
        cells.setdefault(key, {})[record["seed"]] = record
    found: dict[Group, list[Row]] = {}
    for (group, architecture, _), by_seed in cells.items():
        found.setdefault(group, []).append(_row(architecture, list(by_seed.values())))
    order = sorted(found, key=lambda g: (g.task, g.protocol, g.recipe, g.regime, g.device, g.tested))
    return {g: sorted(found[g], key=lambda r: (-r.accuracy.mean, r.architecture)) for g in order}


def _row(architecture: str, runs: Sequence[dict[str, Any]]) -> Row:
    def mean(values: Iterable[float]) -> float:
        listed = list(values)
        return math.fsum(listed) / len(listed)

    first, tested = runs[0], runs[0]["test"]["n"]
    forward = [r["flops"].get("forward") for r in runs]
    return Row(
        architecture=architecture,
        accuracy=estimate([r["test"]["accuracy"] for r in runs], tested),
        seeds=len(runs),
        collapsed=sum(bool(r.get("collapsed")) for r in runs),
        tested=tested,
        parameters=first["parameters"],
        flops=None if any(f is None for f in forward) else mean(forward),
        speed=mean(r["speed"]["examples_per_second"] for r in runs),
        memory=mean(r["memory"]["peak_bytes"] for r in runs),
        minutes=mean(r["wall_seconds"] for r in runs) / 60,
        direction=first["direction"],
        hardware=group_of(first).device,
    )


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    notes = [f"{row.collapsed}/{row.seeds} at chance"] if row.collapsed else []
    if row.seeds == 1:
        notes.append("1 seed: interval of the test set")
    return [
        row.architecture,
        f"{100 * row.accuracy.mean:.2f}",
        f"{100 * row.accuracy.half_width:.2f}",
        str(row.seeds),
        _short(row.parameters),
        "-" if row.flops is None else f"{row.flops / 1e9:.3g}",
        f"{row.speed:.3g}",
        f"{row.memory / 2**20:.0f}",
        f"{row.minutes:.1f}",
        row.direction,
        "; ".join(notes),
    ]


def title(group: Group) -> str:
    return (
        f"{group.task} ({group.protocol}), recipe {group.recipe}, {group.regime}, n = {group.tested:,}, {group.device}"
    )


def floors(records: Iterable[dict[str, Any]], group: Group) -> str:
    """The group's floors in one line: what a result has to beat to mean anything."""
    return "floors: " + ", ".join(f"{name} {value}" for name, value in _floor_cells(records, group))


def _floor_cells(records: Iterable[dict[str, Any]], group: Group) -> list[tuple[str, str]]:
    known = {k: v for r in records if group_of(r) == group for k, v in r["floors"].items()}
    return [(name, f"{100 * value:.1f}") for name, value in sorted(known.items(), key=lambda item: item[1])]


def terminal(records: Sequence[dict[str, Any]], task: str = "") -> list[Table | str]:
    """Tables that fit 100 columns, each followed by its floors."""
    parts: list[Table | str] = []
    for group, found in rows(records).items():
        if task and group.task != task:
            continue
        table = Table(title=title(group), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
        for column in COLUMNS[:-1]:
            table.add_column(column, justify="left" if column in WORDS else "right", no_wrap=True)
        for row in found:
            table.add_row(*cells(row)[:-1])
        parts += [table, *dict.fromkeys(f"{r.architecture}: {cells(r)[-1]}" for r in found if cells(r)[-1])]
        parts.append(floors(records, group))
    return parts


def markdown(records: Sequence[dict[str, Any]]) -> str:
    lines = ["# Leaderboard", "", HEADER, ""]
    for group, found in rows(records).items():
        lines += [f"## {title(group)}", "", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|" + "|".join("---" if c in WORDS else "---:" for c in COLUMNS) + "|")
        lines += ["| " + " | ".join(_escaped(c) for c in cells(row)) + " |" for row in found]
        lines += ["", floors(records, group), ""]
    return "\n".join(lines)


HEADER = (
    "Generated by `lra leaderboard` from the files in `results/runs/`. Accuracy in % on the test set, read once; "
    "± is the half-width of a 95 % interval, over seeds (Student's t) where there are two or more, of the test set "
    "(Wilson) where there is one. GFLOP: forward, one example at the protocol's full length, multiply-add = 2. "
    "ex/s, MiB (peak) and min (whole run) are of training. Tables are not comparable with each other."
)


def readme(records: Sequence[dict[str, Any]]) -> str:
    """The short table of the README: one line a row, the groups one after the other."""
    lines = [
        "| task | architecture | accuracy % | seeds | params | ex/s | device |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for group, found in rows(records).items():
        for row in found:
            name, accuracy, half, seeds, params, _, speed, *_ = cells(row)
            task = f"{group.task} ({group.protocol}, {group.recipe})"
            lines.append(
                f"| {task} | {_escaped(name)} | {accuracy} ± {half} | {seeds} | {params} | {speed} | {row.hardware} |"
            )
        lines += [f"| | *{part}* | {value} | | | | |" for part, value in _floor_cells(records, group)]
    return "\n".join(lines)


def update_readme(path: Path, records: Sequence[dict[str, Any]]) -> bool:
    """Replace what stands between the results markers of a README; False where there are none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        return False
    with result.atomic(path) as temporary:
        temporary.write_text(f"{before}{start}\n{readme(records)}\n{end}{after}", encoding="utf-8")
    return True


MARKERS = ("<!-- results -->", "<!-- /results -->")


def table_csv(records: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([
        "task", "protocol", "recipe", "regime", "device", "n", "architecture", "accuracy", "low", "high", "interval",
        "seeds", "collapsed", "parameters", "flops_forward", "examples_per_second", "peak_bytes", "minutes",
        "direction",
    ])  # fmt: skip
    for group, found in rows(records).items():
        for r in found:
            a = r.accuracy
            writer.writerow([
                group.task, group.protocol, group.recipe, group.regime, group.device, group.tested, r.architecture,
                f"{a.mean:.6f}", f"{a.low:.6f}", f"{a.high:.6f}", a.source, r.seeds, r.collapsed, r.parameters,
                "" if r.flops is None else f"{r.flops:.0f}", f"{r.speed:.3f}", f"{r.memory:.0f}", f"{r.minutes:.3f}",
                r.direction,
            ])  # fmt: skip
    return out.getvalue()


FORMATS = {"md": ("LEADERBOARD.md", markdown), "csv": ("leaderboard.csv", table_csv)}


def write(root: Path, records: Sequence[dict[str, Any]], formats: Sequence[str]) -> list[Path]:
    """Write the table in each of the formats below `root`. Raises UserError for an unknown one."""
    written = []
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown format {name!r}; one of {', '.join(FORMATS)}")
        file, build = FORMATS[name]
        with result.atomic(root / file) as temporary:
            temporary.write_text(build(records), encoding="utf-8")
        written.append(root / file)
    return written


def _short(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.1f}k"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
