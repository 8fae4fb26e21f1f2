"""Times that are only known to be longer: as lifelines has them, by hand, and where nothing can be fitted."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from stretto.measure.outcomes import Outcome
from stretto.measure.statistics import speed_up
from stretto.measure.survival import (
    compare,
    differences,
    expected_running_time,
    fit_lognormal,
    kaplan_meier,
    logrank,
    median_time,
    restricted_mean,
    restricted_mean_ratio,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lifelines
    import pandas
    from lifelines.statistics import logrank_test
    from lifelines.utils import restricted_mean_survival_time

ARMS = np.repeat([0, 1], 8)


def sample(seed, count=8, budget=0.2, evaluations=0):
    """Ends of log times, (1, 2 · count): the base's mean is 0, the other's −.3, and runs end at the budget."""
    logs = np.random.default_rng(seed).normal([0.0] * count + [-0.3] * count, 0.25)
    lower, upper = np.minimum(logs, budget), np.where(logs > budget, np.inf, logs)
    if evaluations:
        at = np.ceil(np.exp(lower) * evaluations)
        lower = np.where(logs > budget, budget, np.log((at - 1) / evaluations))
        upper = np.where(logs > budget, np.inf, np.log(at / evaluations))
    return lower[None], upper[None]


def outcomes(lower, upper):
    """An arm's outcomes from the ends of its log times, misses or exact."""
    times = np.exp(np.where(np.isfinite(upper), upper, lower)).tolist()
    return [Outcome(seed, time, bool(hit < np.inf)) for seed, (time, hit) in enumerate(zip(times, upper))]


@pytest.mark.parametrize("evaluations", [0, 10])
def test_the_fit_equals_lifelines(evaluations):
    lower, upper = sample(3, evaluations=evaluations)
    fit = fit_lognormal(lower, upper, ARMS)
    frame = pandas.DataFrame({"lower": np.exp(lower[0]), "upper": np.exp(upper[0]), "other": ARMS})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lifelines.LogNormalAFTFitter().fit_interval_censoring(frame, "lower", "upper")
    exact = lower == upper
    assert fit.log_likelihood[0] - lower[exact].sum() == pytest.approx(theirs.log_likelihood_, abs=1e-6)
    intercept, other = (theirs.params_["mu_"][name] for name in ("Intercept", "other"))
    assert fit.means[0] == pytest.approx([intercept, intercept + other], abs=1e-4)
    assert math.log(fit.sd[0]) == pytest.approx(theirs.params_["sigma_"]["Intercept"], abs=1e-4)


def test_without_misses_it_is_the_pooled_t():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 5), rng.normal(0.5, 1, 7)
    logs, arms = np.concatenate([first, second])[None], np.repeat([0, 1], [5, 7])
    found = differences(logs, logs, arms, 0.9)
    theirs = stats.ttest_ind(first, second)
    limits = theirs.confidence_interval(0.9)
    assert (found.low[0], found.high[0]) == pytest.approx((limits.low, limits.high), rel=1e-5)
    assert found.p_value[0] == pytest.approx(theirs.pvalue, rel=1e-5)
    pooled = math.sqrt((4 * first.var(ddof=1) + 6 * second.var(ddof=1)) / 10)
    assert found.sd[0] == pytest.approx(pooled, rel=1e-5)


def test_a_batch_is_its_samples_one_by_one():
    lower, upper = (np.concatenate(ends) for ends in zip(*(sample(seed) for seed in range(5))))
    together = differences(lower, upper, ARMS)
    for index in range(5):
        alone = differences(lower[index : index + 1], upper[index : index + 1], ARMS)
        for a, b in zip(alone, together):
            assert a[0] == pytest.approx(b[index], abs=1e-6)


def test_the_interval_is_where_the_likelihood_falls_by_as_much_as_it_may():
    lower, upper = sample(1)
    found = differences(lower, upper, ARMS)
    best = fit_lognormal(lower, upper, ARMS).log_likelihood
    allowed = 16 * math.log1p(stats.t.ppf(0.975, 14) ** 2 / 14)
    for limit in (found.low, found.high):
        equal = fit_lognormal(lower + limit * ARMS, upper + limit * ARMS, 0 * ARMS)
        assert 2 * (best - equal.log_likelihood) == pytest.approx(allowed, abs=1e-4)
    assert found.low < found.estimate < found.high


def test_arms_of_unequal_size_swap_and_units_scale():
    lower, upper = sample(2)
    base, other = outcomes(lower[0, :5], upper[0, :5]), outcomes(lower[0, 8:], upper[0, 8:])
    there, back = compare(base, other), compare(other, base)
    assert there.interval == pytest.approx([-back.interval[index] for index in (0, 2, 1)], abs=1e-5)
    assert there.p_value == pytest.approx(back.p_value, rel=1e-4)
    minutes = [[Outcome(o.seed, o.time / 60, o.reached) for o in arm] for arm in (base, other)]
    assert compare(*minutes).interval == pytest.approx(there.interval, abs=1e-5)


