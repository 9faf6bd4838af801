"""Generated tasks: training batches that nobody stores, and a user's own task from a template to a row of the table."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from stopped_run import stopped_after
from typer.testing import CliRunner

from lra.cli.app import app
from lra.conformance import tasks as conformance
from lra.data import prepared_sets
from lra.data.batches import Shard, TrainingLoader
from lra.data.drawn import DrawnSet, training_set
from lra.data.module import DataModule
from lra.errors import Interrupted, UserError
from lra.registry import tasks
from lra.results import result
from lra.results.collection import Collection
from lra.task import Protocol, Task
from lra.training.request import Request
from lra.training.run import run
from lra.training.trained_run import load

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(batch_size: int = 8, seed: int = 0, count: int = 0) -> DrawnSet:
    made = training_set(prepared_sets.load_prepared("parity"), CPU, batch_size, seed, count)
    assert isinstance(made, DrawnSet)
    return made


def test_processes_and_parts_share_the_batch_of_a_step() -> None:
    data = drawn()
    whole = [data.batch(data.sampler(8, 0).batch(step)) for step in range(3)]
    for world, parts in ((2, 1), (1, 2), (2, 2)):
        loaders = [TrainingLoader(data, data.sampler(8, 0), 3, parts, Shard(rank, world)) for rank in range(world)]
        seen = [list(loader) for loader in loaders]
        for step, batch in enumerate(whole):
            rows = [b for loader in seen for b in loader[step * parts : (step + 1) * parts]]
            order = torch.cat([b.example for b in rows]).argsort()
            assert torch.equal(torch.cat([b.values for b in rows])[order], batch.values)
            assert torch.equal(torch.cat([b.labels for b in rows])[order], batch.labels)


def test_examples_depend_on_seed_and_step_alone() -> None:
    data = drawn()
    loader = TrainingLoader(data, data.sampler(8, 0), 6)
    loader.first = 4
    resumed = [batch.values for batch in loader]
    fresh = [data.batch(data.sampler(8, 0).batch(step)).values for step in (4, 5)]
    assert all(torch.equal(a, b) for a, b in zip(resumed, fresh, strict=True))
    other = drawn(seed=1)
    assert not torch.equal(other.batch(np.arange(8)).values, data.batch(np.arange(8)).values)
    lengths = {data.batch(np.arange(8 * step, 8 * step + 8)).mask.shape[-1] for step in range(300)}
    assert lengths == set(range(3, 41))


def test_a_limited_number_of_examples_is_seen_again() -> None:
    data = drawn(count=24)
    sampler = data.sampler(8, 0)
    assert [sampler.batch(step)[0] for step in range(5)] == [0, 8, 16, 0, 8]
    assert [drawn().sampler(8, 0).batch(step)[0] for step in (0, 127, 128)] == [0, 1016, 1024]


def test_what_needs_stored_examples_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.curriculum_steps: parity draws examples of its own lengths"):
        drawn().sampler(8, 0, grow_from=4, grow_steps=10)
    with pytest.raises(UserError, match=r"pretrain.batch_size is 4; parity draws batches of 8"):
        drawn().sampler(4, 0)


def test_the_data_module_draws_too() -> None:
    module = DataModule("parity", batch_size=8)
    epoch = module.train_dataloader()
    first = next(iter(epoch))
    assert len(epoch) == 128
    assert torch.equal(first.values, drawn().batch(np.arange(8)).values)
    assert next(iter(module.test_dataloader())).labels.shape[1] == 64


SMALL = {"train.steps": "8", "train.evaluate_every": "4", "search.rates": "[]", "model.d_model": "8",
         "model.n_layers": "1", "data.validation_examples": "32", "data.test_examples": "32"}  # fmt: skip


def go(task: str = "parity", **more: Any) -> Path:
    return run(Request(task, "gru", settings=SMALL, **more), Console(quiet=True))


def test_a_record_holds_every_length_and_its_predictions(places: Path) -> None:
    path = go()
    record = result.read(path)
    assert path.parent == places / "lra_results" / "diagnostics" / "parity" / "gru"
    assert record.recipe.name == "diagnostic"
    assert {name: score.length for name, score in record.tests.items()} == {f"length-{n}": n for n in (64, 128, 256)}
    assert record.test.length == 40
    assert (record.chance, record.test.n) == (0.5, 32)
    (predictions,) = Collection.read(places / "lra_results", "diagnostics").predictions.values()
    assert len(predictions.correct) == 32
    assert not Collection.read(places / "lra_results").records
    saved = np.load(path.with_suffix(".npz"))
    right = saved["prediction"] == saved["label"]
    assert right.shape == (32 * 40,)
    assert (record.test.positions, record.test.last) == (right.mean(), right.reshape(32, 40)[:, -1].mean())
    trained = load(next((places / "lra_runs").iterdir()))
    again = trained.evaluate()
    assert (again.accuracy, again.more["positions"]) == (record.test.accuracy, record.test.positions)
    longer = record.tests["length-64"]
    assert trained.evaluate("length-64").correct == longer.correct
    shown = CliRunner().invoke(app, ["evaluate", str(trained.folder), "--split", "length-64"])
    assert "length-64 accuracy" in shown.stdout
    rows = trained.predict([[0, 1, 1], [1]])
    assert [len(row) for row in rows] == [3, 1]
    assert trained.predict([[0, 1, 1]], probabilities=True)[0].shape == (3, 2)


def test_an_interrupted_run_draws_the_same_examples_when_it_is_resumed(places: Path) -> None:
    settings = SMALL | {"train.evaluate_every": "8"}

    def weights() -> dict[str, torch.Tensor]:
        (folder,) = (places / "lra_runs").iterdir()
        return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]

    request = Request("parity", "gru", settings=settings)
    run(request, Console(quiet=True))
    whole = weights()
    with stopped_after(3), pytest.raises(Interrupted, match="step 3 of 8"):
        run(request, Console(quiet=True))
    run(replace(request, resume=True), Console(quiet=True))
    assert all(torch.equal(whole[key], value) for key, value in weights().items())


@pytest.mark.parametrize(("target", "share"), [("class", "-"), ("position", "12.5"), ("value", "-")])
def test_a_task_of_ones_own_goes_from_the_template_to_a_row_of_the_table(target: str, share: str, places: Path) -> None:
    command = CliRunner()
    assert command.invoke(app, ["new", "task", "mine", "--target", target]).exit_code == 0
    said = command.invoke(app, ["new", "task", "mine", "--target", target])
    assert (said.exit_code, "mine.py exists" in said.output) == (2, True)
    checked = command.invoke(app, ["check", "mine.py:Mine"])
    assert checked.exit_code == 0, checked.output
    words = ["diagnose", "gru", "--tasks", "mine.py:Mine", *(f"--set={k}={v}" for k, v in SMALL.items())]
    shown = command.invoke(app, words)
    assert shown.exit_code == 0, shown.output
    record = result.read(next((places / "lra_results" / "diagnostics" / "mine" / "gru").glob("*.json")))
    assert record.tests["length-64"].length == 64
    assert {"position": record.test.positions, "value": record.test.error}.get(target, 0.0) is not None
    assert re.search(r"mine \(32.*\bgru\b.*(solved|failed|undecided)", " ".join(shown.output.split()))
    everything = command.invoke(app, ["diagnose"])
    assert "mine" in everything.output
    # a finished run is not repeated
    again = command.invoke(app, words)
    assert "this run is finished" in again.output


LAYER = """
import torch
from torch import nn


