"""Statistics against SciPy, against definitions, and against brute-force enumeration of small cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lra.results import statistics
from lra.results.statistics import Runs


def test_interval_over_seeds_is_students() -> None:
    values = [0.5, 0.6, 0.55]
    got = statistics.over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert [got.low, got.high] == pytest.approx([low, high])
    assert got.deviation == pytest.approx(np.std(values, ddof=1))
    assert got.half_width == pytest.approx((high - low) / 2)
    assert (got.count, got.source) == (3, "seeds")
    with pytest.raises(ValueError, match="at least 2"):
        statistics.over_seeds([0.5])


def test_interval_of_the_test_set_is_wilsons_and_says_so() -> None:
    one = statistics.of_test_set(0.3, 200)
    z, p, n = stats.norm.ppf(0.975), 0.3, 200
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert [one.low, one.high] == pytest.approx([centre - half, centre + half])
    assert (one.source, one.deviation) == ("test set", None)
    assert statistics.estimate([0.3], 200) == one
    assert statistics.estimate([0.3, 0.4], 200).source == "seeds"


def test_chance_is_told_from_skill() -> None:
    assert statistics.at_chance(0.17, 2000, 0.17)
    assert statistics.at_chance(0.18, 2000, 0.17)
    assert not statistics.at_chance(0.20, 2000, 0.17)


def test_success_rate() -> None:
    rate = statistics.success_rate(3, 5)
    assert rate.mean == 0.6
    assert 0.2 < rate.low < 0.6 < rate.high < 0.9
    assert statistics.success_rate(0, 5).low == 0


def test_task_average_resamples_within_tasks() -> None:
    scores = {"a": [0.1, 0.2, 0.4], "b": [0.8, 0.9, 0.6]}
    got = statistics.task_average(scores, resamples=50_000)
    assert got.mean == pytest.approx(0.5)
    every = [
        (np.mean(x) + np.mean(y)) / 2
        for x in itertools.product(scores["a"], repeat=3)
        for y in itertools.product(scores["b"], repeat=3)
    ]
    assert [got.low, got.high] == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.01)
    assert got == statistics.task_average(dict(reversed(scores.items())), resamples=50_000)
    few = statistics.task_average(scores, resamples=20)
    assert few == statistics.task_average(scores, resamples=20, seed=0)
    assert few != statistics.task_average(scores, resamples=20, seed=1)


def test_task_average_never_over_missing_tasks_nor_from_one_seed() -> None:
    with pytest.raises(ValueError, match="every task"):
        statistics.task_average({"a": [0.5], "b": []})
    one = statistics.task_average({"a": [0.5], "b": [0.7, 0.9]})
    assert one.mean == pytest.approx(0.65)
    assert math.isnan(one.low)


def test_mcnemar_is_the_binomial_test_of_the_discordant() -> None:
    a = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0], bool)
    b = np.array([0, 0, 0, 0, 1, 0, 1, 1, 0], bool)
    assert statistics.mcnemar(a, b) == pytest.approx(2 * (math.comb(5, 0) + math.comb(5, 1)) / 2**5)
    assert statistics.mcnemar(a, a) == 1


def _enumerated(a: np.ndarray, b: np.ndarray) -> float:
    """All sign changes, one after the other."""
    each = a.mean(axis=0) - b.mean(axis=0)
    sums = [abs(np.dot(signs, each)) for signs in itertools.product((-1, 1), repeat=len(each))]
    return float(np.mean([s >= abs(each.sum()) - 1e-9 for s in sums]))


@pytest.mark.parametrize(("runs", "others"), [(1, 1), (2, 3), (5, 5), (1, 4)])
def test_paired_permutation_equals_enumeration(runs: int, others: int) -> None:
    random = np.random.default_rng(runs)
    for _ in range(5):
        a, b = random.random((runs, 11)) < 0.7, random.random((others, 11)) < 0.45
        assert statistics.paired_permutation(a, b) == pytest.approx(_enumerated(a, b))


def test_paired_permutation_agrees_with_scipy_and_with_mcnemar() -> None:
    random = np.random.default_rng(0)
    a, b = random.random((3, 100)) < 0.7, random.random((3, 100)) < 0.6
    sampled = stats.permutation_test(
        (a.mean(axis=0), b.mean(axis=0)), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=5_000, rng=random,
    )  # fmt: skip
    assert statistics.paired_permutation(a, b) == pytest.approx(sampled.pvalue, abs=0.02)
    assert statistics.paired_permutation(a[:1], b[:1]) == pytest.approx(statistics.mcnemar(a[0], b[0]))
    assert statistics.paired_permutation(a, a) == pytest.approx(1)


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Adjusted p: the largest Bonferroni p over all intersections a hypothesis takes part in."""
    ps = [0.01, 0.04, 0.03, 0.005, 0.5, 0.03]
    sets = [s for n in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), n)]
    wanted = [max(min(1.0, len(s) * min(ps[j] for j in s)) for s in sets if i in s) for i in range(len(ps))]
    assert statistics.holm(ps) == pytest.approx(wanted)
    assert statistics.holm([]) == []


