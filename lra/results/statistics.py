"""Means, intervals and tests for two different uncertainties, which are never mixed.

    over seeds        variation between training seeds      t interval, Welch's t, stratified bootstrap
    of the test set   variation between test examples       Wilson interval, McNemar, paired permutation

`separation` tests two architectures for both. In `ranks`, architectures that do not differ significantly share a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft, optimize, special, stats

LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % interval.

    source: "seeds" (t interval over runs), "test set" (Wilson, one run), "seeds, bootstrap" (task average) or "runs,
    bootstrap" (scaling laws). count: number of runs. deviation: standard deviation over the runs; None for one run.
    """

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
    """Mean over seeds if there are two or more runs, else of the test set."""
    return over_seeds(accuracies) if len(accuracies) > 1 else of_test_set(accuracies[0], n)


def at_chance(accuracy: float, n: int, floor: float) -> bool:
    """Whether a run is not significantly above `floor` (one-sided exact binomial test, 1 %)."""
    return bool(stats.binomtest(round(accuracy * n), n, floor, alternative="greater").pvalue > 0.01)


def success_rate(succeeded: int, runs: int) -> Estimate:
    """Share of runs above chance, with its Wilson interval over seeds."""
    interval = stats.binomtest(succeeded, runs).proportion_ci(method="wilson")
    return Estimate(succeeded / runs, float(interval.low), float(interval.high), runs, "seeds")