class Net(nn.Module):
    causal = True

    def __init__(self, d_model):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.map(x.flip(1))
"""


def test_a_layer_of_ones_own_has_to_be_causal(places: Path) -> None:
    (places / "net.py").write_text(LAYER)
    request = Request("parity", "net.py:Net", settings=SMALL)
    with pytest.raises(UserError, match=r"parity needs a causal layer, but outputs of this one depend on later"):
        run(request, Console(quiet=True))
    (places / "net.py").write_text(LAYER.replace("causal = True", ""))
    with pytest.raises(UserError, match=r"net.py:Net is bidirectional; if no output .* write `causal = True`"):
        run(request, Console(quiet=True))
    (places / "net.py").write_text(LAYER.replace("x.flip(1)", "x.cumsum(1)"))
    assert result.read(run(request, Console(quiet=True))).recipe.name == "diagnostic"


BROKEN = {
    "global generator": ("random.integers(0, 8, (count", "np.random.randint(0, 8, (count", "same for any"),
    "seed ignored": ("values = random", "random = np.random.default_rng(0)\n        values = random", "disjoint"),
    "step ignored": ("return values,", "return values * 0 + 1,", "drawn from seed"),
    "range": ("classes = 8", "classes = 7", "in range"),
    "length": ("length=64,", "length=48,", "in range"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_task_fails_its_check(fault: str, places: Path) -> None:
    CliRunner().invoke(app, ["new", "task", "mine", "--target", "position"])
    path = places / "mine.py"
    before, after, check = BROKEN[fault]
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    failed = [finding.check for finding in conformance.check(tasks.get("mine.py:Mine")()) if finding.failed]
    assert any(check in name for name in failed), failed


def test_the_parts_of_a_step_are_cut_from_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    made, steps = drawn(), []
    draw = type(made.task).training_batch

    def counted(task: Task, protocol: Protocol, size: int, seed: int, step: int) -> Any:
        steps.append(step)
        return draw(task, protocol, size, seed, step)

    monkeypatch.setattr(type(made.task), "training_batch", counted)
    for _ in TrainingLoader(made, made.sampler(8, 0), total=3, parts=2):
        pass
    assert steps == [0, 1, 2]
