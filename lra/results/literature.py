"""The literature: figures read in a source, beside which measured ones are shown and with which they are never ranked.

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
        """Why this row does not answer for a run of ours; empty where it does."""
        found = []
        if self.protocol != protocol:
            found.append(f"protocol {self.protocol or 'not stated'}")
        if task in self.not_comparable:
            found.append("other data or task, see note")
        if not recipe.startswith("paper"):
            found.append("other recipe")
        return found


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
    """The rows of <root>/reported.csv; none where there is no such file. Raises UserError for a row that is not one."""
    found = []
    for number, row in _rows(root / FILE):
        where = f"{root / FILE}, line {number}"
        values: dict[str, float] = {}
        for task in TASKS:
            text = row[task].strip()
            if text:
                values[task] = math.nan if text == "FAIL" else _number(text, where, 0, 100)
        if not row["source"].strip():
            raise UserError(f"{where}: a reported row names its source")
        other = frozenset(row["not_comparable"].split())
        found.append(
            Reported(row["architecture"], row["name"], row["protocol"], values, other, row["source"], row["note"])
        )
    return found


def efficiency(root: Path) -> list[Efficiency]:
    """The rows of <root>/reported_efficiency.csv; none where there is no such file. Raises UserError."""
    found = []
    for number, row in _rows(root / EFFICIENCY):
        value = _number(row["value"], f"{root / EFFICIENCY}, line {number}", 0, math.inf)
        length = int(row["length"]) if row["length"] else None
        what, model, name, metric = (row[key] for key in ("table", "architecture", "name", "metric"))
        found.append(Efficiency(what, model, name, metric, length, value, row["hardware"], row["source"]))
    return found


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
            raise UserError(f"{path}, line {number}: another number of columns than the header")
    return rows


def _number(text: str, where: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{where}: {text!r} is not a number from {low:g} to {high:g}")
    return value
