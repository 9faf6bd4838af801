"""A training step of every architecture beside the median of its family: `python -m benchmarks families`.

Encoders of two layers, (8, 1,024, 128), float32; each in a fresh process. An architecture far above its family spends
its time in a loop that an operator of `kernels/` could replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import torch

from lra.operators.bench import machine_columns, write_csv
from lra.profiling import memory, profiler, timing
from lra.registry import architectures
from lra.results.profile import Cell, Timing

BATCH, LENGTH, D_MODEL, N_LAYERS = 8, 1024, 128, 2
SLOW = 2.0
"""Seconds of a step from which it is timed once."""
TIMEOUT = 600.0
NAME = "families-cpu"


def cell_of(name: str) -> Cell:
    return Cell(name, LENGTH, BATCH, D_MODEL, N_LAYERS, "bidirectional", 1.0, "", "float32")


def step(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Peak memory and time of a training step in this process."""
    memory.keep_freed()
    workload = profiler.Workload(cell, device)
    given = workload.inputs(cell.length)
    peak = profiler.memory_of(workload)["peak_bytes"]
    first = timing.time_once(lambda: workload.train(given), device)
    timed = Timing(first, first, first, 1)
    if first < SLOW:
        timed = timing.measure(lambda: workload.train(given), device, repeats=7, budget=cell.budget)
    parameters = sum(p.numel() for p in workload.model.parameters())
    return {"peak_bytes": peak, "parameters": parameters, **msgspec.structs.asdict(timed)}


def bench(names: Iterable[str], known: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows so far, after each architecture: those of `known` that another of `names` does not replace."""
    rows = {row["architecture"]: row for row in known.to_dict("records")}
    machine = machine_columns(torch.device("cpu"))
    for name in names:
        measured = profiler.in_process(step, cell_of(name), "cpu", TIMEOUT)
        row: dict[str, Any] = {"architecture": name, "family": architectures.family(name)}
        if "failed" in measured:
            row["failed"] = measured["failed"]
        else:
            times = {
                key: round(1e3 * measured[of], 1) for key, of in (("ms", "median"), ("low", "low"), ("high", "high"))
            }
            row |= times | {key: measured[key] for key in ("repeats", "parameters")}
            row["mib"] = round(measured["peak_bytes"] / 2**20)
        rows[name] = row | machine
        yield pd.DataFrame(rows.values()).convert_dtypes()


def beside_median(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows by family and time, with the time over the median of the family."""
    rows = rows.sort_values(["family", "ms"], ignore_index=True)
    return rows.assign(over_median=(rows["ms"] / rows.groupby("family")["ms"].transform("median")).round(2))


def read(root: Path) -> pd.DataFrame:
    """The rows on file below the results folder `root`."""
    path = root / "bench" / f"{NAME}.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["architecture"])


def write(rows: pd.DataFrame, root: Path) -> Path:
    return write_csv(beside_median(rows), NAME, root)
