"""Targets: losses, predictions and scores of every kind, from stored labels to the classifier's output."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lra.data import prepared_sets
from lra.data.batches import DeviceSet
from lra.data.checks import check_split
from lra.encoder import Card, Cost, Encoder
from lra.errors import UserError
from lra.model import Batch, Classifier
from lra.registry import tasks
from lra.target import NextTarget, PositionTarget, Target, ValueTarget, join
from lra.task import UNSCORED, DataError, Protocol, Split
from lra.tasks.storage import open_split, write_documents, write_positions, write_values
from lra.training import construction
from lra.training.request import Request, resolve

CPU = torch.device("cpu")
TOKENS = Protocol("p", length=4, vocabulary=5)
X = UNSCORED


class Identity(Encoder):
    card = Card(title="", year=2026, url="", scaling="L", causal=True)

    def __init__(self, d_model: int = 3) -> None:
        super().__init__()
        self.d_model, self.n_layers, self.length = d_model, 1, 4

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x

    def cost(self, length: int) -> Cost:
        return Cost()


def stored(folder: Path, labels: list[list[int]] | list[float] | None, dtype: Any = np.uint8) -> Split:
    """Three documents of 3, 5 and 1 values."""
    documents = [[1, 2, 3], [4, 0, 1, 2, 3], [2]]
    write_documents(folder, "test", [np.array(d) for d in documents], dtype)
    if labels is not None and isinstance(labels[0], float):
        write_values(folder, "test", np.array(labels))
    else:
        write_positions(folder, "test", labels and [np.array(row) for row in labels], 3)  # type: ignore[arg-type]
    return open_split(folder, "test")


def test_labels_of_positions_follow_their_document(tmp_path: Path) -> None:
    split = stored(tmp_path, [[0, X, 1], [1, 1, X, 0, 0], [1]])
    assert (split.target, len(split)) == ("position", 3)
    assert split.answers().tolist() == [0, 1, 1, 1, 0, 0, 1]
    # the longest document is cut to the protocol's four tokens
    data = DeviceSet.of(split, TOKENS, CPU, np.array([1, 2]))
    batch = data.batch(np.array([1, 0]))
    assert batch.labels.tolist() == [[1, X, X, X], [1, 1, X, 0]]
    assert batch.values[1, 0].tolist() == [4, 0, 1, 2]


def test_next_tokens_are_the_tokens_themselves(tmp_path: Path) -> None:
    split = stored(tmp_path, None)
    assert (split.target, len(split)) == ("next", 3)
    assert split.answers().tolist() == [2, 3, 0, 1, 2, 3]
    assert split.label(1).tolist() == [0, 1, 2, 3, X]
    batch = DeviceSet.of(split, replace(TOKENS, length=8), CPU).batch(np.arange(3))
    assert batch.labels.tolist() == [[2, 3, X, X, X, X, X, X], [0, 1, 2, 3, X, X, X, X], [X] * 8]


def test_real_labels_and_real_inputs(tmp_path: Path) -> None:
    split = stored(tmp_path, [0.5, -1.0, 3.25], np.float32)
    assert split.target == "value"
    protocol = Protocol("p", length=5, channels=1, real=True)
    batch = DeviceSet.of(split, protocol, CPU).batch(np.array([2, 0]))
    assert batch.labels.tolist() == [3.25, 0.5]
    assert batch.values.dtype == torch.float32
    model = Classifier(Identity(), replace(protocol, scale=(1.0, 2.0)), 1, 1, "last")
    torch.testing.assert_close(model.normalise(torch.tensor([2.0])), torch.tensor([0.5]))
    assert model(batch).shape == (2, 1)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("parity", {"labels": np.array([0, 1, 2, 0, 1, X, X, X, 1], np.int32)}, "document 0 has the label 2 at"),
        ("parity", {"labels": np.array([0, 1, 1] + [X] * 5 + [1], np.int32)}, "example 1 has no scored position"),
        ("parity", {"labels": np.array([0, 1, 1], np.int32)}, "3 labels for 9 positions"),
        ("parity", {"labels": np.array([0, 1, 1], np.uint8)}, "target 'position' store int32"),
        ("adding", {"labels": np.array([0, 1, 1], np.uint8)}, "type uint8, or not finite; store finite float32"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_the_target_are_refused(
    tmp_path: Path, task: str, change: dict[str, Any], message: str
) -> None:
    split = replace(stored(tmp_path, [[0, X, 1], [1, 1, X, 0, 0], [1]]), **change)
    owner = tasks.get(task)()
    protocol = replace(next(iter(owner.protocols.values())), channels=0)
    with pytest.raises(DataError, match=message):
        check_split(owner, protocol, "test", split)


def test_infinite_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label of example 1 of test is not a finite number"):
        write_values(tmp_path, "test", np.array([0.0, np.inf]))
    with pytest.raises(DataError, match="documents of test hold nan; finite numbers only"):
        write_documents(tmp_path, "test", [np.array([1.0, np.nan])], np.float32)


def test_the_loss_of_positions_is_the_mean_over_those_that_are_scored() -> None:
    output, labels = torch.randn(2, 3, 4), torch.tensor([[0, X, 3], [X, X, 1]])
    target = PositionTarget(4)
    picked = [output[0, 0, 0] - output[0, 0].logsumexp(0), output[0, 2, 3] - output[0, 2].logsumexp(0),
              output[1, 2, 1] - output[1, 2].logsumexp(0)]  # fmt: skip
    torch.testing.assert_close(target.loss(output, labels), -sum(picked, torch.zeros(())) / 3)
    assert target.right(output, labels).shape == (3,)


def test_scores_of_positions_count_whole_sequences_positions_and_the_last() -> None:
    """Three sequences: all right, the last wrong, one in the middle wrong."""
    output = torch.zeros(3, 3, 2)
    output[..., 1] = torch.tensor([[1.0, -1, 1], [1, 1, 1], [1, 1, 1]])
    labels = torch.tensor([[1, 0, 1], [1, X, 0], [X, 0, 1]])
    target = PositionTarget(2)
    parts = [
        {k: v.numpy() for k, v in target.answers(output[rows], rows, labels[rows]).items()}
        for rows in (torch.tensor([2, 0]), torch.tensor([1]))
    ]
    answers = join(parts)
    assert answers["example"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    score = target.score(answers)
    assert score == {"accuracy": 1 / 3, "correct": 1, "n": 3, "positions": pytest.approx(5 / 7), "last": 2 / 3}


def test_scores_of_values_count_what_is_within_the_tolerance() -> None:
    target = ValueTarget(1, 0.04)
    output, labels = torch.tensor([[0.5], [1.0], [2.0]]), torch.tensor([0.53, 1.05, 2.0])
    answers = {k: v.numpy() for k, v in target.answers(output, torch.arange(3), labels).items()}
    score = target.score(answers)
    assert (score["accuracy"], score["tolerance"]) == (2 / 3, 0.04)
    assert score["error"] == pytest.approx((0.03**2 + 0.05**2) / 3, rel=1e-5)
    assert target.loss(output, labels).item() == pytest.approx(score["error"], rel=1e-5)


def test_bits_of_the_next_token() -> None:
    """Uniform over four tokens: two bits each, and every token counts by itself."""
    target, labels = NextTarget(4), torch.tensor([[0, 1, X], [3, X, X]])
    answers = {k: v.numpy() for k, v in target.answers(torch.zeros(2, 3, 4), torch.arange(2), labels).items()}
    score = target.score(answers)
    assert (score["n"], score["correct"]) == (3, 1)
    assert score["bits"] == pytest.approx(2)


def test_classes_keep_their_loss_and_their_type() -> None:
    target, output, labels = Target(300), torch.randn(5, 300), torch.tensor([0, 299, 3, 4, 5])
    torch.testing.assert_close(target.loss(output, labels), nn.functional.cross_entropy(output, labels), rtol=0, atol=0)
    answers = {k: v.numpy() for k, v in target.answers(output, torch.arange(5), labels).items()}
    assert {column.dtype for column in target.stored(answers).values()} == {np.dtype(np.uint16)}
    assert target.score(answers)["correct"] == int((output.argmax(1) == labels).sum())


@pytest.mark.parametrize("target", [Target(3), PositionTarget(3), NextTarget(3), ValueTarget(1)])
def test_sampled_labels_have_the_form_of_labels(target: Target) -> None:
    scored = target.per_position
    output = torch.randn(2, 4, 3) if scored else torch.randn(2, target.outputs)
    labels = torch.tensor([[0, X, 1, 2], [X, 1, 1, X]]) if scored else torch.zeros(2)
    sampled = target.sample(output, labels)
    assert sampled.shape == labels.shape
    assert not scored or torch.equal(sampled == X, labels == X)
    assert math.isfinite(target.loss(output, sampled))


@pytest.mark.parametrize("pooling", ["last", "cls"])
def test_a_head_at_every_position(pooling: str) -> None:
    model = Classifier(Identity(), TOKENS, 7, 1, pooling, per_position=True)
    mask = torch.ones(2, 1, 4, dtype=torch.bool)
    batch = Batch(torch.randint(5, (2, 1, 4)), mask, torch.zeros(2, 4, dtype=torch.int64), torch.arange(2))
    output = model(batch)
    assert output.shape == (2, 4, 7)
    torch.testing.assert_close(output, model.head(model.embed(batch.values[:, 0])))
    assert model.cost(4).matmul == 4 * 2 * 3 * 7


def test_a_causal_task_refuses_an_encoder_that_sees_the_answer() -> None:
    recipe, _ = resolve(Request("parity", "transformer", settings={"model.direction": "bidirectional"}))
    from lra.registry import architectures

    task = tasks.get("parity")()
    with pytest.raises(UserError, match=r"parity needs a causal encoder, and transformer is bidirectional; set"):
        construction.build(recipe, architectures.get("transformer"), task, task.protocols["dense"], 0)


def test_sets_of_tasks_with_classes_keep_their_identity() -> None:
    """A manifest written before there were other targets still matches."""
    task = tasks.get("listops")()
    assert set(prepared_sets.identity(task, task.protocols["strict"])["protocol"]) == {
        "name", "length", "vocabulary", "channels", "scale", "selection", "counts", "sha256",
    }  # fmt: skip
