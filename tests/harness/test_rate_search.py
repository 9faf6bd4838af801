"""The search for a learning rate: short runs from the same weights, chosen on validation, counted in the record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lra.config.recipe import Recipe
from lra.config.sections import Optim, Search, Train
from lra.errors import UserError
from lra.training import rate_search

RECIPE = Recipe(
    "standard", "tiny", "gru", optim=Optim(warmup=30), train=Train(steps=200, evaluate_every=50),
    search=Search(rates=(1e-3, 3e-3, 1e-2)),
)  # fmt: skip
SCORES = {1e-3: (0.4, 1.5), 3e-3: (0.6, 1.2), 1e-2: (0.6, 1.1)}


def trial_of(recipe: Recipe) -> rate_search.Trial:
    accuracy, loss = SCORES[recipe.optim.lr]
    return {"lr": recipe.optim.lr, "steps": recipe.train.steps, "accuracy": accuracy, "loss": loss, "examples": 640,
            "seconds": 2.0}  # fmt: skip


def test_a_trial_is_the_run_in_short() -> None:
    trial = RECIPE.trial(3e-3)
    assert (trial.optim.lr, trial.optim.warmup, trial.train.steps, trial.train.evaluate_every) == (3e-3, 3, 20, 20)
    assert replace(trial, optim=RECIPE.optim, train=RECIPE.train) == RECIPE


def test_the_best_validation_accuracy_wins_and_the_lower_loss_of_equals(tmp_path: Path) -> None:
    chosen, facts = rate_search.search(RECIPE, nn.Linear(2, 2), tmp_path / "rates.json", trial_of)
    assert chosen == replace(RECIPE, optim=replace(RECIPE.optim, lr=1e-2))
    assert (facts["lr"], facts["examples"], facts["seconds"]) == (1e-2, 1920, 6.0)
    assert [trial["lr"] for trial in facts["trials"]] == [1e-3, 3e-3, 1e-2]


def test_every_trial_starts_from_the_same_weights_and_random_state(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    starts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run_trial(recipe: Recipe) -> rate_search.Trial:
        starts.append((model.weight.detach().clone(), torch.rand(1)))
        with torch.no_grad():
            model.weight += 1
        return trial_of(recipe)

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rate_search.search(RECIPE, model, tmp_path / "rates.json", run_trial)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(weight, model.weight) and torch.equal(drawn, expected) for weight, drawn in starts)


def test_an_interrupted_search_continues_with_the_next_rate(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    seen: list[float] = []

    def stops(recipe: Recipe) -> rate_search.Trial:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(recipe.optim.lr)
        return trial_of(recipe)

    with pytest.raises(KeyboardInterrupt):
        rate_search.search(RECIPE, nn.Linear(2, 2), file, stops)
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 2
    seen.clear()
    _, facts = rate_search.search(RECIPE, nn.Linear(2, 2), file, stops)
    assert (seen, facts["lr"]) == ([1e-2], 1e-2)


@pytest.mark.parametrize(
    ("rates", "share", "says"), [((1e-3, 1e-3), 0.1, "different"), ((0.0,), 0.1, "above 0"), ((1e-3,), 0.0, "share")]
)
def test_wrong_searches_are_refused(rates: tuple[float, ...], share: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Search(rates=rates, share=share)


def test_a_search_is_part_of_the_recipe_hash_and_its_absence_is_not() -> None:
    assert RECIPE.hash != replace(RECIPE, search=Search()).hash
    assert replace(RECIPE, search=Search()).hash == replace(RECIPE, search=Search(share=0.2)).hash
