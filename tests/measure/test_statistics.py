"""Intervals that cover, bounds that hold, verdicts that follow: by hand, by scipy and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stretto.measure.outcomes import Outcome
from stretto.measure.statistics import (
    SpeedUp,
    decompose,
    figure,
    geometric_mean,
    speed_up,
)


def arm(*times, reached=None, first=0):
    reached = reached or [True] * len(times)
    return [Outcome(first + seed, time, hit) for seed, (time, hit) in enumerate(zip(times, reached))]


def test_two_pairs_worked_by_hand():
    # log ratios log 2 and log 8: mean log 4, deviation log(4)/√2, so error log 2; t(1 df, .975) = 12.706
    result = speed_up(arm(2.0, 8.0), arm(1.0, 1.0))
    assert result.method == "paired" and result.verdict == "not resolved"
    assert result.estimate == pytest.approx(4)
    assert result.high == pytest.approx(4 * 2**12.7062, rel=1e-4)
    assert result.low == pytest.approx(4 / 2**12.7062, rel=1e-4)
    assert result.spread == pytest.approx(math.log(2))


def test_intervals_equal_scipys():
    rng = np.random.default_rng(0)
    base, other = rng.lognormal(2, 0.1, 5), rng.lognormal(1, 0.2, 5)
    for confidence in (0.8, 0.95, 0.99):
        ours = speed_up(arm(*base), arm(*other), confidence)
        theirs = stats.ttest_rel(np.log(base), np.log(other)).confidence_interval(confidence)
        assert (ours.low, ours.high) == pytest.approx(tuple(np.exp(theirs)))
        ours = speed_up(arm(*base), arm(*other[:3]), confidence)
        welch = stats.ttest_ind(np.log(base), np.log(other[:3]), equal_var=False)
        theirs = welch.confidence_interval(confidence)
        assert ours.method == "welch"
        assert (ours.low, ours.high) == pytest.approx(tuple(np.exp(theirs)))


def test_pairing_is_by_seed_whatever_the_order_and_only_where_seeds_agree():
    base, other = arm(10.0, 20.0, 30.0), arm(1.0, 2.0, 3.0)
    result = speed_up(base, other[::-1])
    assert (result.low, result.high) == pytest.approx((10, 10)) and result.method == "paired"
    assert speed_up(base, other, paired=False).method == "welch"
    assert speed_up(base, arm(1.0, 2.0, 3.0, first=1)).method == "welch"
    with pytest.raises(ValueError, match="same seeds"):
        speed_up(base, other[:2], paired=True)


def test_equal_times_make_a_point_and_no_division_by_zero():
    result = speed_up(arm(2.0, 2.0), arm(1.0, 1.0), paired=False)
    assert (result.estimate, result.low, result.high) == pytest.approx((2, 2, 2))
    half = speed_up(arm(2.0, 2.0), arm(1.0, 1.5, 1.2), paired=False)  # the t of the arm that varies
    error = np.std(np.log([1, 1.5, 1.2]), ddof=1) / math.sqrt(3)
    assert math.log(half.high / half.estimate) == pytest.approx(stats.t.ppf(0.975, 2) * error)


def test_one_seed_gives_no_interval():
    result = speed_up(arm(10.0), arm(2.0))
    assert result == SpeedUp(pytest.approx(5), 0.0, math.inf, "not resolved", "too few")
    assert speed_up(arm(10.0), arm(2.0, 2.0)).method == "too few"
    assert str(result) == "5.0x (too few seeds for an interval) not resolved"


def test_an_arm_without_a_hit_gives_a_one_sided_bound_and_never_a_number():
    base, fast = arm(10.0, 11.0, 12.0), arm(1.0, 1.1, 1.15)
    never = arm(40.0, 44.0, 48.0, reached=[False] * 3)
    bound = speed_up(never, fast)
    assert bound.estimate is None and bound.high == math.inf and bound.method == "bound"
    assert 40 / 1.15 < bound.low < 48 and bound.p_value < 0.05
    assert bound.verdict == "faster" and str(bound) == f"> {bound.low:.1f}x (one-sided) faster"
    back = speed_up(base, never)
    assert (back.low, back.verdict) == (0.0, "slower") and 10 / 48 < back.high < 12 / 40
    assert str(back) == f"< {back.high:.2f}x (one-sided) slower"
    both = speed_up(never, never)
    assert (both.low, both.high, str(both), both.p_value) == (0.0, math.inf, "not resolved", None)


def test_misses_count_as_longer_than_their_budget():
    base, fast = arm(10.0, 11.0, 12.0, reached=[True, True, False]), arm(5.0, 5.2, 5.5)
    found, dropped = speed_up(base, fast), speed_up(base[:2], fast)
    assert found.method == "aft" and found.verdict == "faster"
    assert found.low < dropped.estimate < found.estimate < found.high < math.inf
    assert str(found) == f"{found.estimate:.1f}x [{found.low:.2f}, {found.high:.1f}] faster"
    assert found.spread > 0 and found.p_value < 0.05
    assert speed_up(base, arm(5.0)).method == "too few" and speed_up(base, arm(5.0)).estimate is None


def test_p_values_equal_scipys():
    rng = np.random.default_rng(0)
    base, other = rng.lognormal(2, 0.1, 5), rng.lognormal(1.9, 0.2, 5)
    paired, welch = (speed_up(arm(*base), arm(*other), paired=how) for how in (True, False))
    assert paired.p_value == pytest.approx(stats.ttest_rel(np.log(base), np.log(other)).pvalue)
    expected = stats.ttest_ind(np.log(base), np.log(other), equal_var=False).pvalue
    assert welch.p_value == pytest.approx(expected)
    assert speed_up(arm(2.0, 2.0), arm(1.0, 1.0)).p_value == 0
    assert speed_up(arm(2.0, 2.0), arm(2.0, 2.0)).p_value == 1


def test_the_spread_is_that_of_one_run():
    rng = np.random.default_rng(3)
    base, other = rng.normal(0, 1, 4000), rng.normal(0, 3, 4000)
    base, other = arm(*np.exp(base)), arm(*np.exp(other))
    for paired in (True, False):
        assert speed_up(base, other, paired=paired).spread == pytest.approx(math.sqrt(5), rel=0.05)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        speed_up([], arm(1.0))


def test_the_parts_multiply_to_the_speed_up():
    base_steps, base_cost = [100, 110, 120], [0.1, 0.11, 0.1]
    other_steps, other_cost = [40, 50, 45], [0.15, 0.14, 0.16]
    parts = decompose(base_steps, base_cost, other_steps, other_cost)
    whole = speed_up(
        arm(*(a * b for a, b in zip(base_steps, base_cost))),
        arm(*(a * b for a, b in zip(other_steps, other_cost))),
    )
    assert parts.step_efficiency * parts.step_cost == pytest.approx(whole.estimate)
    assert parts.step_efficiency > 2 and parts.step_cost < 1
    assert geometric_mean([2, 8]) == pytest.approx(4)
    with pytest.raises(ValueError, match="positive"):
        geometric_mean([])


times = st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=5)


@given(base=times, other=times, scale=st.floats(1e-3, 1e3), data=st.data())
@settings(max_examples=15, deadline=None)
def test_swapping_arms_inverts_and_the_unit_does_not_matter(base, other, scale, data):
    hits = [data.draw(st.lists(st.booleans(), min_size=len(a), max_size=len(a))) for a in (base, other)]
    base, other = (arm(*a, reached=h) for a, h in zip((base, other), hits))
    there, back = speed_up(base, other), speed_up(other, base)
    assert (there.low > 0, there.high < math.inf) == (back.high < math.inf, back.low > 0)
    if there.low > 1e-250 and back.low > 1e-250 and there.high < 1e250:
        assert math.log(there.low) == pytest.approx(-math.log(back.high), abs=1e-6)
    opposite = {"faster": "slower", "slower": "faster", "not resolved": "not resolved"}
    assert back.verdict == opposite[there.verdict]
    scaled = speed_up(*([Outcome(o.seed, o.time * scale, o.reached) for o in a] for a in (base, other)))
    if there.low > 1e-250:
        assert math.log(scaled.low) == pytest.approx(math.log(there.low), abs=1e-6)


def test_figures_have_the_digits_a_reader_needs():
    ratios = (0.034, 0.96, 1.07, 6.3, 12.71, 240.2)
    assert [figure(ratio) for ratio in ratios] == ["0.034", "0.96", "1.07", "6.3", "12.7", "240"]
