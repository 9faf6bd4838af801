"""The efficiency table of the LRA paper: byte sequences of 1K to 4K, batch 32, relative to the Transformer.

The paper's own ratios, measured on its accelerator, stand beside it: ratios can be compared, machines cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lra.reports import efficiency
from lra.reports.efficiency import BASE, AnyProfile, measured, shape_of, title
from lra.reports.table import Table, TableCell
from lra.results import literature
from lra.results.profile import FailedProfile, Profile

TABLE, SPEED, MEMORY = "LRA efficiency", "train steps/s", "peak memory GB per device"
LENGTHS = {1024: "1K", 2048: "2K", 3072: "3K", 4096: "4K"}
COLUMNS = ("architecture", *LENGTHS.values())


def tables(profiles: Sequence[AnyProfile], root: Path) -> list[Table]:
    """Speed, then memory: one row per architecture, its ratios to the Transformer and [the published ones]."""
    known = {(p.cell.architecture, p.cell.length): p for p in measured(profiles)}
    published = {(e.name, e.length, e.metric): e.value for e in literature.efficiency(root) if e.table == TABLE}
    names = sorted({p.cell.architecture for p in profiles}, key=lambda n: (n != BASE, n))
    where = title(shape_of(profiles[0])) if profiles else "nothing measured"
    failed = [efficiency.failure(p) for p in profiles if isinstance(p, FailedProfile)]

    def cell(name: str, length: int, metric: str) -> TableCell:
        ours = {n: _value(known[n, length], metric) for n in (name, BASE) if (n, length) in known}
        theirs = {n: published[n, length, metric] for n in (name, BASE) if (n, length, metric) in published}
        beside = f" [{_ratio(theirs, name)}]" if name != BASE and _ratio(theirs, name) else ""
        return TableCell((_ratio(ours, name) or "-") + beside)

    made = []
    for metric, what in ((SPEED, "training steps/s"), (MEMORY, "peak memory")):
        lines = [[TableCell(name), *(cell(name, length, metric) for length in LENGTHS)] for name in names]
        notes = [*failed, NOTE] if metric == MEMORY else []
        base = {short: known[BASE, n] for n, short in LENGTHS.items() if (BASE, n) in known}
        told = ", ".join(f"{_told(p, metric)} at {short}" for short, p in base.items())
        made.append(Table(f"LRA's table, {what}: {where}", COLUMNS, lines, [f"the Transformer: {told}", *notes]))
    return made


NOTE = "over the Transformer's; [published]: Tay et al. 2020, Table 2, on 4 x 4 TPU v3, with its own model sizes"


def _told(p: Profile, metric: str) -> str:
    value = _value(p, metric)
    return f"{value:.3g} steps/s" if metric == SPEED else f"{value / 2**20:,.0f} MiB"


def _value(p: Profile, metric: str) -> float:
    return 1 / p.seconds.train.median if metric == SPEED else p.memory.peak_bytes


def _ratio(values: dict[str, float], name: str) -> str:
    return f"{values[name] / values[BASE]:.2f}" if {name, BASE} <= set(values) else ""
