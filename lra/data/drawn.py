"""Training examples: read from a prepared split, or drawn anew at every step by a generated task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from lra.data.batches import DeviceSet, choose
from lra.data.prepared_sets import Prepared
from lra.errors import UserError
from lra.model import Batch
from lra.task import Protocol, Task


@dataclass(frozen=True)
class Successive:
    """The examples of each training step, one after the other. repeat: begin again after `per_epoch` steps."""

    batch_size: int
    per_epoch: int
    repeat: bool

    def batch(self, step: int) -> np.ndarray:
        first = self.batch_size * (step % self.per_epoch if self.repeat else step)
        return np.arange(first, first + self.batch_size)


@dataclass(frozen=True)
class DrawnSet:
    """Training examples of a generated task. Example i is row i % batch_size of step i // batch_size, and depends on
    the seed and on i alone, so that any process and any resumed run draws the same.

    count: number of different examples, 0 for no end; sample: number of examples that an epoch of such a set has.
    """

    task: Task
    protocol: Protocol
    batch_size: int
    seed: int
    device: torch.device
    count: int
    sample: int
    resident: ClassVar[bool] = True
    _drawn: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.count or self.sample

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the examples of a batch, at most: (batch_size, 1)."""
        return np.full((self.batch_size, 1), self.protocol.length)

    def batch(self, examples: np.ndarray) -> Batch:
        """The given examples, which are all of one step."""
        (step,) = set((examples // self.batch_size).tolist())
        if step not in self._drawn:
            # the parts of an accumulated step follow one another
            self._drawn.clear()
            self._drawn[step] = self.task.training_batch(self.protocol, self.batch_size, self.seed, step)
        drawn, labels = self._drawn[step]
        rows = examples % self.batch_size
        values = torch.from_numpy(drawn[rows].astype(np.float32 if self.protocol.real else np.int32)).unsqueeze(1)
        answers = torch.from_numpy(labels[rows].astype(np.float32 if self.task.target == "value" else np.int64))
        mask = torch.ones(values.shape[:3], dtype=torch.bool)
        parts = (values, mask, answers, torch.from_numpy(examples))
        return Batch(*(part.to(self.device, non_blocking=True) for part in parts))

    def longest(self, examples: np.ndarray) -> int:
        """Tokens of the given examples."""
        return self.batch(examples).mask.shape[-1]

    def sampler(self, batch_size: int, seed: int, *, grow_from: int = 0, grow_steps: int = 0) -> Successive:
        """The examples of each step. Raises UserError for what only stored examples allow."""
        if grow_steps:
            raise UserError(f"train.curriculum_steps: {self.task.name} draws examples of its own lengths; leave it out")
        if batch_size != self.batch_size:
            raise UserError(f"pretrain.batch_size is {batch_size}; {self.task.name} draws batches of {self.batch_size}")
        return Successive(batch_size, max(len(self) // batch_size, 1), self.count > 0)


def training_set(
    prepared: Prepared, device: torch.device, batch_size: int, seed: int, count: int = 0
) -> DeviceSet | DrawnSet:
    """The training examples of a prepared task, or the first `count` of them."""
    split = prepared.split("train")
    if prepared.task.generated:
        return DrawnSet(prepared.task, prepared.protocol, batch_size, seed, device, count, len(split))
    return DeviceSet.of(split, prepared.protocol, device, choose(len(split), count))
