"""The tables of the language tasks: bits per token of every run. They are no part of the leaderboard."""

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
    """What the rows of a table share: modified runs have one of their own."""
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
    contexts = sorted({name for run in runs for name in _bits_at(run)}, key=_low)
    lengths = sorted({length for run in runs for length in _longer(run)})
    columns = [*COLUMNS, *contexts, *(f"at {length:,}" for length in lengths), *MORE]
    # the order of a tuple is that of its bits
    rows = [(run.test.bits or 0.0, _row(run, contexts, lengths)) for run in runs]
    for name, bits in {name: bits for run in runs for name, bits in run.floor_bits.items()}.items():
        shown = [f"{name} (no sequence model)", f"{bits:.3f}", f"{2**bits:.2f}"]
        rows.append((bits, shown + ["-"] * (len(columns) - len(shown))))
    cells = [[TableCell(text) for text in row] for _, row in sorted(rows)]
    kind = ", modified runs" if first.changed else ""
    title = f"{first.task} ({first.protocol.name}), recipe {first.recipe.name}{kind}"
    return Table(title, columns, cells, [NOTE, *_length_notes(runs, contexts, lengths)])


def _low(context: str) -> int:
    return int(context.partition("-")[0])


def _longer(run: RunRecord) -> dict[int, Score | None]:
    """The scores at longer sequences, by length; None where they were not possible."""
    return {int(name.removeprefix("length-")): run.tests.get(name) for name in run.longer}


def _bits_at(run: RunRecord) -> dict[str, float]:
    """Bits by the number of tokens before: of the test, and beyond its length of the longest sequences."""
    scores = [score for _, score in sorted(_longer(run).items()) if score is not None]
    beyond = scores[-1].bits_at if scores else {}
    return {name: bits for name, bits in beyond.items() if _low(name) >= (run.protocol.length or 0)} | run.test.bits_at


def _length_notes(runs: list[RunRecord], contexts: list[str], lengths: list[int]) -> list[str]:
    if not lengths:
        return []
    trained = runs[0].protocol.length or 0
    beyond = ", ".join(name for name in contexts if _low(name) >= trained)
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


def _row(run: RunRecord, contexts: list[str], lengths: list[int]) -> list[str]:
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
        *(_number(_bits_at(run).get(name)) for name in contexts),
        *(_number(score.bits if (score := _longer(run).get(length)) else None) for length in lengths),
        f"{run.parameters:,}",
        str(run.seed),
    ]


def _number(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"
