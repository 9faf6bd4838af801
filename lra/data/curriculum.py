"""Curricula by difficulty: samplers that use the difficulty of each training example.

    Staged    the easiest bin first, one bin more per stage (Bengio et al. 2009, ICML)
    Dynamic   the share of hard examples in a batch is the accuracy of the last validation

The batch of a step is a function of its number, the seed and, for `Dynamic`, the validations before it. These are in
the checkpoints, so a resumed run sees the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lra.data.batches import Sampler
from lra.errors import UserError

Curve = Callable[[], Sequence[Mapping[str, float]]]
"""The validations so far, each with its "step" and "validation_accuracy"."""


def cut(difficulty: np.ndarray, bins: int, batch_size: int) -> list[np.ndarray]:
    """The indices of the examples in equal bins, the easiest first; examples of equal difficulty keep their order.

    difficulty: (n,). Raises UserError for more bins than examples and for bins that do not fill a batch.
    """
    if bins > len(difficulty):
        raise UserError(
            f"{bins} bins for {len(difficulty)} training examples; set train.curriculum_bins to at most their number"
        )
    parts = np.array_split(np.argsort(difficulty, kind="stable"), bins)
    if (smallest := len(parts[-1])) < batch_size:
        raise UserError(
            f"a curriculum of {bins} bins has {smallest} of {len(difficulty)} training examples in a bin, and "
            f"data.batch_size is {batch_size}; lower data.batch_size or the number of bins"
        )
    return parts


@dataclass
class Staged:
    """The plan of a curriculum by difficulty. Over the first `steps` steps the `bins` are added one by one, after equal
    numbers of steps; later batches are those of `plain`. Within a stage every example is seen equally often."""

    plain: Sampler
    bins: Sequence[np.ndarray]
    steps: int
    _stage: int = -1

    @property
    def per_epoch(self) -> int:
        return self.plain.per_epoch

    def batch(self, step: int) -> np.ndarray:
        if step >= self.steps:
            return self.plain.batch(step)
        added = len(self.bins) - 1
        stage = step * added // self.steps
        if stage != self._stage:
            self._stage, self._known = stage, np.sort(np.concatenate(self.bins[: stage + 1]))
            self._sampler = Sampler(self.plain.lengths[self._known], self.plain.batch_size, self.plain.seed)
        first = -(-stage * self.steps // added)
        return self._known[self._sampler.batch(step - first)]


@dataclass
class Dynamic:
    """The plan of a dynamic curriculum. Each batch is drawn from the two halves of the examples, `bins`. The share of
    hard examples is the accuracy of the last validation, and 0 before the first. A validation takes effect at the step
    after the next one, because the next may be planned before the validation has run."""

    plain: Sampler
    bins: Sequence[np.ndarray]
    curve: Curve

    @property
    def per_epoch(self) -> int:
        return self.plain.per_epoch

    def share(self, step: int) -> float:
        """The share of hard examples in the batch of a step."""
        known = [float(point["validation_accuracy"]) for point in self.curve() if point["step"] < step]
        return known[-1] if known else 0.0

    def batch(self, step: int) -> np.ndarray:
        size = self.plain.batch_size
        hard = round(self.share(step) * size)
        random = np.random.default_rng([self.plain.seed, step, 2])
        counts = (size - hard, hard)
        drawn = [random.choice(part, count, replace=False) for part, count in zip(self.bins, counts, strict=True)]
        # processes and accumulated parts take every k-th example
        return random.permutation(np.concatenate(drawn))
