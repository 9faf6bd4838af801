"""Loss, predictions and scores of the targets that a task can declare.

target     labels of a batch                          output of the model     an example is right if
class      (B,) int64                                 (B, classes)            its class is right
position   (B, L) int64, UNSCORED without a label     (B, L, classes)         every scored position is right
value      (B,) float32                               (B, 1)                  its error is within the tolerance
next       (B, L) int64, UNSCORED after the last      (B, L, vocabulary)      (each token counts by itself)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.task import UNSCORED, Protocol, Task

Z = NormalDist().inv_cdf(0.975)
"""Quantile of the normal distribution for a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Target:
    """One class for each sequence. outputs: width of the model's output; tolerance: of a real value, else 0.

    prior: the baseline that predicts the most frequent label; per_position: whether the model predicts at every
    position. selects: the criterion for checkpoints and learning rates: the highest validation "accuracy" or the lowest
    "loss". start: the token at the start of each packed document; None if an example is part of one document.
    """

    outputs: int
    tolerance: float = 0.0
    start: int | None = None
    prior: ClassVar[str] = "majority class"
    per_position: ClassVar[bool] = False
    selects: ClassVar[str] = "accuracy"

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the answers."""
        return F.cross_entropy(output.float(), labels)

    def imitation(self, output: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Mean loss of a student against the output of a teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531):
        T^2 KL(softmax(taught / T) || softmax(output / T))."""
        student, teacher = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (output, taught))
        return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def difficulty(self, output: Tensor, labels: Tensor) -> Tensor:
        """-log p of the label of each example, (B,); the mean over the scored positions if there are several, and the
        squared error for a real value."""
        return F.cross_entropy(output.float(), labels, reduction="none")

    def predict(self, output: Tensor) -> Tensor:
        """The model's answers, in the shape of the labels."""
        return output.argmax(dim=-1)

    def right(self, output: Tensor, labels: Tensor) -> Tensor:
        """Whether each answer is right: (k,) bool."""
        return self.predict(output) == labels

    def sample(self, output: Tensor, labels: Tensor) -> Tensor:
        """Labels drawn from the distribution that the output describes."""
        return torch.distributions.Categorical(logits=output.float()).sample()

    def answers(self, output: Tensor, example: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The answers of a batch, one entry for each: number of the example, prediction and label."""
        return {"example": example, "prediction": self.predict(output), "label": labels}

    def score(self, answers: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The fields of a Score, from the answers of all examples (`join`)."""
        return _share(answers["prediction"] == answers["label"])

    def stored(self, answers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Predictions and labels in the smallest type that holds them."""
        kind = np.min_scalar_type(self.outputs - 1)
        return {name: answers[name].astype(kind) for name in ("prediction", "label")}


class PositionTarget(Target):
    """One class for each scored position."""

    per_position = True

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.float().flatten(0, 1), labels.flatten(), ignore_index=UNSCORED)

    def imitation(self, output: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        scored = labels != UNSCORED
        return super().imitation(output[scored], taught[scored], labels, temperature)

    def difficulty(self, output: Tensor, labels: Tensor) -> Tensor:
        nats = F.cross_entropy(output.float().transpose(1, 2), labels, ignore_index=UNSCORED, reduction="none")
        return nats.sum(dim=1) / (labels != UNSCORED).sum(dim=1).clamp(min=1)

    def right(self, output: Tensor, labels: Tensor) -> Tensor:
        return (self.predict(output) == labels)[labels != UNSCORED]

    def sample(self, output: Tensor, labels: Tensor) -> Tensor:
        return super().sample(output, labels).masked_fill(labels == UNSCORED, UNSCORED)

    def answers(self, output: Tensor, example: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scored = labels != UNSCORED
        whole = super().answers(output, example.unsqueeze(1).expand_as(labels), labels)
        return {name: column[scored] for name, column in whole.items()}

    def score(self, answers: Mapping[str, np.ndarray]) -> dict[str, Any]:
        right = answers["prediction"] == answers["label"]
        starts = _starts(answers["example"])
        lasts = np.append(starts[1:], len(right)) - 1
        shares = {"positions": float(right.mean()), "last": float(right[lasts].mean())}
        return _share(np.logical_and.reduceat(right, starts)) | shares


class NextTarget(PositionTarget):
    """The next token, at every position but the last."""

    selects = "loss"

    def answers(self, output: Tensor, example: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scored = labels != UNSCORED
        nats = F.cross_entropy(output[scored].float(), labels[scored], reduction="none")
        return super().answers(output, example, labels) | {"nats": nats}

    def score(self, answers: Mapping[str, np.ndarray]) -> dict[str, Any]:
        bits, starts = answers["nats"].astype(np.float64) / math.log(2), _starts(answers["example"])
        sizes = np.diff(starts, append=len(bits))
        before = np.arange(len(bits)) - np.repeat(starts, sizes) + 1
        mean = float(bits.mean())
        scores = {"bits": mean, "bits_at": _by_context(bits, before)}
        documents = starts if self.start is None else np.union1d(0, np.flatnonzero(answers["label"] == self.start))
        if len(documents) > 1:
            # standard error of a ratio of sums: documents are independent, tokens of one document are not
            residuals = np.add.reduceat(bits, documents) - mean * np.diff(documents, append=len(bits))
            half = Z * math.sqrt(len(documents) / (len(documents) - 1) * float(np.square(residuals).sum())) / len(bits)
            scores |= {"bits_low": mean - half, "bits_high": mean + half}
        return _share(answers["prediction"] == answers["label"]) | scores


class ValueTarget(Target):
    """A real value for each sequence."""

    prior = "mean value"

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(self.predict(output), labels)

    def imitation(self, output: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """The squared error between both; a real value has no temperature."""
        return F.mse_loss(self.predict(output), self.predict(taught))

    def difficulty(self, output: Tensor, labels: Tensor) -> Tensor:
        return (self.predict(output) - labels).square()

    def predict(self, output: Tensor) -> Tensor:
        return output.float().squeeze(-1)

    def right(self, output: Tensor, labels: Tensor) -> Tensor:
        return (self.predict(output) - labels).abs() <= self.tolerance

    def sample(self, output: Tensor, labels: Tensor) -> Tensor:
        predicted = self.predict(output)
        return predicted + torch.randn_like(predicted)

    def score(self, answers: Mapping[str, np.ndarray]) -> dict[str, Any]:
        errors = np.abs(answers["prediction"] - answers["label"])
        error = float(np.square(errors, dtype=np.float64).mean())
        return _share(errors <= np.float32(self.tolerance)) | {"error": error, "tolerance": self.tolerance}

    def stored(self, answers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: answers[name].astype(np.float32) for name in ("prediction", "label")}


KINDS = {"class": Target, "position": PositionTarget, "value": ValueTarget, "next": NextTarget}


def target_of(task: Task, protocol: Protocol) -> Target:
    """The target that a task declares."""
    outputs = {"value": 1, "next": protocol.vocabulary}.get(task.target, task.classes)
    return KINDS[task.target](outputs, task.tolerance, task.start if protocol.packed else None)


def join(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The answers of several batches in the order of the examples."""
    parts = list(parts)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["example"], kind="stable")
    return {name: column[order] for name, column in joined.items()}


def _starts(example: np.ndarray) -> np.ndarray:
    """The index at which each example begins; its answers are contiguous, in the order of positions."""
    return np.flatnonzero(np.diff(example, prepend=-1))


def _by_context(bits: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Mean bits of the tokens with 1-3, 4-15, 16-63 ... tokens before them."""
    group = np.searchsorted(4 ** np.arange(1, 16), before, side="right")
    return {f"{4**k}-{4 ** (k + 1) - 1}": float(bits[group == k].mean()) for k in np.unique(group).tolist()}


def _share(right: np.ndarray) -> dict[str, Any]:
    correct = int(right.sum())
    return {"accuracy": correct / len(right), "correct": correct, "n": len(right)}
