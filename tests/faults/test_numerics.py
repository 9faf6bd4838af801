"""Every architecture, at the edges: predictions that do not depend on their neighbours, and no input that gives NaN."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_drills import FULL
from rich.console import Console
from tiny_task import Tiny
from torch import Tensor
from torch.nn import functional as F

from lra.data import prepared_sets
from lra.errors import UserError
from lra.model import Batch, Classifier
from lra.registry import architectures
from lra.task import Protocol, Split
from lra.training.request import Request
from lra.training.run import run

NAMES = architectures.names()
LENGTH = 48
# 200 steps of everything take longer than all other drills: LRA_STEPS=200 make test-faults K=first_steps
STEPS, LONG = (int(os.environ.get("LRA_STEPS", "6")), 4096) if FULL else (3, 256)


def classifier(name: str, length: int = LENGTH, direction: str = "bidirectional") -> Classifier:
    torch.manual_seed(0)
    make = architectures.get(name)
    more = {"direction": direction} if "direction" in make.options() else {}
    encoder = make(d_model=16, n_layers=1, length=length, **more)
    return Classifier(encoder, Protocol("p", length=length, vocabulary=20), 4, 1, "mean")


def batch(values: Tensor, lengths: list[int]) -> Batch:
    """values: (B, L) tokens; lengths: real tokens of each."""
    mask = torch.arange(values.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    labels = torch.arange(len(lengths)) % 4
    return Batch(values.masked_fill(~mask, 0).unsqueeze(1), mask.unsqueeze(1), labels, labels)


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_does_not_depend_on_its_batch(name: str) -> None:
    model = classifier(name).eval().double()
    values = torch.randint(20, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = [LENGTH, 1, 17, 30, 2]
    with torch.no_grad():
        together = model(batch(values, lengths))
        # the labels travel with the batch: no model may look at them
        other = batch(values, lengths)._replace(labels=torch.tensor([3, 2, 1, 0, 3]))
        assert torch.equal(model(other), together)
        for i, length in enumerate(lengths):
            alone = model(batch(values[i : i + 1, :length], [length]))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-7)
        order = torch.tensor([3, 1, 4])
        some = model(batch(values[order], [lengths[i] for i in order]))
    torch.testing.assert_close(some, together[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_inputs_give_finite_outputs_or_a_clear_error(name: str) -> None:
    model = classifier(name).eval()
    random = torch.randint(20, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    cases = {
        "all padding but one token": batch(random, [1, 1]),
        "all tokens equal": batch(torch.full((2, LENGTH), 7), [LENGTH, LENGTH]),
        "all tokens zero": batch(torch.zeros(2, LENGTH, dtype=torch.int64), [LENGTH, LENGTH]),
        "one token": batch(random[:, :1], [1, 1]),
        "two tokens": batch(random[:, :2], [2, 2]),
    }
    for what, given in cases.items():
        model.zero_grad()
        logits = model(given)
        assert logits.isfinite().all(), what
        F.cross_entropy(logits, given.labels).backward()
        wrong = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not wrong, f"{what}: gradients of {wrong}"
    with torch.no_grad():
        huge = model.encoder(1e4 * torch.randn(2, LENGTH, 16), torch.ones(2, LENGTH, dtype=torch.bool))
        assert huge.isfinite().all()
        try:
            longer = model(batch(random.repeat(1, 3), [3 * LENGTH, LENGTH]))
        except (ValueError, UserError) as error:
            assert str(LENGTH) in str(error)  # noqa: PT017  (a clear error names the length there is)
        else:
            assert longer.isfinite().all()


@pytest.mark.parametrize("precision", ["32", "bf16"] if FULL else ["bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_stay_finite(name: str, precision: str) -> None:
    model = classifier(name, LONG).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        values = torch.randint(20, (2, LONG), generator=random)
        given = batch(values, [LONG, LONG // 3])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(given)
            extra = model.encoder.aux_loss()
        loss = F.cross_entropy(logits.float(), given.labels) + (0 if extra is None else extra)
        optimiser.zero_grad()
        loss.backward()
        wrong = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert loss.isfinite(), f"step {step}"
        assert not wrong, f"step {step}: gradients of {wrong}"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def test_the_test_split_is_not_opened_before_training_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name))
    prepared_sets.load_prepared(Tiny())
    opened: list[str] = []
    real = Tiny.load

    def load(self: Tiny, folder: Path, split: str) -> Split:
        opened.append(split)
        return real(self, folder, split)

    def floors(*_: Any) -> dict[str, float]:
        opened.append("floors")
        return {"majority class": 0.25}

    monkeypatch.setattr(Tiny, "load", load)
    monkeypatch.setattr(Tiny, "floors", floors)
    best: list[bool] = []
    score = __import__("lra.training.stages", fromlist=["score"]).score

    def scoring(*arguments: Any, **options: Any) -> Any:
        best.append("test" in opened or "floors" in opened)
        return score(*arguments, **options)

    monkeypatch.setattr("lra.training.stages.score", scoring)
    settings = {"train.steps": "4", "train.evaluate_every": "2", "model.d_model": "8", "model.n_layers": "1"}
    run(Request(Tiny, "gru", "quick", settings=settings), Console(quiet=True))
    assert best == [False]
    assert opened.index("test") > opened.index("train")
