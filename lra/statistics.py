"""Means and intervals. Two different uncertainties, never mixed: over training seeds, and of one test set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """mean with a 95 % interval; `source`: "seeds" (t interval over runs) or "test set" (Wilson, one run)."""

    mean: float
    low: float
    high: float
    count: int
    source: str

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of at least two runs that differ in the seed, with Student's t interval, cut to [0, 1]."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least 2 runs, got {n}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0), n, "seeds")


def of_test_set(accuracy: float, n: int) -> Estimate:
    """Wilson interval of one run's accuracy on n test examples."""
    interval = stats.binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    return Estimate(accuracy, float(interval.low), float(interval.high), 1, "test set")


def estimate(accuracies: Sequence[float], n: int) -> Estimate:
    """Over seeds where there are two or more runs, of the test set otherwise."""
    return over_seeds(accuracies) if len(accuracies) > 1 else of_test_set(accuracies[0], n)


def at_chance(accuracy: float, n: int, floor: float) -> bool:
    """Whether a run is not significantly above `floor` (one-sided exact binomial test, 1 %)."""
    return bool(stats.binomtest(round(accuracy * n), n, floor, alternative="greater").pvalue > 0.01)
