"""Killed runs go on to the same weights, bit for bit; what cannot be resumed says why in one line."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from stopped_run import stopped_after

from lra.errors import Interrupted, UserError
from lra.registry import architectures
from lra.results import result
from lra.training import checkpoint
from lra.training.callbacks import SCHEMA, Stop, ThroughputMeter
from lra.training.metrics_file import MetricsFile
from lra.training.module import Training
from lra.training.placement import Placement
from lra.training.request import Request
from lra.training.run import run

HERE = Path(__file__).parents[1]
TINY = f"{HERE / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "12", "train.evaluate_every": "6", "model.d_model": "8", "data.batch_size": "16",
    "model.n_layers": "1", "model.dropout": "0.1",
}  # fmt: skip
# switched on beside the plain run: each keeps state of its own that a checkpoint has to hold
MORE = (
    "gru+optim.ema=0.9+train.accumulate=2",
    "gru+optim.schedule=plateau+optim.plateau_patience=0+optim.name=muon",
    "s4d+train.checkpointing=true+train.curriculum_length=15+train.curriculum_steps=20",
    "gru+pretrain.objective=mlm+pretrain.steps=6",
)
CASES = [*(n for n in ("s4d", "gru", "transformer", "switch") if n in architectures.names()), *MORE]
# of 24, after the first of three validations; the same in every run
KILLED_AT = {case: random.Random(case).randint(9, 23) for case in CASES}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"LRA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", TINY, str(folder), *(f"{c}@{at}" for c, at in KILLED_AT.items())],
        capture_output=True, text=True, check=False, timeout=600, env=environment, cwd=HERE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["architecture"]: one | {"errors": done.stderr} for one in found}


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_by_sigkill_resumes_to_the_same_weights(case: str, killed: dict[str, dict[str, Any]]) -> None:
    said = killed[case]
    assert said["signal"] == 9
    assert said["ends"] == [0, 0], said["errors"]
    # the validation of a step comes after it, and with it the checkpoint
    assert said["kept"] == [(KILLED_AT[case] - 1) // 8 * 8]
    assert said["weights"]
    assert said["predictions"]
    assert said["steps"] == [24, 24]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def go(settings: dict[str, str] | None = None, **more: Any) -> Path:
    return run(Request(TINY, "gru", "quick", settings=SMALL | (settings or {}), **more), Console(quiet=True))


def interrupted(at: int = 7, **more: Any) -> None:
    with stopped_after(at), pytest.raises(Interrupted, match=f"step {at} of"):
        go(**more)


def test_a_run_stopped_where_a_validation_is_due_does_it_first(places: Path) -> None:
    whole = result.read(go())
    interrupted(at=6)
    (last,) = places.rglob("last.ckpt")
    assert [point["step"] for point in torch.load(last, weights_only=True)["curve"]] == [6]
    again = result.read(go(resume=True))
    assert again.curve == whole.curve
    assert again.validation.best_step == whole.validation.best_step


def test_no_checkpoint_leaves_a_validation_out(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = result.read(go()).curve
    monkeypatch.setattr("lra.training.callbacks.CHECKPOINT_EVERY", timedelta(0))

    def dying(self: Stop, trainer: Any, module: Any) -> None:
        raise RuntimeError("the test")

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "on_validation_start", dying)
        with pytest.raises(RuntimeError, match="the test"):
            go()
    (last,) = places.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 5
    assert result.read(go(resume=True)).curve == whole


def test_a_checkpoint_of_another_schema_or_recipe_is_one_line(places: Path) -> None:
    interrupted()
    (last,) = places.rglob("last.ckpt")
    good = torch.load(last, weights_only=True)
    assert good["lra"]["schema"] == SCHEMA
    for key, value, says in (
        ("schema", SCHEMA - 1, f"schema {SCHEMA - 1}; this version reads {SCHEMA}"),
        ("recipe", "0" * 64, "written by another recipe"),
        ("random", good["lra"]["random"] * 2, "written by 2 processes"),
    ):
        checkpoint.write(good | {"lra": good["lra"] | {key: value}}, last)
        with pytest.raises(UserError, match=says) as error:
            go(resume=True)
        assert "\n" not in str(error.value)
    last.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        go(resume=True)
    checkpoint.write(good, last)
    go(resume=True)


def test_resuming_with_other_settings_finds_nothing(places: Path) -> None:
    interrupted()
    with pytest.raises(UserError, match="nothing to resume"):
        go({"optim.lr": "0.5"}, resume=True)


def test_checkpoints_may_live_elsewhere_and_only_best_and_last_stay(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = places / "elsewhere"
    interrupted(checkpoint_dir=elsewhere)
    assert {p.name for p in elsewhere.rglob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    assert not list((places / "lra_runs").rglob("*.ckpt"))
    # another machine has the checkpoints and nothing else
    monkeypatch.setenv("LRA_RUNS", str(places / "other_runs"))
    go(checkpoint_dir=elsewhere, resume=True)
    assert {p.name for p in elsewhere.rglob("*.ckpt")} == {"best.ckpt"}


def test_a_run_that_goes_on_under_another_path_remembers_its_best(places: Path) -> None:
    interrupted(checkpoint_dir=places / "here")
    (places / "here").rename(places / "there")
    (last,) = places.rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    (best,) = (state for name, state in saved["callbacks"].items() if "validation_accuracy" in name)
    # a score that no later one beats
    (path,) = best["best_k_models"]
    best |= {key: torch.tensor(1.0) for key in ("best_model_score", "kth_value")}
    best["best_k_models"] = {path: torch.tensor(1.0)}
    checkpoint.write(saved, last)
    record = result.read(go(checkpoint_dir=places / "there", resume=True))
    assert [point.step for point in record.curve] == [6, 12]
    assert record.validation.best_step == 6


def test_a_resumed_run_counts_the_time_of_its_earlier_legs(places: Path) -> None:
    interrupted()
    (last,) = places.rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    (meter,) = (state for name, state in saved["callbacks"].items() if name.startswith("ThroughputMeter"))
    assert 0 < meter["earlier"] < 600
    meter["earlier"] += 1000.0
    checkpoint.write(saved, last)
    assert 1000 < result.read(go(resume=True)).wall_seconds < 1600


def test_a_run_resumed_twice_counts_every_leg() -> None:
    meter = ThroughputMeter(1)
    meter.load_state_dict(meter.state_dict() | {"earlier": 1000.0})
    assert 1000 < meter.state_dict()["earlier"] < 1600


def test_the_log_of_a_resumed_run_is_that_of_one_never_stopped(places: Path) -> None:
    def logged() -> list[tuple[str, str]]:
        (log,) = places.rglob("metrics*.csv")
        return [(row["step"], row["validation_loss"]) for row in csv.DictReader(log.read_text().splitlines())]

    go()
    whole = logged()
    interrupted()
    assert logged() == whole[:2]
    go(resume=True)
    assert logged() == whole
    assert [step for step, _ in whole] == ["5", "5", "11", "11"]


def test_rows_logged_after_the_checkpoint_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log" / "metrics.csv"
    first = MetricsFile(path)
    for step, loss in ((5, 1.0), (9, 0.5)):
        first.log_metrics({"loss": loss, "epoch": 0}, step)
    with path.open("a") as file:
        file.write("0,0.")
    MetricsFile(path, 7).log_metrics({"loss": 0.4, "epoch": 0, "more": torch.tensor(2.0)}, 9)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["step"], row["loss"], row["more"]) for row in rows] == [("5", "1.0", ""), ("9", "0.4", "2.0")]
    MetricsFile(path).log_metrics({"loss": 3.0}, 1)
    assert path.read_text().splitlines() == ["loss,step", "3.0,1"]


def test_a_finished_run_is_not_resumed(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = go()
    before = path.stat().st_mtime_ns
    assert run(Request(TINY, "gru", "quick", settings=SMALL, resume=True), Console(width=500)) == path.resolve()
    assert "this run is finished" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    assert list(places.rglob("tiny/gru/*.json")) == [path]
    path.unlink()
    with pytest.raises(UserError, match=r"its result .* is gone"):
        go(resume=True)


def test_a_tie_in_accuracy_goes_to_the_lower_loss(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {6: 2.0, 12: 1.0, 18: 3.0}

    def validation_step(self: Training, batch: Any, _: int) -> None:
        self.validation_accuracy.update(torch.ones(len(batch.labels)))
        self.validation_loss.update(torch.tensor(losses[self.trainer.global_step]))

    monkeypatch.setattr(Training, "validation_step", validation_step)
    assert result.read(go({"train.steps": "18"})).validation.best_step == 12
    # the loss to beat is in the checkpoint
    interrupted(settings={"train.steps": "18"}, at=13)
    assert result.read(go({"train.steps": "18"}, resume=True)).validation.best_step == 12


def test_more_devices_than_there_are_are_refused(places: Path) -> None:
    with pytest.raises(UserError, match="this machine has"):
        go(placement=Placement(devices=4096))
    with pytest.raises(UserError, match="one of auto"):
        go(placement=Placement(strategy="dpp"))
    with pytest.raises(UserError, match="not divisible"):
        go({"train.accumulate": "3"})


def test_a_loss_that_is_no_number_names_step_and_module_and_keeps_the_checkpoint(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lra.model import Classifier

    plain, calls = Classifier.pool, []

    def breaking(self: Classifier, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append(self.training)
        if sum(calls) > 9:
            with torch.no_grad():
                self.head.weight.fill_(float("inf"))  # type: ignore[operator]
        return plain(self, x, mask)

    monkeypatch.setattr(Classifier, "pool", breaking)
    with pytest.raises(UserError, match=r"the loss is nan at step 10 \(non-finite weights in head.weight\)"):
        go()
    (last,) = places.rglob("last.ckpt")
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 6
    assert all(torch.isfinite(v).all() for v in kept["state_dict"].values())


def test_the_module_with_the_first_non_finite_output_is_named(places: Path) -> None:
    from lra.config.recipe import resolve
    from lra.data import prepared_sets
    from lra.data.batches import DeviceSet
    from lra.training.callbacks import locate_nonfinite
    from lra.training.construction import build

    prepared = prepared_sets.load_prepared(TINY)
    found, _ = resolve("quick", TINY, "gru", SMALL)
    model = build(found, architectures.get("gru"), prepared.task, prepared.protocol, 0)
    batch = DeviceSet.of(prepared.split("train"), prepared.protocol, torch.device("cpu")).batch(torch.arange(4).numpy())
    assert locate_nonfinite(model, batch) == "every module's output is finite"
    model.get_submodule("encoder.layers.0.norm").register_forward_hook(lambda *a: a[-1] / 0)
    assert locate_nonfinite(model, batch) == "non-finite output in encoder.layers.0.norm"


def test_out_of_memory_says_what_to_lower(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.training import stages

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stages, "train", full)
    with pytest.raises(UserError, match=r"16 examples at once: raise train\.accumulate"):
        go()
