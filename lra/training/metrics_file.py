"""The CSV file of a run's metrics: one continuous file, however often the run is resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lra.files import atomic


class MetricsFile(Logger):
    """A Lightning logger that writes `metrics.csv`, a row for each call, on disk when the call returns.

    Lightning's own CSV logger deletes the file of the earlier part when a run is resumed. This one keeps the rows of
    the steps before `resume_step`; later ones were logged after the checkpoint and will be logged again.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path, self.resume_step = path, resume_step
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        row: dict[str, Any] = {key: float(value) for key, value in metrics.items()} | {"step": step}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        if not self.columns:
            self._rewrite(self._earlier(), row)
        elif row.keys() - set(self.columns):
            self._rewrite(_read(self.path), row)
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the recipe is stored beside the log."""

    def _earlier(self) -> list[dict[str, Any]]:
        if self.resume_step is None or not self.path.is_file():
            return []
        # the row of step n is written after n + 1 optimiser steps
        return [
            row for row in _read(self.path) if (row.get("step") or "").isdigit() and int(row["step"]) < self.resume_step
        ]

    def _rewrite(self, rows: list[dict[str, Any]], row: Mapping[str, Any]) -> None:
        """Write every row under a header that has the columns of all of them."""
        self.columns = sorted({key for each in [*rows, row] for key in each})
        with atomic(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows([*rows, row])


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. A last row that was cut off by a kill is left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row and None not in row.values()]