def task_average(scores: Mapping[str, Sequence[float]], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Unweighted mean over tasks of the mean over seeds; the interval resamples seeds within each task.

    The interval is a percentile bootstrap. With k seeds it covers (k - 1) / k of a task's variance, so it is too narrow
    for few seeds. If a task has one seed, there is no interval (NaN). Raises ValueError if a task has no score.
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
    """McNemar's test: exact two-sided p value of the hypothesis that two classifiers are equally accurate.

    a, b: (n,) bool, whether predictions are right.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Accuracy of a minus that of b on the same test examples, with a 95 % interval over test examples.

    a, b: (n,) bool, whether each prediction is right. The interval is Tango's score interval for paired proportions
    (1998), which is also valid for small numbers of examples.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    difference, z = (only_a - only_b) / n, float(stats.norm.ppf(1 - LEVEL / 2))

    def score(delta: float) -> float:
        """Standardised distance of the observed difference from `delta`."""
        # maximum likelihood estimate of the probability that only b is right, if the difference were delta
        linear = (2 * n - only_a + only_b) * delta - only_a - only_b
        constant = -only_b * delta * (1 - delta)
        q = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return (only_a - only_b - n * delta) / math.sqrt(variance) if variance > 0 else 0.0

    def bound(end: float, target: float) -> float:
        """The delta at which the score has the target value, between the difference and an end of [-1, 1]."""
        inside = end * (1 - 1e-12)
        if (score(inside) - target) * end > 0:
            return end
        return float(optimize.brentq(lambda delta: score(delta) - target, difference, inside))

    return Estimate(difference, bound(-1.0, z), bound(1.0, -z), 1, "test set")


def paired_permutation(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p value of the hypothesis that a and b, averaged over runs, are exchangeable on every example.

    a: (runs, n) bool, b: (other runs, n) bool, whether each test prediction is right. One run each: McNemar's test.

    Under random signs the sum of the differences is -reach + 2 U, where U = sum of d_i over the examples with a plus.
    All 2^n sign changes are counted at once: the distribution of U is the inverse Fourier transform of the product of
    (1 + exp(i d_i t)) / 2 over the examples.
    """
    differences = _differences(a, b)
    observed, sizes = abs(int(differences.sum())), np.abs(differences[differences != 0])
    reach = int(sizes.sum())
    if not reach:
        return 1.0
    points = fft.next_fast_len(reach + 1, real=True)
    angles = np.pi * np.arange(points // 2 + 1) / points
    spectrum = np.exp(-1j * reach * angles)
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        spectrum *= np.cos(size * angles) ** count
    mass = fft.irfft(spectrum, points)[: reach + 1]
    # sums of at least `observed` in size are at both ends; neighbouring sums differ by 2
    tail = (reach - observed) // 2 + 1
    return float(np.clip(mass[:tail].sum() + mass[-tail:].sum(), 0, 1)) if observed else 1.0


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differences of the numbers of right predictions for each example, scaled to the same number of runs."""
    runs = math.lcm(len(a), len(b))
    scaled = (x.sum(axis=0, dtype=np.int64) * (runs // len(x)) for x in (a, b))
    return np.subtract(*scaled)


def permutation_bound(a: np.ndarray, b: np.ndarray) -> float:
    """A cheap upper bound of `paired_permutation` (Hoeffding 1963)."""
    differences = _differences(a, b)
    square = float((differences**2).sum())
    return min(1.0, 2 * math.exp(-(float(differences.sum()) ** 2) / (2 * square))) if square else 1.0


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Welch's test: two-sided p value of the hypothesis that the means over seeds are equal; variances may differ."""
    difference, error, freedom = _welch(a, b)
    if not error:
        return 1.0 if not difference else 0.0
    return float(2 * special.stdtr(freedom, -abs(difference) / error))


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of a minus that of b, with Welch's 95 % interval over seeds. a, b: at least two runs each."""
    difference, error, freedom = _welch(a, b)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error if error else 0.0
    return Estimate(difference, difference - half, difference + half, min(len(a), len(b)), "seeds")


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the means, its standard error, and the degrees of freedom."""
    (mean_a, square_a), (mean_b, square_b) = ((np.mean(x), np.var(x, ddof=1) / len(x)) for x in (a, b))
    freedom: float = 0.0
    if square_a + square_b:
        freedom = float((square_a + square_b) ** 2 / (square_a**2 / (len(a) - 1) + square_b**2 / (len(b) - 1)))
    return float(mean_a - mean_b), math.sqrt(square_a + square_b), freedom


def holm(pvalues: Sequence[float]) -> list[float]:
    """P values adjusted for multiple testing (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(pvalues), 0.0
    for place, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        highest = max(highest, min(1.0, (len(pvalues) - place) * pvalues[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Runs:
    """The runs of one architecture. accuracies: one for each run; correct: (runs, n) bool, on test examples shared by
    all architectures that are compared, or None if predictions are not stored."""

    accuracies: Sequence[float]
    correct: np.ndarray | None = None


def separation(a: Runs, b: Runs, decided: float = 0.0) -> float:
    """P value of the hypothesis that a and b are equally good: the larger of Welch's test over seeds and the
    permutation test over test examples, so with two or more seeds both must be significant. If either has one run, only
    the test examples count; the value is 1 without predictions.

    decided: threshold below which p need not be exact. If it is above 0, the result may be an upper bound below this
    threshold, and 1 for values of LEVEL and above.
    """
    over_seeds = welch(a.accuracies, b.accuracies) if min(len(a.accuracies), len(b.accuracies)) > 1 else None
    if a.correct is None or b.correct is None or a.correct.shape[1] != b.correct.shape[1]:
        return 1.0 if over_seeds is None else over_seeds
    if decided and over_seeds is not None and over_seeds >= LEVEL:
        return 1.0
    bound = permutation_bound(a.correct, b.correct) if decided else 1.0
    of_examples = bound if bound < decided else paired_permutation(a.correct, b.correct)
    return max(of_examples, over_seeds or 0.0)


def ranks(runs: Sequence[Runs]) -> list[int]:
    """Rank of each architecture: 1 + the number of others that are significantly better (5 %, Holm over all pairs).

    No architecture ranks above one with a higher mean, so a large variance between runs is no advantage.
    """
    means = [math.fsum(r.accuracies) / len(r.accuracies) for r in runs]
    pairs = [(i, j) for i in range(len(runs)) for j in range(i)]
    # whatever Bonferroni's bound rejects, Holm's procedure rejects as well
    decided = LEVEL / max(len(pairs), 1)
    ranks = [1] * len(runs)
    for (i, j), p in zip(pairs, holm([separation(runs[i], runs[j], decided) for i, j in pairs]), strict=True):
        if p < LEVEL and means[i] != means[j]:
            ranks[i if means[i] < means[j] else j] += 1
    highest = 1
    for i in sorted(range(len(runs)), key=lambda i: -means[i]):
        ranks[i] = highest = max(highest, ranks[i])
    return ranks


def seeds_needed(deviation: float, half_width: float, have: int = 0) -> int:
    """Number of further runs until the 95 % t interval over seeds is at most ± half_width, if `deviation` does not
    change. have: number of runs so far."""
    if half_width <= 0:
        raise ValueError(f"half_width is {half_width}; more than 0")
    n = 2
    while stats.t.ppf(1 - LEVEL / 2, n - 1) * deviation / math.sqrt(n) > half_width:
        # at least the number that the normal quantile requires
        n = max(n + 1, math.floor((stats.norm.ppf(1 - LEVEL / 2) * deviation / half_width) ** 2))
    return max(n - have, 0)
