"""Means, intervals and tests. Two different uncertainties, never mixed: over training seeds, and of one test set.

    over seeds        would another seed say the same?      t interval, Welch's t, stratified bootstrap
    of the test set   would other test examples say so?     Wilson interval, McNemar, paired permutation

`separation` asks both questions of two architectures; `ranks` gives one rank to what it does not tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import signal, stats

LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """mean with a 95 % interval; `source`: "seeds" (t interval over runs), "test set" (Wilson, one run) or "seeds,
    bootstrap" (task average). deviation: standard deviation over the runs, None where there is one run."""

    mean: float
    low: float
    high: float
    count: int
    source: str
    deviation: float | None = None

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of at least two runs that differ in the seed, with Student's t interval, cut to [0, 1]."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least 2 runs, got {n}")
    mean, deviation = math.fsum(values) / n, float(np.std(values, ddof=1))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0), n, "seeds", deviation)


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


def success_rate(succeeded: int, runs: int) -> Estimate:
    """Share of runs that left chance, with its Wilson interval; the interval is over seeds."""
    interval = stats.binomtest(succeeded, runs).proportion_ci(method="wilson")
    return Estimate(succeeded / runs, float(interval.low), float(interval.high), runs, "seeds")


def task_average(scores: Mapping[str, Sequence[float]], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Unweighted mean over tasks of the mean over seeds; the interval resamples seeds within each task.

    A percentile bootstrap: with k seeds it sees (k - 1) / k of a task's variance, so it is narrow for few of them.
    Where a task has one seed there is no interval (NaN). Raises ValueError where a task has no score.
    """
    if not scores or not all(len(values) for values in scores.values()):
        raise ValueError("a task average needs a score of every task")
    mean = math.fsum(math.fsum(values) / len(values) for values in scores.values()) / len(scores)
    fewest = min(len(values) for values in scores.values())
    if fewest < 2:
        return Estimate(mean, math.nan, math.nan, fewest, "seeds, bootstrap")
    random, total = np.random.default_rng(seed), np.zeros(resamples)
    for _, values in sorted(scores.items()):
        drawn = random.integers(0, len(values), (resamples, len(values)))
        total += np.asarray(values, float)[drawn].mean(axis=1)
    low, high = np.quantile(total / len(scores), (LEVEL / 2, 1 - LEVEL / 2))
    return Estimate(mean, float(low), float(high), fewest, "seeds, bootstrap")


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p that two classifiers are right equally often. a, b: (n,) bool, right on each test example."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_permutation(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p that a and b are exchangeable example by example, each averaged over its runs.

    a: (runs, n) bool, b: (other runs, n) bool, right on each test example. The sum of differences under random signs
    is a sum of scaled binomials, so all 2^n sign changes are counted without visiting them. One run each: McNemar.
    """
    common = math.lcm(len(a), len(b))
    each = a.sum(axis=0, dtype=np.int64) * (common // len(a)) - b.sum(axis=0, dtype=np.int64) * (common // len(b))
    observed, mass, reach = abs(int(each.sum())), np.ones(1), 0
    for size, count in zip(*np.unique(np.abs(each[each != 0]), return_counts=True), strict=True):
        step = np.zeros(2 * size * count + 1)
        step[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        mass, reach = signal.fftconvolve(mass, step), reach + int(size * count)
    sums = np.arange(-reach, reach + 1)
    return float(np.clip(mass[np.abs(sums) >= observed].sum(), 0, 1))


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p that the means over seeds are equal, the variances being what they are."""
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    of_a, of_b = ((np.mean(x), np.std(x, ddof=1), len(x)) for x in (a, b))
    # ttest_ind warns where the runs of one of them agree
    return float(stats.ttest_ind_from_stats(*of_a, *of_b, equal_var=False).pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """P values adjusted for how many there are (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(pvalues), 0.0
    for place, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        highest = max(highest, min(1.0, (len(pvalues) - place) * pvalues[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Runs:
    """What is known of one architecture. accuracies: one a run; right: (runs, n) bool on the same test examples for
    all that are compared, or None where predictions are not at hand."""

    accuracies: Sequence[float]
    right: np.ndarray | None = None


def separation(a: Runs, b: Runs) -> float:
    """P value that a and b are equally good: the larger of that over seeds and that of the test set, so that both have
    to speak. With one run of either, seeds cannot speak and the test set alone does; 1 where neither can."""
    found = []
    if min(len(a.accuracies), len(b.accuracies)) > 1:
        found.append(welch(a.accuracies, b.accuracies))
    if a.right is not None and b.right is not None and a.right.shape[1] == b.right.shape[1]:
        found.append(paired_permutation(a.right, b.right))
    return max(found, default=1.0)


def ranks(runs: Sequence[Runs]) -> list[int]:
    """1 + the number of others that are better and told apart from it (5 %, Holm over all pairs), and never above one
    with a higher mean: an architecture whose runs scatter is not lifted by being hard to tell from anything."""
    means = [math.fsum(r.accuracies) / len(r.accuracies) for r in runs]
    pairs = [(i, j) for i in range(len(runs)) for j in range(i)]
    found = [1] * len(runs)
    for (i, j), p in zip(pairs, holm([separation(runs[i], runs[j]) for i, j in pairs]), strict=True):
        if p < LEVEL and means[i] != means[j]:
            found[i if means[i] < means[j] else j] += 1
    highest = 1
    for i in sorted(range(len(runs)), key=lambda i: -means[i]):
        found[i] = highest = max(highest, found[i])
    return found


def seeds_needed(deviation: float, half_width: float, have: int = 0) -> int:
    """Runs still to make until the 95 % t interval over seeds is at most ± half_width, should `deviation` stay."""
    if half_width <= 0:
        raise ValueError(f"half_width is {half_width}; more than 0")
    n = 2
    while stats.t.ppf(1 - LEVEL / 2, n - 1) * deviation / math.sqrt(n) > half_width:
        # no fewer than the normal quantile asks for
        n = max(n + 1, math.floor((stats.norm.ppf(1 - LEVEL / 2) * deviation / half_width) ** 2))
    return max(n - have, 0)
