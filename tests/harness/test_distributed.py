"""Two processes do what one does: the same losses on the same global batch, and every example scored once."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lra.data.batches import EvaluationLoader, Sampler, Shard, TrainingLoader
from lra.results import result

HERE = Path(__file__).parents[1]
TINY, SENTENCES = f"{HERE / 'tiny_task.py'}:Tiny", f"{HERE / 'sentences.py'}:Sentences"
SETTINGS = ("train.steps=30", "train.evaluate_every=10", "model.d_model=16", "data.batch_size=16", "model.n_layers=1",
            "data.validation_examples=99", 'train.precision="32"')  # fmt: skip


class Listed:
    """Stands for a set on a device: a batch is the examples it was asked for."""

    resident, lengths = True, np.random.default_rng(0).integers(5, 25, (101, 1))

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, examples: np.ndarray) -> np.ndarray:
        return examples


def test_shares_of_a_batch_are_the_batch_and_of_a_sweep_the_set() -> None:
    data: Any = Listed()
    alone = list(TrainingLoader(data, Sampler(data.lengths, 12, 0), 8))
    shares = [
        list(TrainingLoader(data, Sampler(data.lengths, 12, 0), 8, parts=2, shard=Shard(rank, 3))) for rank in range(3)
    ]
    for step, whole in enumerate(alone):
        parts = [part for share in shares for part in share[2 * step : 2 * step + 2]]
        assert all(len(part) == 2 for part in parts)
        assert sorted(np.concatenate(parts)) == sorted(whole)
    # 101 and 97: shards of 33 and 34, and of 32 and 33
    for examples in (101, 97):
        data.lengths = data.lengths[:examples]
        swept = [list(EvaluationLoader(data, 8, Shard(rank, 3))) for rank in range(3)]
        assert sorted(e for share in swept for batch in share for e in batch) == list(range(examples))
        assert len({len(share) for share in swept}) == 1


def launched(
    folder: Path, *more: str, task: str = TINY, architecture: str = "gru", stopped_at: int = 0
) -> dict[str, Any]:
    """A run as `lra run` does it. stopped_at: a step after which it is stopped first, and resumed."""
    environment = os.environ | {
        "LRA_CACHE": str(folder.parent / "cache"), "LRA_RESULTS": str(folder / "results"),
        "LRA_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = ["run", task, architecture, "--recipe", "quick"]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    arguments += more

    def python(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False, timeout=300,
            env=environment, cwd=HERE.parent,
        )  # fmt: skip

    if stopped_at:
        stopped = python("tests.stopped_run", str(stopped_at), *arguments)
        assert f"stopped at step {stopped_at} of" in stopped.stderr
        arguments.append("--resume")
    done = python("lra.cli", *arguments)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "results").rglob("*.json")
    (log,) = (folder / "runs").rglob("metrics.csv")
    rows = list(csv.DictReader(log.read_text().splitlines()))
    return {
        "record": result.read(path), "predictions": np.load(path.with_suffix(".npz")),
        "loss": [float(row["loss"]) for row in rows if row["loss"]],
        "validation": [float(row["validation_accuracy"]) for row in rows if row["validation_accuracy"]],
        "validation loss": [float(row["validation_loss"]) for row in rows if row["validation_loss"]],
        "weights": torch.load(next((folder / "runs").rglob("best.ckpt")), weights_only=True)["state_dict"],
    }  # fmt: skip


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_and_score_as_one(tmp_path: Path) -> None:
    # AdamW that also refuses estimates of the curvature that the processes do not share
    adamw = ("--set", "optim.name=tests.curved:Curved")
    one, two = launched(tmp_path / "one", *adamw), launched(tmp_path / "two", *adamw, "--devices", "2")
    assert len(one["loss"]) == 3
    for curve in ("loss", "validation loss"):
        np.testing.assert_allclose(one[curve], two[curve], atol=1e-5, rtol=0)
    assert one["validation"] == two["validation"]
    for key, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][key], atol=1e-4, rtol=1e-4)
    assert two["record"].test.n == 150
    assert (two["predictions"]["example"] == np.arange(150)).all()
    assert (one["predictions"]["prediction"] == two["predictions"]["prediction"]).mean() > 0.98
    assert two["record"].speed.examples == one["record"].speed.examples
    where = two["record"].environment
    assert (where.devices, where.strategy) == (2, "ddp")


@pytest.mark.slow
def test_two_processes_carry_the_states_of_one(tmp_path: Path) -> None:
    stream = [
        part
        for setting in ("train.stream=true", "model.direction=causal", "data.batch_size=8", "data.train_examples=0")
        for part in ("--set", setting)
    ]  # fmt: skip
    one = launched(tmp_path / "one", *stream, task=SENTENCES)
    two = launched(tmp_path / "two", *stream, "--devices", "2", task=SENTENCES)
    resumed = launched(tmp_path / "resumed", *stream, "--devices", "2", task=SENTENCES, stopped_at=13)
    for curve in ("loss", "validation loss"):
        np.testing.assert_allclose(one[curve], two[curve], atol=1e-5, rtol=0)
        np.testing.assert_array_equal(two[curve], resumed[curve])
    assert two["record"].test.bits == pytest.approx(one["record"].test.bits, abs=1e-5)
    assert {name: score.n for name, score in two["record"].tests.items()} == {
        name: score.n for name, score in one["record"].tests.items()
    }
