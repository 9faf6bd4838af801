"""Loggers of a run: a CSV file always, and others by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lra.errors import UserError, unknown

CLASSES = {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger", "mlflow": "MLFlowLogger"}
"""Name, which is also the package that is needed -> class of lightning.pytorch.loggers."""


def check(names: Sequence[str]) -> None:
    """Raise UserError for a logger that does not exist or whose package is not installed."""
    for name in names:
        if name != "csv" and name not in CLASSES:
            raise unknown("logger", name, ("csv", *CLASSES))
        if name != "csv" and find_spec(name) is None:
            raise _missing(name, f"No module named {name!r}")


def create(names: Sequence[str], folder: Path, stage: str, resume_step: int | None) -> list[Any]:
    """The loggers of one stage of training, the CSV file first.

    folder: of the logs. stage: subfolder of the CSV file, "" for training proper. resume_step: optimiser steps done
    before, after which the CSV file is continued; None starts it anew. Raises UserError for a package that fails.
    """
    from lra.training.metrics_file import MetricsFile

    created: list[Any] = [MetricsFile(folder / stage / "metrics.csv", resume_step)]
    for name in names:
        if name == "csv":
            continue
        try:
            make = getattr(importlib.import_module("lightning.pytorch.loggers"), CLASSES[name])
            target = folder.resolve()
            target.mkdir(parents=True, exist_ok=True)
            options: dict[str, Any] = {"save_dir": target}
            if name == "mlflow":
                # MLflow takes a database and gives up plain files
                options = {
                    "tracking_uri": f"sqlite:///{target / 'mlflow.db'}",
                    "artifact_location": target.as_uri(),
                }
            created.append(make(**options))
        except ImportError as error:
            raise _missing(name, str(error).splitlines()[0]) from None
    return created


def _missing(name: str, reason: str) -> UserError:
    return UserError(f"--logger {name} needs the package {name}: `pip install {name}` ({reason})")
