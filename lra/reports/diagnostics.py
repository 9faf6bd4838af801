"""The diagnostic tasks: a table, and frames for the charts of the report. They are not part of the leaderboard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lra.reports import efficiency
from lra.reports.table import Table, TableCell
from lra.results import diagnosis
from lra.results.official import ABSENT, recipe_settings
from lra.results.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("task", "architecture", "whole %", "right %", "last %", "floor %", "reach", "steps", "seeds", "verdict")
NOTE = (
    "whole: examples with every scored position right, or the class, or a value within the task's tolerance; right: "
    "scored positions; last: the last scored position; all at the longest training length, mean over seeds. floor: "
    "right answers of the best rule without a sequence model, such as the majority class. reach: the longest test "
    "length with 90 % of the positions right, the shortest over seeds. Undecided: close to 90 %, on a known "
    "plateau, or still rising when the steps were used up"
)


@dataclass(frozen=True)
class Cell:
    """The runs of one architecture on one task, which differ in the seed only.

    row: "d0", "d1", ..., by which the report finds its evidence. label: the architecture with the settings that were
    changed, and the first digits of recipe and source where a task has two of these. column: the task, with its
    protocol where it has several.
    """

    row: str
    label: str
    column: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def family(self) -> str:
        return efficiency.family(self.first.architecture)

    @property
    def share(self) -> float:
        """Share of right answers at the training length, the mean over seeds."""
        return _mean([run.test.share for run in self.runs])

    @property
    def floor(self) -> float | None:
        """Share of right answers of the best rule without a sequence model, including a guess; None without one."""
        first = self.first
        return max([*first.floors.values(), *([] if first.chance is None else [first.chance])], default=None)

    @property
    def at_chance(self) -> bool:
        return all(run.at_chance for run in self.runs)

    @property
    def reach(self) -> str:
        """The longest test length that every seed reaches; "-" if the task has one length."""
        reached = [length for run in self.runs if (length := diagnosis.reach(run)) is not None]
        return str(min(reached)) if reached else "-"


def cells(records: Iterable[RunRecord]) -> list[Cell]:
    """Runs grouped by task, protocol, architecture and recipe. Of several runs with one seed only the newest counts."""
    grouped: dict[tuple[str, ...], dict[int, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started):
        key = (record.task, record.protocol.name, record.architecture, record.source_key, record.recipe_hash)
        grouped.setdefault(key, {})[record.seed] = record
    groups = [tuple(grouped[key].values()) for key in sorted(grouped)]
    protocols = Counter(task for task, _ in {(runs[0].task, runs[0].protocol.name) for runs in groups})
    names = [(runs[0].task, runs[0].protocol.name, runs[0].architecture + _changed(runs[0])) for runs in groups]
    times = Counter(names)
    made: list[Cell] = []
    for (task, protocol, name), runs in zip(names, groups, strict=True):
        source = f" source {runs[0].source_key[:6]}" if runs[0].source_key else ""
        digits = f" #{runs[0].recipe_hash[:6]}{source}" if times[task, protocol, name] > 1 else ""
        column = f"{task} ({protocol})" if protocols[task] > 1 else task
        made.append(Cell(f"d{len(made)}", name + digits, column, runs))
    return made


def table(records: Iterable[RunRecord], title: str = "Diagnostics") -> Table:
    """A row for each of `cells`; grey if no run is better than chance and the majority class."""
    listed = cells(records)
    rows = [[TableCell(text) for text in _row(cell)] for cell in listed]
    grey = frozenset(number for number, cell in enumerate(listed) if cell.at_chance)
    return Table(title, list(COLUMNS), rows, [NOTE] if rows else [], grey=grey)


def _row(cell: Cell) -> list[str]:
    first, tests = cell.first, [run.test for run in cell.runs]
    return [
        f"{first.task} ({first.protocol.name}{_changed(first)})",
        first.architecture,
        _percent([test.accuracy for test in tests]),
        _percent([test.share for test in tests]),
        _percent(_last(cell.runs)),
        _percent([] if cell.floor is None else [cell.floor]),
        cell.reach,
        f"{first.speed.steps or 0:,}",
        str(len(cell.runs)),
        verdicts(cell.runs),
    ]


def frame(listed: Sequence[Cell]) -> pd.DataFrame:
    """One row for each cell, as `charts.heatmap` takes them. Shares are in %."""
    import pandas as pd

    rows = [
        {"row": cell.row, "label": cell.label, "family": cell.family,
         "task": cell.column, "accuracy": round(100 * cell.share, 1),
         "whole": _percent([run.test.accuracy for run in cell.runs]), "last": _percent(_last(cell.runs)),
         "guess": _percent([] if cell.floor is None else [cell.floor]),
         "chance": cell.at_chance, "verdict": verdicts(cell.runs), "reach": cell.reach,
         "seeds": len(cell.runs), "steps": cell.first.speed.steps or 0}
        for cell in listed
    ]  # fmt: skip
    return pd.DataFrame(rows)


def lengths(listed: Sequence[Cell]) -> pd.DataFrame:
    """Right answers by test length, as `charts.by_test_length` takes them: a row for each cell and length, including
    that of training, for tasks with further lengths."""
    import pandas as pd

    columns = ["row", "label", "family", "task", "length", "accuracy", "seeds"]
    rows = [
        (cell.row, cell.label, cell.family, cell.column, length, round(100 * _mean(shares), 1), len(shares))
        for cell in listed
        for length, shares in _by_length(cell)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def guesses(listed: Sequence[Cell]) -> dict[str, float]:
    """Share of right answers of the best rule without a sequence model in %, by task."""
    return {cell.column: 100 * cell.floor for cell in listed if cell.floor is not None}


def _by_length(cell: Cell) -> Iterator[tuple[int, list[float]]]:
    shares: dict[int, list[float]] = {}
    for run in cell.runs:
        longer = [score for name, score in run.tests.items() if name.startswith("length-")]
        for score in [run.test, *longer] if longer else []:
            shares.setdefault(score.length or 0, []).append(score.share)
    yield from sorted(shares.items())


def verdicts(runs: Sequence[RunRecord]) -> str:
    """The verdict if all runs have the same, else the number of each: "solved 2, failed 1"."""
    words = [diagnosis.verdict(run).word for run in runs]
    known = ("solved", "undecided", "failed")
    if len(set(words)) == 1:
        return words[0]
    return ", ".join(f"{word} {words.count(word)}" for word in known if word in words)


def _changed(record: RunRecord) -> str:
    """Settings that differ from the shipped recipe, with their values: ", optim.lr 0.01"."""
    used = recipe_settings(record) if record.changed else {}
    return "".join(f", {key} {used.get(key, ABSENT)}" for key in record.changed or {})


def _last(runs: Sequence[RunRecord]) -> list[float]:
    return [run.test.last for run in runs if run.test.last is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * _mean(shares):.1f}" if shares else "-"
