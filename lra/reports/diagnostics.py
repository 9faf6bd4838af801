"""The table of the diagnostic tasks: one row for each task and architecture. They are no part of the leaderboard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lra.reports.table import Table, TableCell
from lra.results import diagnosis
from lra.results.record import RunRecord

COLUMNS = ("task", "architecture", "whole %", "right %", "last %", "chance %", "reach", "steps", "seeds", "verdict")
NOTE = (
    "whole: examples with every scored position right, or the class, or a value within the task's tolerance; right: "
    "scored positions; last: the last scored position; all at the longest training length, mean over seeds. reach: the "
    "longest test length with 90 % of the positions right, the shortest over seeds. Undecided: close to 90 %, on a "
    "known plateau, or still rising when the steps were used up"
)


def table(records: Iterable[RunRecord], title: str = "Diagnostics") -> Table:
    """A row for each task, protocol, recipe and architecture; runs that differ in the seed share one."""
    groups: dict[tuple[str, ...], dict[int, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started):
        key = (record.task, record.protocol.name, record.architecture, record.source_key, record.recipe_hash)
        groups.setdefault(key, {})[record.seed] = record
    rows = [_row(list(groups[key].values())) for key in sorted(groups)]
    return Table(title, list(COLUMNS), [[TableCell(text) for text in row] for row in rows], [NOTE] if rows else [])


def _row(runs: Sequence[RunRecord]) -> list[str]:
    first, tests = runs[0], [run.test for run in runs]
    reached = [length for run in runs if (length := diagnosis.reach(run)) is not None]
    changed = f", {', '.join(f'{key} {_used(first, key)}' for key in first.changed)}" if first.changed else ""
    return [
        f"{first.task} ({first.protocol.name}{changed})",
        first.architecture,
        _percent([test.accuracy for test in tests]),
        _percent([test.share for test in tests]),
        _percent([test.last for test in tests if test.last is not None]),
        _percent([] if first.chance is None else [first.chance]),
        str(min(reached)) if reached else "-",
        f"{first.speed.steps or 0:,}",
        str(len(runs)),
        verdicts(runs),
    ]


def verdicts(runs: Sequence[RunRecord]) -> str:
    """The verdict that all runs share, else how often there was which: "solved 2, failed 1"."""
    words = [diagnosis.verdict(run).word for run in runs]
    known = ("solved", "undecided", "failed")
    if len(set(words)) == 1:
        return words[0]
    return ", ".join(f"{word} {words.count(word)}" for word in known if word in words)


def _used(record: RunRecord, key: str) -> str:
    section, _, name = key.partition(".")
    return str(getattr(record.recipe, section, {}).get(name, "-"))


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}" if shares else "-"