def test_welch_is_scipys_and_survives_equal_runs() -> None:
    a, b = [0.5, 0.52, 0.51], [0.55, 0.58, 0.5]
    assert statistics.welch(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert statistics.welch([0.5, 0.5], [0.5, 0.5]) == 1
    assert statistics.welch([0.5, 0.5], [0.6, 0.6]) == 0
    # without any spread of one of them Welch's test is Student's of the other, with its degrees of freedom
    assert statistics.welch([0.5, 0.5], b) == pytest.approx(stats.ttest_1samp(b, 0.5).pvalue)
    assert statistics.welch(b, [0.5, 0.5]) == pytest.approx(stats.ttest_1samp(b, 0.5).pvalue)


def _runs(random: np.random.Generator, difference: float, seeds: int = 5, n: int = 2000) -> tuple[Runs, Runs]:
    """Two architectures on one test set whose examples are hard or easy for both; seeds vary by half a point."""
    easy = random.beta(0.8, 0.6, n)

    def one(shift: float) -> Runs:
        chances = np.clip(easy + shift + random.normal(0, 0.005, (seeds, 1)), 0, 1)
        right = random.random((seeds, n)) < chances
        return Runs(list(right.mean(axis=1)), right)

    return one(difference), one(0.0)


def test_a_planted_difference_is_found_and_a_planted_zero_is_not() -> None:
    random, times = np.random.default_rng(1), 40
    # the shift is cut off at probabilities 0 and 1, so 2.3 planted are 2 in accuracy
    found = [statistics.separation(*_runs(random, 0.023)) < 0.05 for _ in range(times)]
    false = [statistics.separation(*_runs(random, 0.0)) < 0.05 for _ in range(times)]
    assert np.mean(found) > 0.6
    # at most 5 % by construction: more than 6 of 40 would happen in 3 of 1,000
    assert sum(false) <= 6


def test_seeds_and_test_set_both_have_to_speak() -> None:
    random = np.random.default_rng(2)
    right = random.random((3, 4000)) < 0.6
    worse = right & (random.random((3, 4000)) < 0.95)
    scattered = Runs([0.4, 0.6, 0.8], right)
    assert statistics.separation(Runs([0.45, 0.55, 0.65], worse), scattered) > 0.05
    assert (
        statistics.separation(Runs([0.600, 0.601, 0.602], right[:, :50]), Runs([0.570, 0.571, 0.572], worse[:, :50]))
        > 0.05
    )
    assert statistics.separation(Runs([0.60, 0.601, 0.602], right), Runs([0.57, 0.571, 0.572], worse)) < 0.01
    assert statistics.separation(Runs([0.6], right[:1]), Runs([0.57], worse[:1])) < 0.01
    assert statistics.separation(Runs([0.6]), Runs([0.1])) == 1


def test_ranks_tie_where_evidence_does_not_separate() -> None:
    best, close = Runs([0.80, 0.81, 0.82, 0.80, 0.81]), Runs([0.81, 0.80, 0.80, 0.81, 0.80])
    low, lowest = Runs([0.60, 0.61, 0.60, 0.62, 0.61]), Runs([0.3, 0.31, 0.3, 0.32, 0.3])
    assert statistics.ranks([low, best, lowest, close]) == [3, 1, 4, 1]
    scattered = Runs([0.2, 0.9, 0.3, 0.8, 0.3])
    assert statistics.separation(scattered, best) > 0.05
    assert statistics.ranks([best, low, scattered]) == [1, 2, 2]
    assert statistics.ranks([Runs([0.9]), Runs([0.1])]) == [1, 1]
    assert statistics.ranks([]) == []


def test_ranks_are_those_of_the_exact_p_values() -> None:
    """`ranks` does not compute a p value exactly where it cannot change a decision."""
    random = np.random.default_rng(4)
    exact = 0
    for seeds in (1, 2, 3):
        for _ in range(3):
            chances = np.concatenate([random.normal(0.5, 0.03, 6), [0.1, 0.9]])
            correct = [random.random((seeds, 300)) < chance + random.normal(0, 0.01, (seeds, 1)) for chance in chances]
            runs = [Runs(list(c.mean(axis=1)), c) for c in correct]
            means = [np.mean(r.accuracies) for r in runs]
            pairs = [(i, j) for i in range(len(runs)) for j in range(i)]
            adjusted = statistics.holm([statistics.separation(runs[i], runs[j]) for i, j in pairs])
            worse = [0] * len(runs)
            for (i, j), p in zip(pairs, adjusted, strict=True):
                if p < 0.05:
                    worse[i if means[i] < means[j] else j] += 1
            order = sorted(range(len(runs)), key=lambda i: -means[i])
            wanted = np.maximum.accumulate([1 + worse[i] for i in order])
            assert [statistics.ranks(runs)[i] for i in order] == list(wanted)
            exact += len({*wanted}) > 1
    assert exact >= 6


def test_the_bound_is_above_the_exact_p() -> None:
    random = np.random.default_rng(5)
    for difference in (0.0, 0.1, 0.3):
        a, b = random.random((3, 200)) < 0.4 + difference, random.random((2, 200)) < 0.4
        assert statistics.permutation_bound(a, b) >= statistics.paired_permutation(a, b)
    assert statistics.permutation_bound(a, b) < 1e-3
    assert statistics.permutation_bound(a, a) == 1


@pytest.mark.parametrize(("deviation", "half"), [(0.02, 0.01), (0.005, 0.01), (0.1, 0.02), (0.0, 0.01), (12.0, 4.0)])
def test_seeds_needed_is_the_smallest_number_that_suffices(deviation: float, half: float) -> None:
    def wide(n: int) -> float:
        return float(stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n))

    need = statistics.seeds_needed(deviation, half)
    assert need == next(n for n in itertools.count(2) if wide(n) <= half)
    assert statistics.seeds_needed(deviation, half, have=need + 3) == 0
    assert statistics.seeds_needed(deviation, half, have=2) == need - 2


def test_seeds_that_are_just_enough_are_enough() -> None:
    just = float(stats.t.ppf(0.975, 1)) * 0.1 / math.sqrt(2)
    assert statistics.seeds_needed(0.1, just) == 2
    assert statistics.seeds_needed(0.1, just * 0.999) == 3
    for width in (0.0, -0.01):
        with pytest.raises(ValueError, match="more than 0"):
            statistics.seeds_needed(0.1, width)
