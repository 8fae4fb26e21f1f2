"""A crossing counts when it persists; what a run comes to follows from it."""

from __future__ import annotations

import math

import pytest

from stretto.measure.outcomes import Crossing, Outcome, find_crossing, outcome, smoothed


def rows(*values: float | None) -> list[dict[str, float | None]]:
    return [{"step": 10 * (i + 1), "loss": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3, 2, 1, 1), Crossing(20, 30, True)),
        ((3, 1, 2, 1, 0.5), Crossing(30, 40, True)),  # the first hit did not persist
        ((3, 2, 1), Crossing(20, 30, False)),  # not yet confirmed
        ((1, 1), Crossing(0, 10, True)),
        ((3, 2, 2), None),
        ((3, 1, math.inf), None),
    ],
)
def test_a_crossing_counts_when_the_next_evaluation_holds(
    values: tuple[float, ...], expected: Crossing | None
) -> None:
    assert find_crossing(rows(*values), "loss", 1.0, falls=True, steps=100) == expected


def test_the_last_evaluation_of_a_budget_confirms_itself() -> None:
    assert find_crossing(rows(3, 2, 1), "loss", 1.0, falls=True, steps=30) == Crossing(20, 30, True)


def test_a_rising_metric_crosses_upward() -> None:
    assert find_crossing(rows(0.5, 0.9, 0.95), "loss", 0.9, falls=False, steps=100) == Crossing(10, 20, True)


def test_a_diverged_metric_is_a_miss() -> None:
    stored = [{"step": 10, "loss": None}, {"step": 20, "loss": 3.0}]
    assert find_crossing(stored, "loss", 5.0, falls=True, steps=20) == Crossing(10, 20, True)
    assert find_crossing(stored[:1], "loss", 5.0, falls=True, steps=10) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3, 1, 3, 1, 1, 1), [None, None, 3, 1, 1, 1]),  # one lucky evaluation moves nothing
        ((3, None, 1, 1, 1), [None, None, None, None, 1]),  # a diverged one is no value to take a median of
        ((3, 2), [None, None]),
    ],
)
def test_a_smoothed_metric_is_the_median_of_the_last_three(
    values: tuple[float | None, ...], expected: list[float | None]
) -> None:
    given = rows(*values)
    found = smoothed(given, "loss", 3)
    assert [row["loss"] for row in found] == expected
    assert [row["step"] for row in found] == [row["step"] for row in given]
    assert [row["loss"] for row in given] == list(values)
    assert smoothed(given, "loss", 1) == given


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 evaluation, not 0"):
        smoothed(rows(1.0), "loss", 0)


def test_an_outcome_lies_between_two_evaluations() -> None:
    timed = [{**row, "wall": row["step"] / 4} for row in rows(3, 2, 1, 1)]
    assert outcome(timed, Crossing(20, 30, True), 7) == Outcome(7, 7.5, before=5.0)
    assert outcome(timed, Crossing(20, 30, True), 7, "step") == Outcome(7, 30, before=20)
    assert outcome(timed, Crossing(0, 10, True), 7) == Outcome(7, 2.5)
    for missed in (None, Crossing(30, 40, False)):
        assert outcome(timed, missed, 7) == Outcome(7, 10.0, reached=False)


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(time: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        Outcome(0, time)


@pytest.mark.parametrize(("reached", "before"), [(True, 2.0), (True, 0.0), (True, math.nan), (False, 1.0)])
def test_a_crossing_that_lies_nowhere_is_refused(reached: bool, before: float) -> None:
    with pytest.raises(ValueError, match="leave it out for a miss"):
        Outcome(0, 2.0, reached, before)
