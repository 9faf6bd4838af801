"""Loggers by name beside the CSV file, which is always there. Those of optional packages are skipped where missing."""

from __future__ import annotations

import csv
import importlib.util
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from lra.errors import UserError
from lra.training.request import Request
from lra.training.run import run

HERE = Path(__file__).parents[1]
TINY = f"{HERE / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "12", "train.evaluate_every": "6", "model.d_model": "8", "data.batch_size": "16",
    "model.n_layers": "1",
}  # fmt: skip
PACKAGES = ("tensorboard", "wandb", "mlflow")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def go(*loggers: str) -> None:
    run(Request(TINY, "gru", "quick", settings=SMALL, loggers=loggers), Console(quiet=True))


def launched(logger: str) -> None:
    """In a process of its own: these packages warn, thread and start services."""
    command = [sys.executable, "-m", "lra.cli", "run", TINY, "gru", "--recipe", "quick", "--logger", logger]
    command += [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stderr


def logged(places: Path) -> list[tuple[int, float]]:
    """Step and validation accuracy in the CSV file."""
    (log,) = places.rglob("metrics.csv")
    rows = csv.DictReader(log.read_text().splitlines())
    return [(int(r["step"]), float(r["validation_accuracy"])) for r in rows if r["validation_accuracy"]]


def test_csv_is_always_written_and_another_name_is_refused(places: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        go("wandbb")
    go("csv")
    assert len(logged(places)) == 2


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_in_one_line(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"--logger {name} needs the package {name}: `pip install {name}`") as error:
        go(name)
    assert "\n" not in str(error.value)


def test_tensorboard_has_what_the_csv_file_has(places: Path) -> None:
    pytest.importorskip("tensorboard")
    launched("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = places.rglob("events.out.tfevents*")
    kept = EventAccumulator(str(events)).Reload().Scalars("validation_accuracy")
    steps, values = zip(*logged(places), strict=True)
    assert [scalar.step for scalar in kept] == list(steps)
    assert [scalar.value for scalar in kept] == pytest.approx(list(values))


def test_wandb_keeps_a_run_without_a_network(places: Path) -> None:
    pytest.importorskip("wandb")
    launched("wandb")
    assert len(logged(places)) == 2
    (run_file,) = places.rglob("run-*.wandb")
    assert run_file.parent.name.startswith("offline-run-")
    assert b"validation_accuracy" in run_file.read_bytes()


def test_mlflow_has_what_the_csv_file_has(places: Path) -> None:
    pytest.importorskip("mlflow")
    launched("mlflow")
    (database,) = places.rglob("mlflow.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT step, value FROM metrics WHERE key = 'validation_accuracy' ORDER BY step")
        kept = rows.fetchall()
    steps, values = zip(*logged(places), strict=True)
    assert [step for step, _ in kept] == list(steps)
    assert [value for _, value in kept] == pytest.approx(list(values))
