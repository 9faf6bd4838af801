"""Curricula by difficulty and by accuracy: their order, what they record, what they refuse, and that they resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from stopped_run import stopped_after
from torch.nn import functional as F

import lra
from lra.config import recipe as recipes
from lra.data.batches import Sampler, TrainingLoader
from lra.data.curriculum import Dynamic, Staged, cut
from lra.errors import Interrupted, UserError
from lra.results import result
from lra.results.official import settings_of
from lra.results.record import RunRecord
from lra.target import PositionTarget, Target, ValueTarget
from lra.task import UNSCORED
from lra.training import stages
from lra.training.curriculum import Ordered
from lra.training.request import Request
from lra.training.run import run
from lra.training.trained_run import TrainedRun

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "12", "train.evaluate_every": "4", "model.d_model": "8", "model.n_layers": "1",
    "data.batch_size": "16", "optim.lr": "0.01",
}  # fmt: skip
KINDS: dict[str, dict[str, str]] = {
    "difficulty": {"train.curriculum": "difficulty", "train.curriculum_steps": "8", "train.curriculum_bins": "3"},
    "dynamic": {"train.curriculum": "dynamic"},
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("curriculum")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
            patch.setenv(name, str(root / name.lower()))
        yield root


def go(settings: dict[str, str] | None = None, **more: Any) -> Path:
    return run(Request(TINY, "gru", "quick", settings=SMALL | (settings or {}), **more), Console(quiet=True))


@pytest.fixture(scope="module")
def scorer(places: Path) -> TrainedRun:
    go({"train.steps": "8", "model.d_model": "16"})
    return lra.load(next((places / "lra_runs").glob("*gru*")))


def lengths(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(5, 100, (n, 1))


def test_easy_examples_come_first_and_every_stage_adds_a_bin() -> None:
    known = np.random.default_rng(0).permutation(100).astype(np.float32)
    plain = Sampler(lengths(100), 8, 0)
    plan = Staged(plain, cut(known, 5, 8), 10)
    hardest = [known[plan.batch(step)].max() for step in range(10)]
    # 4 bins are added over 10 steps: after 2.5, 5, 7.5 and 10
    limits = [20, 20, 20, 40, 40, 60, 60, 60, 80, 80]
    assert all(h < limit for h, limit in zip(hardest, limits, strict=True))
    assert max(hardest[3:5]) >= 20
    assert max(hardest[8:]) >= 60
    assert (plan.batch(10) == plain.batch(10)).all()
    assert plan.batch(1).tolist() != plain.batch(1).tolist()
    # a bin of 20 examples fills two batches, which share none
    assert len({*plan.batch(0).tolist(), *plan.batch(1).tolist()}) == 16
    # any step on its own, as a resumed run asks for it
    assert all((Staged(plain, cut(known, 5, 8), 10).batch(step) == plan.batch(step)).all() for step in (7, 2, 9, 4))
    assert (Staged(Sampler(lengths(100), 8, 1), cut(known, 5, 8), 10).batch(4) != plan.batch(4)).any()


def test_the_share_of_hard_examples_follows_the_accuracy() -> None:
    known = np.random.default_rng(0).permutation(100).astype(np.float32)
    curve: list[dict[str, float]] = []
    plan = Dynamic(Sampler(lengths(100), 16, 0), cut(known, 2, 16), lambda: curve)

    def hard(step: int) -> int:
        batch = plan.batch(step)
        assert len(set(batch.tolist())) == 16
        return int((known[batch] >= 50).sum())

    assert [hard(step) for step in (0, 1, 4)] == [0, 0, 0]
    before = plan.batch(4)
    curve += [{"step": 4, "validation_accuracy": 0.25}]
    # step 4 may have been planned before that validation, so that it must not depend on it
    assert (plan.batch(4) == before).all()
    curve += [{"step": 8, "validation_accuracy": 0.75}, {"step": 12, "validation_accuracy": 1.0}]
    assert [hard(step) for step in (5, 8, 9, 12, 13)] == [4, 4, 12, 12, 16]


def test_batches_are_planned_no_more_than_a_step_ahead() -> None:
    """A set on the host prepares the next batch while the device works: what `Dynamic` must not look beyond."""
    asked: list[int] = []

    class Asking:
        per_epoch = 4

        def batch(self, step: int) -> np.ndarray:
            asked.append(step)
            return np.arange(4)

    class OnHost:
        resident = False

        def batch(self, examples: np.ndarray) -> Any:
            return examples

    for parts in (1, 2):
        asked.clear()
        loader: Any = TrainingLoader(OnHost(), Asking(), 6, parts)
        for number, _ in enumerate(loader):
            assert max(asked) <= number // parts + 1


def test_processes_agree_on_the_difficulties_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    known = np.random.default_rng(0).permutation(100).astype(np.float32)
    recipe = recipes.resolve("quick", TINY, "gru", SMALL | KINDS["difficulty"])[0]
    alone = Ordered(recipe, Sampler(lengths(100), 16, 0), known, list)
    other = Ordered(recipe, Sampler(lengths(100), 16, 0), None, list, alone=False)
    monkeypatch.setattr("lra.training.distributed.gather", lambda value: [known, value])
    assert all((other.batch(step) == alone.batch(step)).all() for step in range(12))


def test_bins_that_make_no_sense_are_refused() -> None:
    known = np.arange(30, dtype=np.float32)
    with pytest.raises(UserError, match=r"31 bins for 30 training examples"):
        cut(known, 31, 1)
    with pytest.raises(UserError, match=r"7 of 30 training examples in a bin, and data.batch_size is 8"):
        cut(known, 4, 8)
    # equal difficulties stay in their order
    assert [part.tolist() for part in cut(np.zeros(5, np.float32), 2, 1)] == [[0, 1, 2], [3, 4]]


def test_difficulty_is_the_surprise_of_the_labels_of_an_example() -> None:
    torch.manual_seed(0)
    output, labels = torch.randn(3, 5, 4), torch.randint(0, 4, (3, 5))
    labels[0, 2:] = UNSCORED
    nats = -F.log_softmax(output, dim=-1)
    by_position = nats.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = torch.stack([by_position[0, :2].mean(), by_position[1].mean(), by_position[2].mean()])
    torch.testing.assert_close(PositionTarget(4).difficulty(output, labels), expected)
    torch.testing.assert_close(Target(4).difficulty(output[:, 3], labels[:, 3].clamp(min=0))[1:], by_position[1:, 3])
    values = torch.randn(3)
    torch.testing.assert_close(ValueTarget(1).difficulty(output[:, 0, :1], values), (output[:, 0, 0] - values) ** 2)


def test_recipes_without_a_curriculum_keep_their_hash() -> None:
    plain = recipes.resolve("quick", TINY, "gru", SMALL)[0]
    assert "curriculum" not in str(recipes.identity(plain.train))
    for settings in KINDS.values():
        assert recipes.resolve("quick", TINY, "gru", SMALL | settings)[0].hash != plain.hash


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train.curriculum": "dificulty"}, "one of length, difficulty, dynamic"),
        ({"train.curriculum": "difficulty"}, "curriculum_steps is 0; at least 4"),
        ({"train.curriculum": "difficulty", "train.curriculum_bins": "1"}, "curriculum_bins is 1; at least 2"),
        ({"train.curriculum": "dynamic", "train.curriculum_steps": "5"}, "covers the whole training"),
        ({**KINDS["difficulty"], "train.curriculum_length": "8"}, "is for train.curriculum=length, not difficulty"),
        (KINDS["difficulty"], "name it with --scorer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        go(settings)


def test_scorers_that_make_no_sense_are_refused(scorer: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--scorer is for train.curriculum=difficulty"):
        go(scorer=scorer.folder)
    with pytest.raises(UserError, match=r"--scorer .*no weights there"):
        go(KINDS["dynamic"], scorer=tmp_path)
    with pytest.raises(UserError, match=r"was trained on tiny \(strict\), and this run is on parity"):
        run(Request("parity", "gru", settings=KINDS["dynamic"], scorer=scorer.folder), Console(quiet=True))
    many = {"train.curriculum_bins": "600", "train.curriculum_steps": "700", "train.steps": "700"}
    with pytest.raises(UserError, match=r"600 bins for 512 training examples"):
        go(KINDS["difficulty"] | many, scorer=scorer.folder)


def test_examples_that_are_drawn_cannot_be_scored() -> None:
    recipe = recipes.resolve("diagnostic", "parity", "gru", KINDS["dynamic"])[0]
    context: Any = SimpleNamespace(scorer=object())
    prepared: Any = SimpleNamespace(task=SimpleNamespace(name="parity"))
    drawn: Any = object()
    with pytest.raises(UserError, match="parity draws its training examples step by step"):
        stages._difficulty(recipe, prepared, drawn, context)


def test_trials_of_a_rate_search_have_a_shorter_curriculum() -> None:
    settings = SMALL | {"search.rates": "[0.1, 0.2]", "search.share": "0.5"}
    staged = recipes.resolve("quick", TINY, "gru", settings | KINDS["difficulty"])[0]
    assert staged.trial(0.1).train.curriculum_steps == 4
    dynamic = recipes.resolve("quick", TINY, "gru", settings | KINDS["dynamic"])[0]
    assert dynamic.trial(0.1).train.curriculum == "length"


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    kind: str, scorer: TrainedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    settings = KINDS[kind] | {"model.dropout": "0.1"}
    whole = result.read(go(settings, scorer=scorer.folder))
    described(kind, whole, scorer)
    with stopped_after(6), pytest.raises(Interrupted, match="step 6 of 12"):
        go(settings, scorer=scorer.folder)
    # the order is that of the first leg, even if the scorer would now say otherwise
    with monkeypatch.context() as patch:
        patch.setattr(Target, "difficulty", lambda self, output, labels: torch.rand(len(labels)))
        again = result.read(go(settings, scorer=scorer.folder, resume=True))
    assert again.curve == whole.curve
    assert (again.test.accuracy, again.test.correct) == (whole.test.accuracy, whole.test.correct)
    assert again.curriculum == whole.curriculum
    plain = result.read(go({"model.dropout": "0.1"}))
    assert plain.curriculum is None
    assert [point.validation_loss for point in plain.curve] != [point.validation_loss for point in whole.curve]
    assert not list(tmp_path.rglob("difficulty.ckpt"))


def described(kind: str, record: RunRecord, scorer: TrainedRun) -> None:
    """What the record of a run with a curriculum says of it."""
    said = record.curriculum
    assert said is not None
    assert (said["kind"], said["id"], said["architecture"]) == (kind, scorer.record.id, "gru")
    assert sum(one["examples"] for one in said["bins"]) == 512
    difficulties = [one["difficulty"] for one in said["bins"]]
    assert difficulties == sorted(difficulties)
    assert difficulties[0] < difficulties[-1]
    assert record.regime.startswith("curriculum (")
    assert "--scorer" in record.command
    assert settings_of(record).status == "modified"
    if kind == "dynamic":
        accuracies = [point.validation_accuracy for point in record.curve]
        assert [one["share"] for one in said["hard"]] == [0.0, *accuracies[:2]]
        assert [one["step"] for one in said["hard"]] == [0, 5, 9]
