"""Optimisers and schedules by name: what each does to the weights, and clear refusals."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from lra.config.recipe import resolve
from lra.config.sections import Optim, Train, identity
from lra.errors import UserError
from lra.registry import architectures
from lra.training import optimisers

PACKAGES = {"lion": "lion_pytorch", "sophia": "sophia_opt", "schedule_free": "schedulefree"}


class Problem(nn.Module):
    """A small encoder of this project under a head, with one input to learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = architectures.get("s4d")(d_model=8, n_layers=1, length=12)
        self.head = nn.Linear(8, 3)
        self.x, self.mask = torch.randn(6, 12, 8), torch.ones(6, 12, dtype=torch.bool)
        self.y = torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.encoder(self.x, self.mask).mean(1)), self.y)


def learnt(recipe: Optim, steps: int = 60) -> tuple[float, float]:
    problem = Problem()
    optimiser = optimisers.build(problem, problem.encoder, recipe, batch_size=6)
    if hasattr(optimiser, "train"):
        optimiser.train()
    before = problem.loss().item()
    for step in range(steps):
        optimiser.zero_grad()
        problem.loss().backward()
        if hasattr(optimiser, "update_hessian") and step % 10 == 0:
            optimiser.update_hessian()
        optimiser.step()
    return before, problem.loss().item()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "muon", "torch.optim:NAdam", *PACKAGES])
def test_every_optimiser_learns(name: str) -> None:
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    rate = {"sgd": 0.3, "lion": 1e-2, "muon": 2e-2}.get(name, 1e-2)
    schedule = "constant" if name == "schedule_free" else "cosine"
    before, after = learnt(Optim(lr=rate, name=name, schedule=schedule, weight_decay=0.0))
    assert after < 0.6 * before


def test_muon_turns_the_matrices_and_leaves_the_rest_to_adamw() -> None:
    problem = Problem()
    built = optimisers.build(problem, problem.encoder, Optim(name="muon", lr=0.01))
    assert isinstance(built, optimisers.Combined)
    turned, rest = ({id(p) for g in part.param_groups for p in g["params"]} for part in built.parts)
    assert turned == {id(p) for n, p in problem.encoder.named_parameters() if n.endswith("output_linear.weight")}
    assert turned | rest == {id(p) for p in problem.parameters()}
    for group in built.param_groups:
        group["lr"] = 0.5
    assert all(group["lr"] == 0.5 for part in built.parts for group in part.param_groups)


def test_state_of_several_optimisers_comes_back() -> None:
    torch.manual_seed(1)
    halves = []
    for pause in (False, True):
        problem = Problem()
        built = optimisers.build(problem, problem.encoder, Optim(name="muon", lr=0.01))
        for step in range(6):
            if pause and step == 3:
                state = built.state_dict()
                built = optimisers.build(problem, problem.encoder, Optim(name="muon", lr=0.01))
                built.load_state_dict(state)
            built.zero_grad()
            problem.loss().backward()
            built.step()
        halves.append([p.detach().clone() for p in problem.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*halves, strict=True))


def test_decay_on_all_reaches_vectors_but_not_what_the_encoder_exempts() -> None:
    problem = Problem()
    of = {}
    for decay in ("matrices", "all"):
        groups = optimisers.parameter_groups(problem, problem.encoder, Optim(decay=decay, weight_decay=0.1))
        of[decay] = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    bias, step = problem.head.bias, next(p for n, p in problem.encoder.named_parameters() if n.endswith("log_dt"))
    assert (of["matrices"][id(bias)], of["all"][id(bias)]) == (0.0, 0.1)
    assert of["all"][id(step)] == 0.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch.optim:AdmaW", "did you mean 'AdamW'"),
        ("no.such.module:Adam", "cannot be imported"),
        ("torch.nn:Linear", "rejects its arguments|is not a torch"),
    ],
)
def test_a_wrong_optimiser_is_one_clear_line(name: str, says: str) -> None:
    problem = Problem()
    with pytest.raises(UserError, match=says):
        optimisers.build(problem, problem.encoder, Optim(name=name))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    problem = Problem()
    with pytest.raises(UserError, match="pip install lion-pytorch"):
        optimisers.build(problem, problem.encoder, Optim(name="lion"))


def test_an_optimiser_of_the_users_own_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mine")
    module.Slow = lambda groups, lr, factor: torch.optim.SGD(groups, lr=lr * factor)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    found, _ = resolve("quick", "listops", "gru", {"optim.name": "mine:Slow", "optim.options.factor": "0.5"})
    problem = Problem()
    assert optimisers.build(problem, problem.encoder, found.optim).defaults["lr"] == found.optim.lr * 0.5


def test_schedules() -> None:
    at = optimisers.factor(Optim(schedule="rsqrt", warmup=4), 100)
    assert [at(0), at(3), at(4), at(16)] == [0.25, 1.0, 1.0, 0.5]
    at = optimisers.factor(Optim(schedule="linear", warmup=4, warmup_power=2.0), 10)
    assert [at(step) for step in range(5)] == [1 / 16, 4 / 16, 9 / 16, 1.0, 1.0]
    at = optimisers.factor(Optim(schedule="linear", warmup=0), 10)
    assert (at(0), at(5), at(10)) == (1.0, 0.5, 0.0)
    plateau = optimisers.Plateau(Optim(schedule="plateau", plateau_patience=1, plateau_factor=0.5))
    at = optimisers.factor(Optim(schedule="plateau"), 100, plateau)
    seen = []
    for accuracy in (0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3):
        plateau.update(accuracy)
        seen.append(at(1))
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_keys_added_later_change_the_identity_only_when_they_are_used() -> None:
    assert set(identity(Optim())) == {"lr", "weight_decay", "betas", "schedule", "warmup", "clip"}
    assert set(identity(Train())) == {"steps", "evaluate_every", "precision"}
    assert identity(replace(Optim(), ema=0.9))["ema"] == 0.9
