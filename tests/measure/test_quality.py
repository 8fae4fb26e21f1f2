"""Speed-ups at equal quality by hand and by simulation; bounds where there is no curve; the frontier."""

import itertools
import math

import numpy as np
import pytest

from stretto.measure.quality import (
    Trained,
    equal_quality,
    fit,
    frontier,
    on_frontier,
    speed_up_curve,
)

BUDGETS = (50.0, 100.0, 200.0, 400.0)


def loss(budget):
    return 2 + 3 * budget**-0.5


def accuracy(budget):
    return 1 - budget**-0.5


def train(quality, budgets=BUDGETS, seeds=3, sd=0.0, rng=None):
    rng = rng or np.random.default_rng(0)
    return [
        Trained(seed, budget, quality(budget) + sd * rng.normal())
        for budget in budgets
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("quality, falls", [(loss, True), (accuracy, False)])
def test_without_noise_the_speed_up_is_that_of_the_budgets_times_that_of_the_costs(quality, falls):
    for budget in (60.0, 100.0, 130.0, 200.0):
        other = train(lambda b: quality(1.5 * b), budgets=(budget,))
        (found,) = equal_quality(train(quality), other, falls=falls, base_cost=[1, 1], other_cost=[1.2, 1.2])
        assert found.quality == pytest.approx(quality(1.5 * budget)) and found.budget == budget
        assert found.needed.estimate == pytest.approx(1.5 * budget, rel=0.006)
        assert found.speed_up.estimate == pytest.approx(1.5 / 1.2, rel=0.006)
        assert found.speed_up.low == pytest.approx(found.speed_up.high, rel=0.006)
        assert found.speed_up.verdict == "faster"


def test_a_line_between_the_budgets_would_be_off_by_more():
    found = equal_quality(train(loss), train(loss, budgets=(70.0, 140.0, 280.0)), falls=True)
    lines = np.interp([-loss(b) for b in (70, 140, 280)], [-loss(b) for b in BUDGETS], np.log(BUDGETS))
    errors = [abs(math.log(one.speed_up.estimate)) for one in found]
    assert max(errors) < 0.006 and max(abs(lines - np.log([70, 140, 280]))) > 0.029


def test_knots_are_means_and_what_does_not_rise_is_pooled():
    runs = [Trained(s, b, q + d) for b, q in zip(BUDGETS, (1, 3, 2, 4)) for s, d in ((0, -0.1), (1, 0.1))]
    curve = fit(runs, falls=False)
    at = np.interp(np.log(BUDGETS), curve.budgets, curve.qualities)
    assert at == pytest.approx([1, 2.5, 2.5, 4], abs=1e-3)
    assert np.all(np.diff(curve.qualities) >= 0)
    # a mean of two has variance 0.02 / 2 (1 degree); a pool of two means half of that, and 2 degrees
    assert curve.variances[[0, -1]] == pytest.approx(0.01, rel=1e-3)
    assert curve.degrees[[0, -1]] == pytest.approx(1, rel=1e-3)
    middle = np.searchsorted(curve.budgets, math.log(141))
    assert curve.variances[middle] == pytest.approx(0.005, rel=1e-3)
    assert curve.degrees[middle] == pytest.approx(2, rel=1e-3)


def test_qualities_beyond_the_baselines_are_bounds_not_extrapolations():
    base = train(loss, sd=0.001)
    better, worse = (
        train(lambda b: loss(9 * b), (100.0,), sd=0.001),
        train(lambda b: loss(b / 9), (100.0,), sd=0.001),
    )
    (found,) = equal_quality(base, better, falls=True)
    assert found.needed == (math.inf, pytest.approx(400), math.inf)
    assert found.speed_up.estimate is None and found.speed_up.method == "bound"
    assert (found.speed_up.low, found.speed_up.high) == (pytest.approx(4), math.inf)
    assert str(found.speed_up) == "> 4.0x (one-sided) faster"
    (found,) = equal_quality(base, worse, falls=True)
    assert found.needed == (0, 0, pytest.approx(50)) and found.speed_up.estimate is None
    assert (found.speed_up.low, found.speed_up.high) == (0, pytest.approx(0.5))
    assert found.speed_up.verdict == "slower"


def test_a_limit_past_the_largest_budget_is_open():
    rng = np.random.default_rng(0)
    other = train(loss, (370.0,), sd=0.01, rng=rng)
    (found,) = equal_quality(train(loss, sd=0.01, rng=rng), other, falls=True)
    assert found.speed_up.estimate is not None and found.speed_up.verdict == "not resolved"
    assert found.needed.low < 370 and found.needed.high == math.inf == found.speed_up.high


def test_noise_of_seeds_and_of_costs_both_widen():
    def width(sd, cost):
        rng = np.random.default_rng(2)
        other = train(loss, (140.0,), sd=sd, rng=rng)
        found = equal_quality(
            train(loss, sd=sd, rng=rng), other, falls=True, base_cost=[1, 1 + cost, 1 - cost]
        )
        return math.log(found[0].speed_up.high / found[0].speed_up.low)

    seeds, costs, both = width(0.002, 0), width(0, 0.05), width(0.002, 0.05)
    assert 0.01 < seeds < both and 0.01 < costs < both
    assert both == pytest.approx(math.hypot(seeds, costs), rel=0.1)


def test_the_whole_curve():
    base, other = train(loss), train(lambda b: loss(b * 2 * (b / 100) ** 0.2))
    found = speed_up_curve(base, other, falls=True, points=9)
    qualities = [one.quality for one in found]
    assert qualities[0] == pytest.approx(loss(50 * 2 * 0.5**0.2)) and qualities[-1] == pytest.approx(
        loss(400)
    )
    assert all(a > b for a, b in itertools.pairwise(qualities))
    for one in found:
        assert one.speed_up.estimate == pytest.approx(2 * (one.budget / 100) ** 0.2, rel=0.012)
    worse = train(lambda b: loss(b / 100))
    assert speed_up_curve(base, worse, falls=True) == []


def test_few_budgets_few_seeds_and_diverged_runs_are_refused():
    with pytest.raises(ValueError, match="4 budgets or more, not 3"):
        equal_quality(train(loss, BUDGETS[:3]), train(loss), falls=True)
    with pytest.raises(ValueError, match=r"2 seeds or more at each budget; 90 has 1"):
        equal_quality(train(loss), train(loss, (90.0,), seeds=1), falls=True)
    with pytest.raises(ValueError, match="seed 2 at budget 100 ended at nan"):
        equal_quality([*train(loss), Trained(2, 100.0, math.nan)], train(loss), falls=True)
    with pytest.raises(ValueError, match="2 positive measurements"):
        equal_quality(train(loss), train(loss), falls=True, base_cost=[1.0])


def coverage(seeds, sd, draws):
    """Share of 95 % intervals that hold the truth, 1.5 / 1.2, and the median log width."""
    rng, truth, held, widths = np.random.default_rng(seeds), 1.5 / 1.2, 0, []
    for _ in range(draws):
        base, other = (
            train(loss, seeds=seeds, sd=sd, rng=rng),
            train(lambda b: loss(1.5 * b), (90.0,), seeds, sd, rng),
        )
        costs = np.exp(0.01 * rng.normal(size=(2, 5)))
        (found,) = equal_quality(base, other, falls=True, base_cost=costs[0], other_cost=1.2 * costs[1])
        held += found.speed_up.low <= truth <= found.speed_up.high
        widths.append(math.log(found.speed_up.high / max(found.speed_up.low, 1e-9)))
    return held / draws, float(np.median(widths))


def test_the_interval_covers():
    held, width = coverage(3, 0.004, 200)
    assert held >= 0.93 and width < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_covers_in_4000_draws(seeds):
    held, _ = coverage(seeds, 0.004, 4000)
    assert 0.94 <= held <= 0.985


@pytest.mark.slow
def test_the_curve_covers_at_each_quality():
    rng, held = np.random.default_rng(3), np.zeros(5)
    for _ in range(1000):
        base, other = (train(lambda b, s=s: loss(s * b), sd=0.004, rng=rng) for s in (1, 1.5))
        found = speed_up_curve(base, other, falls=True, points=5)
        held += [one.speed_up.low <= 1.5 <= one.speed_up.high for one in found]
    assert np.all(held / 1000 >= 0.93)


# ---- the frontier


def test_the_frontier_by_hand():
    costs, qualities = np.array([1.0, 2.0, 2.0, 3.0, 3.0]), np.array([0.5, 0.7, 0.6, 0.7, 0.9])
    assert frontier(costs, qualities, falls=False).tolist() == [True, True, False, False, True]
    assert frontier(costs, -qualities, falls=True).tolist() == [True, True, False, False, True]
    twins = frontier(np.array([1.0, 1.0]), np.array([1.0, 1.0]), falls=False)
    assert twins.all()


def test_the_probability_follows_the_noise():
    def arm(cost, quality, spread):
        return [(cost, quality - spread), (cost, quality), (cost, quality + spread)]

    arms = {
        "cheap": arm(1, 0.5, 0.001),
        "good": arm(2, 0.9, 0.1),
        "near": arm(2.1, 0.9, 0.1),
        "bad": arm(3, 0.1, 0.01),
    }
    places = on_frontier(arms, falls=False)
    assert places["cheap"].probability == 1 and places["bad"].probability == 0
    assert places["cheap"].on_frontier and places["good"].on_frontier and not places["near"].on_frontier
    assert places["near"].probability == pytest.approx(0.5, abs=0.1) and places["good"].probability > 0.95
    assert places["near"].cost == pytest.approx(2.1) and places["near"].quality == pytest.approx(0.9)
    with pytest.raises(ValueError, match="lone has fewer"):
        on_frontier({**arms, "lone": [(1.0, 1.0)]}, falls=False)


def test_drawn_means_vary_as_means_of_seeds_do():
    """Plain draws of 3 seeds vary by a third too little, and the probability would be too sure of itself."""
    rng, sure = np.random.default_rng(0), []
    for _ in range(300):
        arms = {name: [(1.0, q) for q in rng.normal(size=3)] for name in "ab"}
        sure.append(on_frontier(arms, falls=False, draws=400)["a"].probability)
    # two equal arms: P is near uniform, the t of two means; without widening 0.24 lie at the ends
    assert np.mean((np.array(sure) < 0.05) | (np.array(sure) > 0.95)) < 0.2
