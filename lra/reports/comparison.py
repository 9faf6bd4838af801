"""Comparison of two runs: how far apart they are on the same test examples, and which settings differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra.errors import UserError, unknown
from lra.reports.table import Table, TableCell
from lra.results import result
from lra.results.collection import Collection, Predictions, load_run
from lra.results.official import differences, recipe_settings
from lra.results.record import RunRecord
from lra.results.statistics import Estimate, mcnemar, paired_difference


@dataclass(frozen=True)
class Comparison:
    """Two runs a and b on one test set.

    difference: accuracy of a less that of b, with a 95 % interval over test examples; p: of McNemar's exact test that
    they are equally accurate; only_a, only_b: test examples that only one of them predicts correctly. All four are None
    if the runs were not tested on the same examples. fields: setting -> (value in a, value in b) where they differ.
    """

    a: RunRecord
    b: RunRecord
    fields: Mapping[str, tuple[str, str]]
    difference: Estimate | None = None
    p: float | None = None
    only_a: int | None = None
    only_b: int | None = None

    def __str__(self) -> str:
        """The difference in one line, and a second one where the runs are of two sources."""
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
        """One line on the files in which the sources of a user's class differ; empty if they are the same."""
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
    if isinstance(run, Path) or (isinstance(run, str) and run.endswith(".json")):
        return load_run(Path(run))
    collection = collection or Collection.read(result.folder(), *result.PLACES)
    record = find(collection, run) if isinstance(run, str) else run
    return record, collection.predictions.get(record.id)


def _fields(record: RunRecord) -> dict[str, str]:
    """What a reader may want to know of two runs beside their accuracy; no timings, which always differ."""
    facts = {
        "task": record.task, "architecture": record.architecture, "protocol": record.protocol.name,
        "data": record.data.checksum[:8], "recipe": record.recipe.name, "recipe hash": record.recipe_hash[:8],
        "regime": record.regime, "direction": record.direction, "seed": str(record.seed),
        "parameters": str(record.parameters), "device": record.hardware, "commit": record.environment.commit.hash[:12],
        "threads": str(record.environment.threads or "-"),
    } | ({"source": record.source_key[:8]} if record.source else {})  # fmt: skip
    return facts | recipe_settings(record)
