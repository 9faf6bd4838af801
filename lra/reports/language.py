"""The tables of the language tasks: bits per token of every run. They are not part of the leaderboard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lra.reports.table import Table, TableCell
from lra.results.record import RunRecord

COLUMNS = ("architecture", "bits", "ppl")
MORE = ("params", "seed")
NOTE = (
    "bits, ppl: bits per token of the test split (imdb_lm: per byte) and perplexity; lower is better. ±: half the 95 % "
    "interval over test examples (imdb_lm: reviews); another seed may differ more. 16-63: mean bits of the tokens with "
    "16 to 63 tokens before them. No sequence model: counts of the training split, or gzip on the test split"
)


def group_of(record: RunRecord) -> tuple[Any, ...]:
    """Key of a table; modified runs have a table of their own."""
    data = (record.data.checksum, record.test.n)
    return record.task, record.protocol.name, record.recipe.name, bool(record.changed), *data


def tables(records: Iterable[RunRecord]) -> list[Table]:
    """A table for each task, protocol, data and recipe, with a row for each run and baseline, the best first."""
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return [_table(groups[key]) for key in sorted(groups)]


def _table(runs: list[RunRecord]) -> Table:
    first = runs[0]
    contexts = sorted({name for run in runs for name in run.test.bits_at}, key=lambda name: int(name.partition("-")[0]))
    columns = [*COLUMNS, *contexts, *MORE]
    # sorted by bits, the first element of each tuple
    rows = [(run.test.bits or 0.0, _row(run, contexts)) for run in runs]
    for name, bits in {name: bits for run in runs for name, bits in run.floor_bits.items()}.items():
        shown = [f"{name} (no sequence model)", f"{bits:.3f}", f"{2**bits:.2f}"]
        rows.append((bits, shown + ["-"] * (len(columns) - len(shown))))
    cells = [[TableCell(text) for text in row] for _, row in sorted(rows)]
    kind = ", modified runs" if first.changed else ""
    return Table(f"{first.task} ({first.protocol.name}), recipe {first.recipe.name}{kind}", columns, cells, [NOTE])


def _row(run: RunRecord, contexts: list[str]) -> list[str]:
    test = run.test
    changed = [
        f"{key} {getattr(run.recipe, key.partition('.')[0], {}).get(key.partition('.')[2], '-')}"
        for key in run.changed or {}
    ]
    half = "" if test.bits_high is None or test.bits is None else f" ± {test.bits_high - test.bits:.3f}"
    return [
        f"{run.architecture} ({', '.join(changed)})" if changed else run.architecture,
        "-" if test.bits is None else f"{test.bits:.3f}{half}",
        "-" if test.perplexity is None else f"{test.perplexity:.2f}",
        *(f"{test.bits_at[name]:.3f}" if name in test.bits_at else "-" for name in contexts),
        f"{run.parameters:,}",
        str(run.seed),
    ]
