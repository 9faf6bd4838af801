"""Comparison of two runs: paired difference on the same test examples, and settings that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra.errors import UserError, unknown
from lra.reports.table import Table, TableCell
from lra.results import result
from lra.results.collection import Collection, Predictions, load_run
from lra.results.official import differences, recipe_settings
from lra.results.record import RunRecord
from lra.results.statistics import Estimate, difference_of_means, mcnemar, paired_difference


@dataclass(frozen=True)
class Comparison:
    """Two runs a and b on one test set.

    difference: accuracy of a minus that of b, with a 95 % interval over test examples; p: p value of McNemar's exact
    test of equal accuracy; only_a, only_b: number of test examples that only one of them predicts correctly. All four
    are None if the runs were not tested on the same examples. fields: setting -> (value in a, value in b), for settings
    that differ.
    """

    a: RunRecord
    b: RunRecord
    fields: Mapping[str, tuple[str, str]]
    difference: Estimate | None = None
    p: float | None = None
    only_a: int | None = None
    only_b: int | None = None

    def __str__(self) -> str:
        """The difference in one line, and a second line if the runs have different sources."""
        return "\n".join(filter(None, (self._difference(), self.source)))

    def _difference(self) -> str:
        accuracies = f"{100 * self.a.test.accuracy:.2f} % and {100 * self.b.test.accuracy:.2f} %"
        if self.difference is None:
            return f"accuracy {accuracies}; not tested on the same examples, so there is no paired difference"
        d = self.difference
        return (
            f"accuracy {accuracies}: difference {100 * d.mean:+.2f} points, 95 % interval [{100 * d.low:+.2f}, "
            f"{100 * d.high:+.2f}], p = {self.p:.3g} (McNemar); of {self.a.test.n:,} test examples only the first is "
            f"right on {self.only_a:,}, only the second on {self.only_b:,}. This holds for these two trained models, "
            "not for other seeds."
        )

    @property
    def source(self) -> str:
        """One line on the source files of a user's class that differ; empty if none does."""
        if self.a.architecture != self.b.architecture or self.a.source_key == self.b.source_key:
            return ""
        one, two = (run.source.files if run.source else {} for run in (self.a, self.b))
        files = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
        return f"another source: {', '.join(files) or 'not recorded'}; these are two models, not two runs of one"

    def table(self) -> Table:
        """The fields that differ."""
        rows = [[TableCell(text) for text in (name, *values)] for name, values in self.fields.items()]
        return Table("Settings that differ", ("field", "first", "second"), rows)


def compare(a: RunRecord | Path | str, b: RunRecord | Path | str, collection: Collection | None = None) -> Comparison:
    """Compare two runs. a, b: records, paths of result files, or ids (or their unique beginnings) of runs in
    `collection`, by default of the results folder. Raises UserError for one that does not exist or is damaged."""
    (first, one), (second, two) = (_load(run, collection) for run in (a, b))
    fields = differences(_fields(first), _fields(second))
    same_data = first.task == second.task and first.data.checksum == second.data.checksum
    if one is None or two is None or not same_data or not np.array_equal(one.example, two.example):
        return Comparison(first, second, fields)
    return Comparison(
        first, second, fields, paired_difference(one.correct, two.correct), mcnemar(one.correct, two.correct),
        int((one.correct & ~two.correct).sum()), int((two.correct & ~one.correct).sum()),
    )  # fmt: skip


Rung = list[tuple[RunRecord, Predictions | None]]
"""Runs that differ in the seed only."""
LADDER = ("architecture", "seeds", "params", "FLOP", "score", "difference", "low", "high", "over")
LADDER_NOTE = (
    "score: {unit}. difference: to the row before, with the ends of its 95 % interval: over seeds (Welch's t) if both "
    "rows have two or more runs, else over test examples of the first run of each, without the variation between "
    "seeds. FLOP: of training, forward and backward at full length"
)
EQUAL = 1.1
"""Ratio of compute up to which the rows of a ladder count as equal."""


