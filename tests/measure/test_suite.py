"""The geometric mean over a suite: by hand, by simulation, with misses, and on AlgoPerf's logs."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made import arm as train_arm
from made import make_race
from scipy import stats

from stretto.measure import algoperf
from stretto.measure.algoperf_logs import BASES, read
from stretto.measure.outcomes import Outcome
from stretto.measure.suite import suite, suites, told
from stretto.measure.summary import summarise

SHARED = Path(os.environ.get("STRETTO_DATA", Path(__file__).parents[3] / "shared" / "data"))
ORACLE = SHARED / "algoperf-v05"


def arm(times, first=0, budget=math.inf):
    return [Outcome(first + i, min(float(t), budget), bool(t <= budget)) for i, t in enumerate(times)]


def test_two_workloads_worked_by_hand():
    # log ratios of pairs: log 2 twice and log 8 twice without noise: mean log 4
    found = suite({"a": (arm([2, 4]), arm([1, 2])), "b": (arm([8, 8]), arm([1, 1]))})
    assert found.workloads["a"] == pytest.approx((2, 2, 2)) and found.workloads["b"] == pytest.approx(
        (8, 8, 8)
    )
    assert found.seeds == pytest.approx((4, 4, 4))
    # across workloads: deviation log 4 / √2, error log 2, t(1 df) = 12.706
    assert found.workloads_too == pytest.approx((4, 4 / 2**12.7062, 4 * 2**12.7062), rel=1e-4)


def test_one_workload_equals_scipys_welch_and_paired_intervals():
    rng = np.random.default_rng(0)
    base, other = rng.lognormal(2, 0.1, 5), rng.lognormal(1, 0.2, 5)
    found = suite({"a": (arm(base), arm(other, first=10))})
    welch = stats.ttest_ind(np.log(base), np.log(other), equal_var=False).confidence_interval()
    assert found.seeds[1:] == pytest.approx(tuple(np.exp(welch))) and found.seeds == found.workloads["a"]
    assert found.workloads_too[1:] == (0, math.inf)
    paired = stats.ttest_rel(np.log(base), np.log(other)).confidence_interval()
    assert suite({"a": (arm(base), arm(other)[::-1])}).seeds[1:] == pytest.approx(tuple(np.exp(paired)))


def test_misses_enter_by_the_likelihood_and_an_arm_without_a_hit_is_refused():
    rng = np.random.default_rng(1)
    base, other = np.exp(rng.normal(0.3, 0.1, 10)), np.exp(rng.normal(0.0, 0.1, 10))
    full = suite({"a": (arm(base), arm(other, 10))}).seeds
    cut = suite({"a": (arm(base, 0, 1.35), arm(other, 10))}).seeds
    dropped = suite({"a": (arm(base[base <= 1.35]), arm(other, 10))}).seeds
    assert (base > 1.35).sum() >= 3
    assert abs(cut.estimate - full.estimate) < abs(dropped.estimate - full.estimate)
    assert cut.low < full.estimate < cut.high
    with pytest.raises(ValueError, match="a: an arm has no hit"):
        suite({"a": (arm(base, 0, 0.1), arm(other, 10))})
    with pytest.raises(ValueError, match="b: an interval needs 2 runs"):
        suite({"b": (arm([1.0]), arm([1.0]))})
    with pytest.raises(ValueError, match="one workload or more"):
        suite({})


def test_swapping_arms_inverts():
    rng = np.random.default_rng(2)
    arms = {name: (arm(rng.lognormal(1, 0.1, 3)), arm(rng.lognormal(0, 0.1, 3), 10)) for name in "abc"}
    there, back = suite(arms), suite({name: pair[::-1] for name, pair in arms.items()})
    for one, other in ((there.seeds, back.seeds), (there.workloads_too, back.workloads_too)):
        assert (one.estimate, one.low, one.high) == pytest.approx(
            (1 / other.estimate, 1 / other.high, 1 / other.low)
        )


def simulate(draws, workloads=8, seeds=3, truth=0.3, between=0.25, within=0.05):
    """Coverage of the seeds' interval (of these workloads' mean) and of the workloads' (of all workloads')."""
    rng, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(draws):
        effects = truth + between * rng.normal(size=workloads)
        noise = within * rng.normal(size=(2, workloads, seeds))
        found = suite(
            {
                str(i): (arm(np.exp(effect + base)), arm(np.exp(other), 10))
                for i, (effect, base, other) in enumerate(zip(effects, *noise))
            }
        )
        held += found.seeds.low <= math.exp(effects.mean()) <= found.seeds.high
        held[1] -= found.seeds.low <= math.exp(effects.mean()) <= found.seeds.high
        held[1] += found.workloads_too.low <= math.exp(truth) <= found.workloads_too.high
    return held / draws


def test_both_intervals_cover():
    assert np.all(simulate(300) >= 0.92)


@pytest.mark.slow
def test_both_intervals_cover_in_4000_draws():
    assert simulate(4000) == pytest.approx([0.95, 0.95], abs=0.015)


@pytest.mark.skipif(not ORACLE.is_dir(), reason=f"{ORACLE} is absent: AlgoPerf's logs")
def test_algoperfs_shampoo_over_its_baseline():
    """Published .69 to .76 by seeds; by workloads .58 to .88 from a percentile bootstrap, which is too narrow."""
    logs = read(ORACLE)
    submissions, studies = algoperf.study_times(logs, "time")
    times = {name: studies[submissions.index(name)] for name in ("shampoo_submission", "baseline")}
    budgets = [np.max(studies[:, i][np.isfinite(studies[:, i])]) for i in range(len(BASES))]
    found = suite(
        {
            name: tuple(
                arm(np.minimum(times[who][i], 2 * budgets[i]), first, budgets[i])
                for first, who in ((0, "shampoo_submission"), (10, "baseline"))
            )
            for i, name in enumerate(BASES)
        }
    )
    assert len(found.workloads) == 8
    assert (found.seeds.low, found.seeds.high) == pytest.approx((0.69, 0.76), abs=0.015)
    assert found.workloads_too.low < 0.58 and found.workloads_too.high > 0.88


def test_recipes_of_several_races_are_a_suite_of_the_races_own_outcomes(store):
    """One that was in a single race, or never reached a target, has no mean over workloads."""
    base, fast = {"rate": 0.0035, "cost": 0.03, "steps": 2000}, {"rate": 0.02, "cost": 0.047, "steps": 500}
    never = {"rate": 0.0008, "cost": 0.02, "steps": 2000}
    found = []
    for workload, seeds in (("digits", range(3)), ("letters", range(5, 9))):
        arms = [train_arm(store, "baseline", seeds, **base), train_arm(store, "fast", seeds, **fast)]
        arms.append(train_arm(store, "never", seeds, **never))
        if workload == "letters":
            arms.append(train_arm(store, "once", seeds, **fast))
        race = make_race(arms)
        found.append(replace(summarise(store, race), race=race | {"workload": workload}))
    over = suites(found)
    assert list(over) == ["fast"] and list(over["fast"].workloads) == ["digits", "letters"]
    each = [summary.arms[1].wall for summary in found]
    assert over["fast"].seeds.estimate == pytest.approx(math.sqrt(math.prod(one.estimate for one in each)))
    assert over["fast"].workloads["digits"] == pytest.approx((each[0].estimate, each[0].low, each[0].high))
    assert told("fast", over["fast"]).startswith("fast over 2 workloads: ")
    assert suites(found[:1]) == {}
