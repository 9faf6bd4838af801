"""The tables of the language tasks: bits per token of every run. They are not part of the leaderboard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lra.reports.table import Table, TableCell
from lra.results.record import RunRecord, Score

COLUMNS = ("architecture", "bits", "ppl")
MORE = ("params", "seed")
NOTE = (
    "bits, ppl: bits per token of the test split (tasks of this project: per byte) and perplexity; lower is better. "
    "±: half the 95 % interval over test documents; another seed may differ more. 16-63: mean bits of the tokens with "
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
    return [table for key in sorted(groups) for table in _tables(groups[key])]


def _tables(runs: list[RunRecord]) -> list[Table]:
    """The table of a group, and one of longer sequences if it has them."""
    first = runs[0]
    contexts = sorted({name for run in runs for name in run.test.bits_at}, key=_low)
    columns = [*COLUMNS, *contexts, *MORE]
    # sorted by bits, the first element of each tuple
    rows = [(run.test.bits or 0.0, _row(run, contexts)) for run in runs]
    for name, bits in {name: bits for run in runs for name, bits in run.floor_bits.items()}.items():
        shown = [f"{name} (no sequence model)", f"{bits:.3f}", f"{2**bits:.2f}"]
        rows.append((bits, shown + ["-"] * (len(columns) - len(shown))))
    cells = [[TableCell(text) for text in row] for _, row in sorted(rows)]
    kind = ", modified runs" if first.changed else ""
    title = f"{first.task} ({first.protocol.name}), recipe {first.recipe.name}{kind}"
    lengths = sorted({length for run in runs for length in _longer(run)})
    return [Table(title, columns, cells, [NOTE]), *([_length_table(title, runs, lengths)] if lengths else [])]


def _low(context: str) -> int:
    return int(context.partition("-")[0])


def _longer(run: RunRecord) -> dict[int, Score | None]:
    """The scores at longer sequences, by length; None where they were not possible."""
    return {int(name.removeprefix("length-")): run.tests.get(name) for name in run.longer}


def _bits_at(run: RunRecord) -> dict[str, float]:
    """Bits of tokens with more tokens before them than in training, by their number, in the longest sequences."""
    scores = [score for _, score in sorted(_longer(run).items()) if score is not None]
    beyond = scores[-1].bits_at if scores else {}
    return {name: bits for name, bits in beyond.items() if _low(name) >= (run.protocol.length or 0)}


def _length_table(title: str, runs: list[RunRecord], lengths: list[int]) -> Table:
    contexts = sorted({name for run in runs for name in _bits_at(run)}, key=_low)
    columns = ["architecture", "bits", *(f"at {length:,}" for length in lengths), *contexts, "seed"]
    rows = []
    for run in sorted(runs, key=lambda run: run.test.bits or 0.0):
        scores, beyond = _longer(run), _bits_at(run)
        numbers = [score.bits if (score := scores.get(length)) else None for length in lengths]
        shown = [run.test.bits, *numbers, *(beyond.get(name) for name in contexts)]
        rows.append([TableCell(text) for text in (run.architecture, *map(_number, shown), str(run.seed))])
    return Table(f"{title}: longer sequences", columns, rows, _length_notes(runs, contexts, lengths))


def _length_notes(runs: list[RunRecord], contexts: list[str], lengths: list[int]) -> list[str]:
    trained = runs[0].protocol.length or 0
    beyond = ", ".join(contexts)
    shown = ", ".join(f"{length:,}" for length in lengths)
    notes = [
        f"At {shown}: bits of the same documents in sequences of so many tokens, by the model trained on {trained:,}"
        + (f". {beyond}: in the longest of them" if beyond else "")
    ]
    ways: dict[str, list[str]] = {}
    for run in runs:
        for way in dict.fromkeys(run.longer.values()):
            ways.setdefault(way, []).append(run.architecture)
    return notes + [f"Longer sequences, {way}: {', '.join(dict.fromkeys(names))}" for way, names in ways.items()]


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
        *(_number(test.bits_at.get(name)) for name in contexts),
        f"{run.parameters:,}",
        str(run.seed),
    ]


def _number(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"