def ladder(runs: Sequence[RunRecord | Path | str], collection: Collection | None = None) -> Table:
    """A row for each architecture and its settings, in the order given, with the difference to the row before.

    runs: as in `compare`; runs that differ only in the seed are one row. Raises UserError for fewer than two rows and
    for runs of different tasks, protocols or data.
    """
    steps: dict[tuple[str, str], Rung] = {}
    if collection is None and not all(_is_file(run) for run in runs):
        collection = Collection.read(result.folder(), *result.PLACES)
    for record, predictions in (_load(run, collection) for run in runs):
        steps.setdefault((record.architecture, record.recipe_hash), []).append((record, predictions))
    rows = list(steps.values())
    if len(rows) < 2:
        raise UserError("a ladder has at least two rows: runs of different architectures or settings")
    first = rows[0][0][0]
    for record, _ in (run for row in rows for run in row):
        if (other := _tested(record)) != (own := _tested(first)):
            raise UserError(f"{record.id} was tested on {' '.join(other)}, {first.id} on {' '.join(own)}")
    in_bits = all(record.test.bits is not None for row in rows for record, _ in row)
    cells = [
        _rung(row, before, in_bits, len({name for name, _ in steps}) < len(rows))
        for row, before in zip(rows, [None, *rows[:-1]], strict=True)
    ]
    compute = [work for row in rows if (work := _compute(row[0][0]))]
    notes = [LADDER_NOTE.format(unit="bits per token, lower is better" if in_bits else "test accuracy in %")]
    if len(compute) == len(rows) and (ratio := max(compute) / min(compute)) > EQUAL:
        notes.append(f"compute is not equal: it differs by a factor of {ratio:.2f} between rows")
    title = f"{first.task} ({first.protocol.name}), recipe {first.recipe.name}: step by step"
    return Table(title, LADDER, [[TableCell(text) for text in row] for row in cells], notes)


def _rung(row: Rung, before: Rung | None, in_bits: bool, with_hash: bool) -> list[str]:
    record, digits = row[0][0], 3 if in_bits else 2
    scores, compute = _scores(row, in_bits), _compute(record)
    label = f"{record.architecture} #{record.recipe_hash[:6]}" if with_hash else record.architecture
    shown = [
        label, str(len(row)), f"{record.parameters:,}", f"{compute:.3g}" if compute else "-",
        f"{sum(scores) / len(scores):.{digits}f}",
    ]  # fmt: skip
    change = None if before is None else _change(row, before, in_bits)
    if change is None:
        return [*shown, "-", "-", "-", "-"]
    return [*shown, *(f"{number:+.{digits}f}" for number in (change.mean, change.low, change.high)), change.source]


def _change(row: Rung, before: Rung, in_bits: bool) -> Estimate | None:
    """The difference of two rows in the unit of their scores; None if it has no interval."""
    if len(row) > 1 and len(before) > 1:
        return difference_of_means(_scores(row, in_bits), _scores(before, in_bits))
    (a, one), (b, two) = row[0], before[0]
    if in_bits:
        halves = [None if run.test.bits_high is None else run.test.bits_high - (run.test.bits or 0.0) for run in (a, b)]
        if None in halves:
            return None
        # the interval of unpaired examples, which is at least as wide
        mean, half = (a.test.bits or 0.0) - (b.test.bits or 0.0), math.hypot(*(h for h in halves if h is not None))
        return Estimate(mean, mean - half, mean + half, 1, "test set")
    if one is None or two is None or not np.array_equal(one.example, two.example):
        return None
    d = paired_difference(one.correct, two.correct)
    return Estimate(100 * d.mean, 100 * d.low, 100 * d.high, 1, d.source)


def _scores(row: Rung, in_bits: bool) -> list[float]:
    return [(record.test.bits or 0.0) if in_bits else 100 * record.test.accuracy for record, _ in row]


def _compute(record: RunRecord) -> float:
    """FLOPs of training; 0 if they are unknown."""
    return (record.flops.forward_backward or 0.0) * record.speed.examples


def _tested(record: RunRecord) -> tuple[str, ...]:
    return record.task, record.protocol.name, record.data.checksum[:8]


def find(collection: Collection, name: str) -> RunRecord:
    """The record with an id, or with the only id that begins like that. Raises UserError."""
    by_id = {record.id: record for record in collection.records}
    matches = [name] if name in by_id else [identity for identity in by_id if identity.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"{len(matches)} run ids begin with {name!r}: {', '.join(matches[:5])}; give more of the id")
    if not matches:
        raise unknown("run", name, by_id)
    return by_id[matches[0]]


def _load(run: RunRecord | Path | str, collection: Collection | None) -> tuple[RunRecord, Predictions | None]:
    if not isinstance(run, RunRecord) and _is_file(run):
        return load_run(Path(run))
    collection = collection or Collection.read(result.folder(), *result.PLACES)
    record = run if isinstance(run, RunRecord) else find(collection, str(run))
    return record, collection.predictions.get(record.id)


def _is_file(run: RunRecord | Path | str) -> bool:
    return isinstance(run, Path) or (isinstance(run, str) and run.endswith(".json"))


def _fields(record: RunRecord) -> dict[str, str]:
    """The properties of a run that a comparison shows, without timings, which always differ."""
    facts = {
        "task": record.task, "architecture": record.architecture, "protocol": record.protocol.name,
        "data": record.data.checksum[:8], "recipe": record.recipe.name, "recipe hash": record.recipe_hash[:8],
        "regime": record.regime, "direction": record.direction, "seed": str(record.seed),
        "parameters": str(record.parameters), "device": record.hardware, "commit": record.environment.commit.hash[:12],
        "threads": str(record.environment.threads or "-"),
    } | ({"source": record.source_key[:8]} if record.source else {})  # fmt: skip
    return facts | recipe_settings(record)
