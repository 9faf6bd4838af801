"""Lion, Sophia and schedule-free in whole runs: resumed exactly, averaged where they average, curved where they curve.

Those of optional packages are skipped where the package is missing (extra `optim`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from curved import Curved
from rich.console import Console
from stopped_run import stopped_after

from lra.config import recipe
from lra.errors import Interrupted, UserError
from lra.training.module import Training
from lra.training.request import Request
from lra.training.run import run

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "24", "train.evaluate_every": "8", "model.d_model": "8", "data.batch_size": "16",
    "model.n_layers": "1", "optim.warmup": "4", "optim.schedule": "constant",
}  # fmt: skip
PACKAGES = {"lion": "lion_pytorch", "sophia": "sophia_opt", "schedule_free": "schedulefree"}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def go(name: str, settings: dict[str, str] | None = None, **more: Any) -> dict[str, torch.Tensor]:
    """The last weights of a run of 24 steps."""
    last: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        ended = Training.on_train_end

        def keep(self: Training) -> None:
            ended(self)
            last.update({k: v.clone() for k, v in self.model.state_dict().items()})

        patch.setattr(Training, "on_train_end", keep)
        chosen = SMALL | {"optim.name": name} | (settings or {})
        run(Request(TINY, "gru", "quick", settings=chosen, **more), Console(quiet=True))
    return last


@pytest.mark.parametrize("stop", [8, 10, 11])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_stopped_run_goes_on_to_the_same_weights(
    name: str, stop: int, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8: after a validation; 10, 11: before and after Sophia's estimate."""
    pytest.importorskip(PACKAGES[name])
    settings = {"model.dropout": "0.1"}
    whole = go(name, settings)
    monkeypatch.setenv("LRA_RUNS", str(places / "other"))
    with stopped_after(stop), pytest.raises(Interrupted, match=f"step {stop} of 24"):
        go(name, settings)
    again = go(name, settings, resume=True)
    assert whole
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_schedule_free_is_validated_at_its_average_and_trained_where_its_gradients_are_taken(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("schedulefree")
    seen: list[tuple[str, bool]] = []
    averages: dict[str, torch.Tensor] = {}

    class Watched(Training):
        def told(self, where: str) -> None:
            seen.append((where, self._optimizer().param_groups[0]["train_mode"]))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.told("training")
            return super().training_step(batch, index)

        def on_validation_start(self) -> None:
            # before the switch: the average from its definition, y = (1 - beta) z + beta x
            group = self._optimizer().param_groups[0]
            assert group["train_mode"]
            beta = group["betas"][0]
            for key, y in self.model.named_parameters():
                averages[key] = (y - (1 - beta) * self._optimizer().state[y]["z"]) / beta

        def validation_step(self, batch: Any, index: int) -> None:
            self.told("validation")
            super().validation_step(batch, index)

    monkeypatch.setattr("lra.training.stages.Training", Watched)
    last = go("schedule_free", {"train.evaluate_every": "24"})
    assert set(seen) == {("training", True), ("validation", False)}
    kept = torch.load(next(places.rglob("best.ckpt")), weights_only=True)["state_dict"]
    for key, average in averages.items():
        torch.testing.assert_close(kept[f"model.{key}"], average.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(last[key], kept[f"model.{key}"], atol=1e-6, rtol=1e-5)


def test_what_schedule_free_pretrains_is_its_average(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schedulefree")
    from lra.training.pretraining import Pretraining

    modes: list[bool] = []

    class Watched(Pretraining):
        def on_train_end(self) -> None:
            super().on_train_end()
            modes.append(self._optimizer().param_groups[0]["train_mode"])

    monkeypatch.setattr("lra.training.stages.Pretraining", Watched)
    go("schedule_free", {"pretrain.steps": "6"}, pretrain="mlm")
    assert modes == [False]


@pytest.fixture
def estimates() -> list[int]:
    Curved.estimates.clear()
    return Curved.estimates


@pytest.mark.parametrize("parts", ["1", "2"])
def test_curvature_is_estimated_every_ten_steps_and_leaves_the_gradients_alone(
    parts: str, estimates: list[int], places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train.accumulate": parts}
    curved = go("curved:Curved", settings)
    assert estimates == [0, 10, 20]
    monkeypatch.delattr(Curved, "update_hessian")
    plain = go("curved:Curved", settings)
    assert plain
    assert all(torch.equal(value, curved[key]) for key, value in plain.items())


def test_sophia_scales_by_the_labels_of_one_estimate(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sophia = pytest.importorskip("sophia_opt")
    seen: list[int] = []
    plain = sophia.SophiaG.step

    def step(self: Any, closure: Any = None, bs: int = 0) -> Any:
        seen.append(bs)
        return plain(self, closure, bs=bs)

    monkeypatch.setattr(sophia.SophiaG, "step", step)
    go("sophia", {"train.accumulate": "4"})
    assert seen == [4] * 24


def test_sophia_does_not_pretrain() -> None:
    with pytest.raises(UserError, match="estimates its Hessian from classes"):
        go("sophia", {"pretrain.steps": "6"}, pretrain="mlm")


def test_optimisers_have_the_betas_of_their_authors_unless_a_recipe_gives_some() -> None:
    for name, betas in (("lion", (0.9, 0.99)), ("sophia", (0.965, 0.99)), ("adamw", (0.9, 0.999))):
        found, origin = recipe.resolve("quick", "listops", "gru", {"optim.name": name})
        assert found.optim.betas == betas
        assert origin["optim.betas"] == ("built-in default" if name == "adamw" else "the optimiser's own")
    found, origin = recipe.resolve("quick", "listops", "gru", {"optim.name": "lion", "optim.betas": "[0.95, 0.98]"})
    assert (found.optim.betas, origin["optim.betas"]) == ((0.95, 0.98), "--set")
