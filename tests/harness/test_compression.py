"""Distillation, int8 weights and pruning of a trained run, on a task of a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from typer.testing import CliRunner

import lra
from lra.cli.app import app
from lra.config import recipe as recipes
from lra.encoder import Prunable
from lra.errors import UserError
from lra.model import Batch
from lra.results import result
from lra.results.official import settings_of
from lra.target import PositionTarget, Target
from lra.task import UNSCORED
from lra.training import export
from lra.training.compression import Int8, rebuild
from lra.training.module import Training
from lra.training.request import Request
from lra.training.run import run
from lra.training.trained_run import TrainedRun

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "20", "train.evaluate_every": "20", "model.d_model": "16", "model.n_layers": "2",
    "data.batch_size": "16", "optim.lr": "0.01",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("compression")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
            patch.setenv(name, str(root / name.lower()))
        yield root


def go(architecture: str = "transformer", **more: Any) -> Path:
    settings = SMALL | more.pop("settings", {})
    return run(Request(TINY, architecture, "quick", settings=settings, **more), Console(quiet=True))


@pytest.fixture(scope="module")
def original(places: Path) -> TrainedRun:
    go(settings={"encoder.n_heads": "4"})
    return lra.load(next((places / "lra_runs").glob("*transformer*")))


def test_imitation_is_the_divergence_from_the_teacher_at_scored_positions() -> None:
    output, taught, labels = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    p, q = (torch.softmax(logits / 3, -1) for logits in (taught, output))
    by_position = 9 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(Target(3).imitation(output[0], taught[0], labels[0], 3.0), by_position[0].mean())
    labels[0, 2:] = UNSCORED
    torch.testing.assert_close(
        PositionTarget(3).imitation(output, taught, labels, 3.0), by_position[labels != UNSCORED].mean()
    )
    assert Target(3).imitation(taught[0], taught[0], labels[0], 3.0) == pytest.approx(0, abs=1e-6)


def test_alpha_weighs_both_losses_and_the_teacher_is_not_trained(original: TrainedRun) -> None:
    settings = {**SMALL, "train.distill_alpha": "0.25", "train.distill_temperature": "3.0"}
    recipe = recipes.resolve("quick", TINY, "gru", settings)[0]
    student: Any = lra.load(original.folder).model
    torch.nn.init.normal_(student.head.weight)
    module = Training(student, recipe, Target(4), original.model)
    mask = torch.ones(3, 1, 24, dtype=torch.bool)
    batch = Batch(torch.randint(0, 4, (3, 1, 24)), mask, torch.tensor([0, 1, 2]), torch.arange(3))
    output, taught = student.eval()(batch), original.model(batch).detach()
    expected = 0.75 * F.cross_entropy(output, batch.labels)
    expected = expected + 0.25 * Target(4).imitation(output, taught, batch.labels, 3.0)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in original.model.parameters())
    assert not any(name.startswith("teacher") for name in module.state_dict())


def test_a_distilled_run_records_its_teacher_and_is_a_modified_run(original: TrainedRun) -> None:
    record = result.read(go("gru", teacher=original.folder))
    said = record.distillation
    assert said is not None
    assert (said["id"], said["accuracy"], said["alpha"]) == (original.record.id, original.accuracy, 0.5)
    assert record.regime.startswith("distilled (")
    assert "--teacher" in record.command
    assert settings_of(record).status == "modified"
    with pytest.raises(UserError, match=r"was trained on tiny \(strict\), and this run is on parity"):
        run(Request("parity", "gru", settings={"train.steps": "1"}, teacher=original.folder), Console(quiet=True))
    with pytest.raises(UserError, match=r"--teacher .*no weights there"):
        go("gru", teacher=original.folder / "log")


def test_int8_rounds_each_row_to_a_step_of_its_own() -> None:
    weight = torch.randn(5, 7) * torch.logspace(-3, 3, 5).unsqueeze(1)
    weight[2] = 0
    integers, scale = Int8().right_inverse(weight)
    assert integers.dtype == torch.int8
    assert integers.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert ((Int8()(integers, scale) - weight).abs() <= scale / 2 * 1.001).all()


def test_a_quantised_run_is_smaller_scored_and_can_be_loaded_and_exported(original: TrainedRun, tmp_path: Path) -> None:
    small = lra.quantize(original, tmp_path / "small")
    about = small.record.compression
    assert about is not None
    assert about["compressed"]["bytes"] < 0.45 * about["original"]["bytes"]
    assert about["compressed"]["parameters"] == about["original"]["parameters"] == original.record.parameters
    assert abs(small.accuracy - original.accuracy) < 0.1
    assert small.accuracy == small.evaluate("test").accuracy
    again = lra.load(small.export(tmp_path / "again"))
    for a, b in zip(small.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "int8" in {str(t.dtype).removeprefix("torch.") for t in again.model.state_dict().values()}
    with pytest.raises(UserError, match="has int8 weights already"):
        lra.quantize(small, tmp_path / "third")
    with pytest.raises(UserError, match="prune the run first"):
        lra.prune(small, tmp_path / "third", heads=0.5)


def test_a_weight_that_two_modules_share_is_stored_once() -> None:
    model: Any = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 7), "head": torch.nn.Linear(7, 5)})
    model["head"].weight = model["embedding"].weight
    rebuild(model, [{"method": "int8", "modules": ["embedding", "head"]}])
    weights, shared = export.distinct(model)
    assert sorted(t.dtype == torch.int8 for t in weights.values()) == [False, False, True]
    assert len(shared) == 2
    torch.testing.assert_close(model["head"].weight, model["embedding"].weight)


def test_a_pruned_run_lacks_the_units_that_matter_least(original: TrainedRun, tmp_path: Path) -> None:
    # a channel that nothing reads, and a head that nothing reads, have no importance
    original = lra.load(original.folder)
    encoder: Any = original.model.encoder
    layer = encoder.layers[1]
    with torch.no_grad():
        layer.ffn.down.weight[:, 3] = 0
        layer.mixer.out.weight[:, 4:8] = 0
    small = lra.prune(original, tmp_path / "small", heads=0.25, channels=0.5, examples=64)
    about = small.record.compression
    assert about is not None
    pruned: Any = small.model.encoder
    mixer, ffn = pruned.layers[1].mixer, pruned.layers[1].ffn
    assert (mixer.n_heads, ffn.hidden) == (3, layer.ffn.hidden // 2)
    assert about["kept"]["encoder.layers.1.mixer"] == [0, 2, 3]
    assert 3 not in about["kept"]["encoder.layers.1.ffn"]
    assert about["compressed"]["parameters"] == sum(p.numel() for p in small.model.parameters())
    assert about["compressed"]["parameters"] < about["original"]["parameters"]
    assert small.accuracy == small.evaluate("test").accuracy
    config = tmp_path / "small" / "config.json"
    config.write_text(config.read_text().replace("encoder.layers.1.ffn", "encoder.layers.7.ffn"))
    with pytest.raises(UserError, match="structure does not fit the model"):
        lra.load(tmp_path / "small")
    both = lra.quantize(small, tmp_path / "both")
    assert [step["method"] for step in both.structure] == ["pruning", "int8"]


def test_the_commands_show_the_original_beside(original: TrainedRun, tmp_path: Path) -> None:
    for name, options in (("quantize", []), ("prune", ["--channels", "0.5"])):
        done = CliRunner().invoke(app, [name, str(original.folder), str(tmp_path / name), *options])
        assert done.exit_code == 0, done.output
        assert "original" in done.output
        assert f"{original.record.parameters:,}" in done.output
    done = CliRunner().invoke(app, ["quantize", str(original.folder), str(tmp_path / "none"), "--dry-run"])
    assert (done.exit_code, "would compress" in done.output, (tmp_path / "none").exists()) == (0, True, False)
    done = CliRunner().invoke(app, ["prune", str(original.folder), str(tmp_path / "none")])
    assert (done.exit_code, "nothing to remove" in done.output) == (2, True)


def test_what_has_no_heads_says_so(places: Path, tmp_path: Path) -> None:
    go("s4d")
    plain = lra.load(next((places / "lra_runs").glob("*s4d*")))
    with pytest.raises(UserError, match="s4d has no channels that can be removed"):
        lra.prune(plain, tmp_path / "small", channels=0.5)


@pytest.mark.parametrize(
    ("name", "unit", "options"),
    [
        ("transformer", "heads", {"positions": "alibi"}), ("bigbird", "heads", {}), ("sparse", "heads", {}),
        ("performer", "heads", {}), ("mixture_of_depths", "heads", {}), ("mingru", "channels", {}),
        ("transformer", "channels", {"block": {"ffn": "swiglu"}}),
    ],
)  # fmt: skip
def test_removing_a_unit_that_nothing_reads_changes_nothing(name: str, unit: str, options: dict[str, Any]) -> None:
    encoder = lra.create_encoder(name, d_model=32, n_layers=1, length=64, **options).eval()
    (part,) = (m for m in encoder.modules() if isinstance(m, Prunable) and m.unit == unit and m.units)
    width = part.reader.in_features // part.units
    x, mask = torch.randn(2, 64, 32), torch.ones(2, 64, dtype=torch.bool)
    with torch.no_grad():
        part.reader.weight[:, width : 2 * width] = 0
        before = encoder(x, mask)
        part.keep(torch.tensor([unit for unit in range(part.units) if unit != 1]))
        torch.testing.assert_close(encoder(x, mask), before)
