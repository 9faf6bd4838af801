"""From a recipe to a result: end to end on a tiny task, the same twice, when resumed and when restored."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from stopped_run import stopped_after

from lra.data import prepared_sets
from lra.data.batches import DeviceSet, EvaluationLoader
from lra.errors import Interrupted, UserError
from lra.registry import tasks
from lra.reports.ranking import Leaderboard
from lra.results import result
from lra.results.collection import Collection
from lra.results.record import AT_CHANCE
from lra.training import precision, sizes
from lra.training.request import Request, resolve
from lra.training.run import run
from lra.training.sizes import check_batches
from lra.training.trained_run import load

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "24", "train.evaluate_every": "8", "model.d_model": "16", "data.batch_size": "16",
    "model.n_layers": "1", "model.dropout": "0.1",
}  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def go(settings: dict[str, str] | None = None, architecture: str = "gru", **more: object) -> Path:
    request = Request(TINY, architecture, "quick", settings=SMALL | (settings or {}), **more)  # type: ignore[arg-type]
    return run(request, Console(quiet=True))


def weights(places: Path, number: int = 0) -> dict[str, torch.Tensor]:
    folder = sorted((places / "lra_runs").iterdir())[number]
    return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]


def test_a_run_writes_one_valid_record_with_its_predictions(places: Path) -> None:
    path = go()
    record = result.read(path)
    assert path.parent == places / "lra_results" / "smoke" / "tiny" / "gru"
    assert record.task == "tiny"
    assert record.test.n == 150
    saved = np.load(path.with_suffix(".npz"), allow_pickle=False)
    assert record.test.accuracy == (saved["prediction"] == saved["label"]).mean()
    assert (saved["example"] == np.arange(150)).all()
    assert record.speed.steps == 24
    assert record.speed.examples == 24 * 16
    assert (record.flops.forward_backward or 0) > (record.flops.forward or 0) > 0
    assert record.memory.peak_bytes > 0
    assert record.direction == "bidirectional"
    assert record.recipe.train["steps"] == 24


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(places: Path) -> None:
    first = result.read(go())
    before = weights(places)
    second = result.read(go())
    again = weights(places)
    assert first.test.accuracy == second.test.accuracy
    assert all(torch.equal(before[key], again[key]) for key in before)
    go(seed=1)
    other = weights(places, 1)
    assert any(not torch.equal(before[key], other[key]) for key in before)


@pytest.mark.parametrize("architecture", ["gru", "transformer", "s4d"])
@pytest.mark.parametrize("stop_at", [8, 13])
def test_an_interrupted_run_resumes_to_the_same_weights(architecture: str, stop_at: int, places: Path) -> None:
    # evaluating once, at the end, makes the best checkpoint the last weights
    settings = {"train.evaluate_every": "24"}
    go(settings, architecture)
    whole = weights(places)
    with stopped_after(stop_at), pytest.raises(Interrupted, match=f"step {stop_at} of 24"):
        go(settings, architecture)
    record = result.read(go(settings, architecture, resume=True))
    resumed = weights(places)
    assert record.resumed is True
    assert record.speed.steps == 24
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_run_at_chance_is_labelled_and_one_that_left_it_is_not(places: Path) -> None:
    assert result.read(go({"train.steps": "1", "optim.lr": "1e-9"})).collapsed == AT_CHANCE
    assert result.read(go({"train.steps": "60", "optim.lr": "0.03"})).collapsed == ""


def test_a_time_limit_stops_with_a_checkpoint(places: Path) -> None:
    with pytest.raises(Interrupted, match="time limit"):
        go(time_limit=0.0)
    assert list((places / "lra_runs").glob("*/checkpoints/last.ckpt"))
    assert not list(places.rglob("*.json.*"))


def test_resuming_nothing_or_another_recipe_is_refused(places: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        go(resume=True)


def test_a_saved_model_scores_the_same_in_a_fresh_process(places: Path) -> None:
    record = result.read(go({"train.steps": "60", "optim.lr": "0.01"}))
    folder = next((places / "lra_runs").iterdir())
    code = f"import lra; run = lra.load({str(folder)!r})\nprint(run.evaluate().correct, run.record.id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(record.test.correct), record.id]


def test_padding_and_company_do_not_change_predictions(places: Path) -> None:
    go(architecture="transformer")
    model = load(next((places / "lra_runs").iterdir())).model
    found = prepared_sets.load_prepared(TINY)
    data = DeviceSet.of(found.split("test"), found.protocol, torch.device("cpu"))
    with torch.no_grad():
        together = torch.cat([model(b)[b.example.argsort()] for b in EvaluationLoader(data, 150)])
        alone = torch.cat([model(data.batch(np.array([i]))) for i in range(20)])
    torch.testing.assert_close(together[:20], alone, atol=1e-5, rtol=1e-5)


def test_ctrl_c_says_how_to_resume_and_leaves_nothing_half_written(places: Path) -> None:
    command = [
        sys.executable, "-m", "lra.cli", "run", TINY, "gru", "--recipe", "quick",
        "--set", "train.steps=100000", "--set", "model.d_model=8", "--set", "train.evaluate_every=50000",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = places / "lra_runs"
    _until(lambda: any(p.stat().st_size > 200 for p in log.glob("*/log/metrics.csv")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "resume with: lra run" in errors
    assert "--resume" in errors
    assert list(log.glob("*/checkpoints/last.ckpt"))
    assert (
        not (places / "lra_results" / "runs" / "tiny").exists()
        or not list(places.rglob("*.json"))
        or all(json.loads(p.read_text()) for p in places.rglob("*.json"))
    )


def _until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


class Pair(torch.nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.map(x), x


def test_what_cannot_run_is_one_line(places: Path) -> None:
    for settings, architecture, says in (
        ({"model.d_model": "1000000"}, "gru", r"model\.d_model=1000000 .* needs more than"),
        ({}, Pair, r"Pair: its first batch raised ValueError: Pair returned a tuple"),
        ({"encoder.layer": "{...}"}, Pair, r"encoder\.layer is '{\.\.\.}'; a table"),
    ):
        with pytest.raises(UserError, match=says) as error:
            go(settings, architecture)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    recipe, _ = resolve(Request(TINY, "gru", "quick", settings={"data.batch_size": "1000000000"}))
    with pytest.raises(UserError, match=r"data\.batch_size=1000000000 .* needs more than"):
        check_batches(recipe, "cpu", np.full((10**7, 1), 4000), 100)
    check_batches(recipe, "cpu", np.full((100, 1), 4000), 100)
    assert not list(places.rglob("recipe.json"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.d_model": "1000000"}, "model.d_model="),
        ({"model.n_layers": "1000000000"}, "model.n_layers="),
        ({"data.batch_size": "1000000000"}, "data.batch_size="),
        ({"data.evaluation_batch_size": "1000000000"}, "data.evaluation_batch_size="),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(
    settings: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "total_memory", lambda device: 2**33)
    recipe, _ = resolve(Request(TINY, "gru", "quick", settings=settings))

    def refused(key: str = "", value: int = 0) -> str | None:
        section = key.partition(".")[0]
        changed = recipe if not key else replace(
            recipe, **{section: replace(getattr(recipe, section), **{key.partition(".")[2]: value})}
        )  # fmt: skip
        try:
            sizes.check_weights(changed, "cpu")
            if says.startswith("data"):
                sizes.check_batches(changed, "cpu", np.full((10**7, 1), 4000), 10**7)
        except UserError as error:
            return str(error)
        return None

    message = refused()
    assert message is not None
    assert "\n" not in message
    offer = re.search(rf"at most {says}(\d+) can fit", message)
    assert offer is not None, message
    key, most = says.rstrip("="), int(offer[1])
    assert refused(key, most) is None
    assert refused(key, most + most // 100 + 1) is not None


def test_an_encoder_whose_own_size_cannot_fit_is_refused_before_it_is_allocated(places: Path) -> None:
    with pytest.raises(UserError, match=r"a model of [\d,]+ parameters needs more than .* can fit"):
        go({"encoder.block.expand": "100000000"}, "transformer")
    assert not (places / "lra_cache").exists()


def test_fp16_needs_a_gpu(places: Path) -> None:
    settings = {"train.precision": "fp16"}
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="fp16 needs a GPU, and PyTorch finds none here; use bf16 or 32"):
            go(settings)
    recipe, _ = resolve(Request(TINY, "gru", "quick", settings=settings))
    assert precision.of_run(recipe, torch.device("cuda")) == "16-mixed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_in_fp16(places: Path) -> None:
    assert result.read(go({"train.precision": "fp16"})).environment.precision == "16-mixed"


def test_two_seeds_make_one_row_with_an_interval(places: Path) -> None:
    go()
    go(seed=1)
    collection = Collection.read(places / "lra_results", "smoke")
    board = Leaderboard.of(collection)
    assert not collection.problems
    assert not board.groups
    ((group, row, settings),) = ((entry.group, entry.row, entry.settings) for entry in board.modified)
    assert settings.status == "modified"
    assert {"model.d_model", "train.steps"} <= set(settings.changed)
    assert row.seeds == 2
    assert row.accuracy.source == "seeds"
    assert tasks.get(TINY).cls.name == group.task


def test_a_run_without_a_terminal_says_how_far_it_is(places: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=200)
    run(Request(TINY, "gru", "quick", settings=SMALL), console)
    lines = [line for line in console.export_text().splitlines() if line.startswith("step ")]
    assert [line.partition(",")[0] for line in lines] == ["step 8 of 24", "step 16 of 24", "step 24 of 24"]
    numbers = r"validation accuracy [\d.]+ %, validation loss [\d.]+"
    assert re.fullmatch(rf"step 8 of 24, {numbers}, 0:0\d:\d\d left", lines[0])
