"""The literature: published figures, checked in their sources. They are shown beside measured ones, never ranked.

`results/reported.csv`: one row per model and source, accuracies in %, FAIL where the source says that training failed.
protocol: the data pipeline behind the row where it is known; not_comparable: tasks on which the source itself did
something else (colour images, a 2-D scan, another difficulty). `results/reported_efficiency.csv`: speed and memory.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lra.errors import UserError

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
FILE, EFFICIENCY = "reported.csv", "reported_efficiency.csv"


@dataclass(frozen=True)
class Reported:
    """One row of the literature. name: the registered architecture it is a row of, or ""; values: task -> percent, NaN
    for a failure; protocol: "" where the source does not say."""

    architecture: str
    name: str
    protocol: str
    values: dict[str, float]
    not_comparable: frozenset[str]
    source: str
    note: str

    def differs(self, task: str, protocol: str, recipe: str) -> list[str]:
        """In what this row differs from a measured one; empty if the two can be compared."""
        reasons = []
        # the code behind the rows of lra2020 hides black pixels
        if self.protocol != protocol.removesuffix("-masked"):
            reasons.append(f"protocol {self.protocol or 'not stated'}")
        if task in self.not_comparable:
            reasons.append("other data or task, see note")
        if not recipe.startswith("paper"):
            reasons.append("other recipe")
        return reasons


@dataclass(frozen=True)
class Efficiency:
    """One published figure of speed or memory; length None where it is an average over tasks."""

    table: str
    architecture: str
    name: str
    metric: str
    length: int | None
    value: float
    hardware: str
    source: str


def load(root: Path) -> list[Reported]:
    """The rows of <root>/reported.csv; none if there is no such file. Raises UserError for an invalid row."""
    rows = []
    for number, row in _rows(root / FILE):
        where = f"{root / FILE}, line {number}"
        values: dict[str, float] = {}
        for task in TASKS:
            text = row[task].strip()
            if text:
                values[task] = math.nan if text == "FAIL" else _number(text, where, 0, 100)
        if not row["source"].strip():
            raise UserError(f"{where}: the source is missing")
        other = frozenset(row["not_comparable"].split())
        rows.append(
            Reported(row["architecture"], row["name"], row["protocol"], values, other, row["source"], row["note"])
        )
    return rows


def efficiency(root: Path) -> list[Efficiency]:
    """The rows of <root>/reported_efficiency.csv; none if there is no such file. Raises UserError."""
    figures = []
    for number, row in _rows(root / EFFICIENCY):
        value = _number(row["value"], f"{root / EFFICIENCY}, line {number}", 0, math.inf)
        length = int(row["length"]) if row["length"] else None
        what, model, name, metric = (row[key] for key in ("table", "architecture", "name", "metric"))
        figures.append(Efficiency(what, model, name, metric, length, value, row["hardware"], row["source"]))
    return figures


def _rows(path: Path) -> Sequence[tuple[int, dict[str, str]]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = [(reader.line_num, row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a CSV file: {error}") from None
    for number, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path}, line {number}: it has another number of columns than the header")
    return rows


def _number(text: str, where: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{where}: {text!r} is not a number from {low:g} to {high:g}")
    return value
