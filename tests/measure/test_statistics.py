"""Intervals that cover, bounds that hold, verdicts that follow: by hand, by scipy and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stretto.measure.statistics import (
    Outcome,
    SpeedUp,
    decompose,
    figure,
    geometric_mean,
    paired_interval,
    seeds_needed,
    speed_up,
    welch_interval,
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


def test_misses_give_one_sided_bounds_and_never_a_number():
    base, missed = arm(10.0, 11.0, 12.0), arm(10.0, 11.0, 12.0, reached=[True, False, False])
    fast = arm(1.0, 1.1, 1.15)
    bound = speed_up(missed, fast)
    assert bound.estimate is None and bound.high == math.inf and bound.method == "bound"
    logs = np.log([10, 11, 12]) - np.log([1.0, 1.1, 1.15])
    by_scipy = stats.ttest_1samp(logs, 0, alternative="greater").confidence_interval(0.95)
    assert bound.low == pytest.approx(math.exp(by_scipy.low))
    assert bound.verdict == "faster" and str(bound) == f"> {bound.low:.1f}x (one-sided) faster"
    bound = speed_up(base, arm(40.0, 44.0, 48.0, reached=[False] * 3))
    assert (bound.low, bound.verdict) == (0.0, "slower") and bound.high == pytest.approx(0.25)
    assert str(bound) == "< 0.25x (one-sided) slower"
    both = speed_up(missed, missed)
    assert (both.low, both.high, str(both)) == (0.0, math.inf, "not resolved")


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(time):
    with pytest.raises(ValueError, match="positive and finite"):
        Outcome(0, time)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        speed_up([], arm(1.0))


@pytest.mark.parametrize(
    "sd, effect, seeds",
    [(0.02, 0.05, 4), (0.02, 0.1, 3), (0.02, 0.2, 3), (0.07, 0.05, 34), (0.07, 0.1, 10), (0.07, 0.2, 4)],
)
def test_seeds_needed_equals_the_published_table(sd, effect, seeds):
    assert seeds_needed(effect, sd) == seeds


def test_seeds_needed_takes_no_spread_and_much_and_refuses_nonsense():
    assert seeds_needed(0.05, 0.0) == 3
    assert seeds_needed(0.01, 1.0) == pytest.approx(2 * (1.96 + 0.8416) ** 2 / math.log(1.01) ** 2, rel=5e-3)
    with pytest.raises(ValueError, match="effect above 0"):
        seeds_needed(0.0, 0.1)


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
@settings(max_examples=100, deadline=None)
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


def coverage(truth, intervals):
    return np.mean([low <= truth <= high for _, low, high in intervals])


def test_three_seeds_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    truth, shared = math.log(1.3), rng.normal(0, 0.3, (3000, 3, 1))
    noise = rng.normal(0, 0.07, (3000, 3, 2))
    arms = np.moveaxis(noise, 2, 1)
    assert 0.945 <= coverage(truth, (welch_interval(a + truth, b) for a, b in arms)) <= 0.98
    pairs = np.moveaxis(noise + shared, 2, 1)
    assert 0.94 <= coverage(truth, (paired_interval(a + truth, b) for a, b in pairs)) <= 0.96


@pytest.mark.parametrize(
    "budget", [-0.1, 0.0, 0.1, 0.2]
)  # log time: 84 %, 50 %, 16 % and 2 % of base runs miss
def test_lower_limits_hold_although_misses_shrink_the_spread(budget):
    rng = np.random.default_rng(2)
    held = 0
    for logs in rng.normal(0, 0.1, (1500, 2, 4)):
        base = [Outcome(s, math.exp(min(x, budget)), x < budget) for s, x in enumerate(logs[0])]
        held += speed_up(base, arm(*np.exp(logs[1])), paired=False).low <= 1
    assert held / 1500 >= 0.945


def test_figures_have_the_digits_a_reader_needs():
    ratios = (0.034, 0.96, 1.07, 6.3, 12.71, 240.2)
    assert [figure(ratio) for ratio in ratios] == ["0.034", "0.96", "1.07", "6.3", "12.7", "240"]
