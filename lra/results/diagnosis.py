"""Verdict on a run of a diagnostic task: solved, failed or undecided, and the longest length it reaches."""

from __future__ import annotations

from dataclasses import dataclass

from lra.results import statistics
from lra.results.record import RunRecord

SOLVED = 0.9
"""Share of examples, whole sequences where positions are scored, from which a task is solved."""
REACHED = 0.9
"""Share of right answers that a longer test split has to keep."""
NEAR = 0.05
"""Distance from a plateau within which a run counts as being at it."""
RISING = 0.02
"""Gain of the validation accuracy in the last third of training from which it is still rising."""


@dataclass(frozen=True)
class Verdict:
    """word: "solved", "failed" or "undecided"; reason: one line."""

    word: str
    reason: str


def verdict(record: RunRecord) -> Verdict:
    """Solved where the 95 % interval of the accuracy lies above SOLVED, failed where the budget is used up without.

    Undecided is a run whose interval holds SOLVED, one that rests on a plateau of the task, after which training is
    known to go on, and one whose validation accuracy was still rising.
    """
    test, steps = record.test, record.speed.steps or record.recipe.train.get("steps")
    interval = statistics.of_test_set(test.accuracy, test.n)
    shown = f"{100 * test.accuracy:.1f} % of the examples right after {steps:,} steps"
    if interval.low >= SOLVED:
        return Verdict("solved", shown)
    if interval.high >= SOLVED:
        return Verdict("undecided", f"{shown}, too close to {100 * SOLVED:.0f} %")
    for name, share in record.plateaus.items():
        if abs(test.share - share) <= NEAR:
            return Verdict("undecided", f"{100 * test.share:.1f} % is a plateau: {name} ({100 * share:.1f} %)")
    if (gain := _late_gain(record)) >= RISING:
        return Verdict("undecided", f"{shown}, and still rising: {100 * gain:+.1f} points in the last third")
    return Verdict("failed", shown)


def _late_gain(record: RunRecord) -> float:
    """Gain of the validation accuracy over the last third of training."""
    points = [(p.step, float(p.validation_accuracy)) for p in record.curve if p.validation_accuracy is not None]
    if len(points) < 3:
        return 0.0
    before = [accuracy for step, accuracy in points if step <= points[-1][0] * 2 / 3]
    return max(accuracy for _, accuracy in points) - max(before or [points[0][1]])


def reach(record: RunRecord) -> int | None:
    """The longest test length at which the share of right answers stays at or above REACHED; None where the task has
    one length, 0 where that of training is not reached."""
    longer = sorted(
        (score.length or 0, score.share) for name, score in record.tests.items() if name.startswith("length-")
    )
    if not longer:
        return None
    held = (record.test.length or 0) if record.test.share >= REACHED else 0
    for length, share in longer:
        if not held or share < REACHED:
            break
        held = length
    return held