def test_a_miss_says_more_the_longer_it_ran():
    def base(budget):
        return [Outcome(0, 10.0), Outcome(1, 11.0), Outcome(2, budget, reached=False)]

    other = [Outcome(seed, time) for seed, time in enumerate((5.0, 5.5, 5.2))]
    found = [compare(base(budget), other) for budget in (1e-6, 11.0, 14.0)]
    assert found[0].interval.estimate < found[1].interval.estimate < found[2].interval.estimate
    dropped = compare(base(1e-6)[:2], other)
    assert found[0].interval.estimate == pytest.approx(dropped.interval.estimate, abs=1e-6)


@pytest.mark.parametrize("base", [[True, False, True], [False] * 3])
def test_equal_times_make_a_point_and_no_failure(base):
    """Runs that reach the target at the same evaluation leave a likelihood without a maximum."""
    slow = [Outcome(seed, 20.0, hit) for seed, hit in enumerate(base)]
    fast = [Outcome(seed, 5.0) for seed in range(3)]
    interval = compare(slow, fast).interval
    assert math.exp(interval.low) == pytest.approx(4, rel=1e-4)
    assert math.exp(interval.high) == (pytest.approx(4, rel=1e-4) if any(base) else math.inf)


def test_crossings_in_one_interval_leave_the_ratio_within_it():
    slow = [Outcome(0, 20.0, before=18.0), Outcome(1, 20.0, before=18.0), Outcome(2, 20.0, reached=False)]
    fast = [Outcome(seed, 6.0, before=5.0) for seed in range(3)]
    interval = compare(slow, fast).interval
    assert 18 / 6 < math.exp(interval.estimate) < 20 / 5 + 0.1
    assert interval.low < interval.estimate < interval.high < math.log(6)


def test_extreme_times_are_no_failure():
    wide = [Outcome(0, 1e-3), Outcome(1, 1e6, reached=False)]
    found = speed_up(wide, wide)
    assert found.estimate == pytest.approx(1, rel=1e-3) and found.verdict == "not resolved"
    assert 0 < found.low < 1 < found.high < math.inf


def test_what_cannot_be_compared_is_refused():
    missed, hit = Outcome(0, 1.0, reached=False), Outcome(0, 1.0)
    for arms in (([missed] * 3, [missed] * 3), ([missed], [hit])):
        with pytest.raises(ValueError, match="needs 3 runs, and a hit"):
            compare(*arms)
    with pytest.raises(ValueError, match="log-rank test needs a hit"):
        logrank([missed], [missed])


@pytest.fixture
def pair():
    rng = np.random.default_rng(7)
    return [
        [
            Outcome(seed, min(time, 2.0), time <= 2.0)
            for seed, time in enumerate(rng.lognormal(mean, 0.5, 21).tolist())
        ]
        for mean in (0.6, 0.2)
    ]


def split(arm):
    return [outcome.time for outcome in arm], [outcome.reached for outcome in arm]


def test_the_curve_and_its_median_equal_lifelines(pair):
    for arm in pair:
        curve = kaplan_meier(arm)
        theirs = lifelines.KaplanMeierFitter().fit(*split(arm))
        table = theirs.survival_function_["KM_estimate"]
        assert curve.share == pytest.approx(table.loc[curve.times].to_numpy())
        limits = theirs.confidence_interval_.loc[curve.times].to_numpy()
        assert np.stack([curve.low, curve.high], 1) == pytest.approx(limits)
        found = median_time(arm)
        assert found.estimate == pytest.approx(theirs.median_survival_time_)
        assert found.low <= found.estimate <= found.high
    assert median_time([Outcome(0, 1.0, reached=False)] * 3).estimate == math.inf


def test_the_log_rank_test_equals_lifelines(pair):
    (base, base_hit), (other, other_hit) = map(split, pair)
    assert logrank(*pair) == pytest.approx(logrank_test(base, other, base_hit, other_hit).p_value)


def test_restricted_means_equal_lifelines_and_their_errors_the_mean_s(pair):
    for arm in pair:
        theirs = restricted_mean_survival_time(lifelines.KaplanMeierFitter().fit(*split(arm)), t=1.7)
        assert restricted_mean(arm, 1.7)[0] == pytest.approx(theirs)
    times = [1.0, 2.0, 4.0, 8.0]  # without misses it is the mean, at 5: 3
    area, error = restricted_mean([Outcome(seed, time) for seed, time in enumerate(times)], 5.0)
    assert area == pytest.approx(3) and error == pytest.approx(math.sqrt(np.var([1, 2, 4, 5]) / 4))


def test_the_restricted_ratio_is_nearer_to_one_than_the_speed_up(pair):
    ratio = restricted_mean_ratio(*pair)
    assert ratio == restricted_mean_ratio(*pair, horizon=min(max(split(arm)[0]) for arm in pair))
    assert ratio.low < ratio.estimate < ratio.high
    assert 1 < ratio.estimate < speed_up(*pair).estimate


def test_restarts_cost_the_time_of_the_misses():
    arm = [Outcome(0, 3.0), Outcome(1, 5.0), Outcome(2, 10.0, reached=False)]
    assert expected_running_time(arm) == 9
    assert expected_running_time(arm[2:]) == math.inf
