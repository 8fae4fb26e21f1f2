"""Each caveat appears where it must, and stays away where it must not."""

import inspect
import shutil

import pytest
from made import adamw, arm, cosine, make_race

from stretto import methods
from stretto.core import ScheduleMethod
from stretto.measure import caveats
from stretto.measure.store import _write
from stretto.measure.summary import summarise

BASELINE = {"rate": 0.0035, "cost": 0.03, "steps": 1250, "methods": [adamw(0.002), cosine()]}
FAST = {"rate": 0.02, "cost": 0.047, "steps": 200, "methods": [adamw(0.002), cosine()]}


def summary_of(store, *arms, **fields):
    return summarise(store, make_race(list(arms), **fields))


def two(store, base=(), fast=(), seeds=range(3), **fields):
    """A race of two arms in place of the one before."""
    shutil.rmtree(store.root / "stdlib-gpt", ignore_errors=True)
    return summary_of(
        store,
        arm(store, "baseline", seeds, **{**BASELINE, **dict(base)}),
        arm(store, "fast", seeds, **{**FAST, **dict(fast)}),
        **fields,
    )


def told(caveat, *arguments):
    return " ".join(caveat(*arguments))


def test_a_reference_that_decays_to_the_end_of_its_budget_is_not_doubted(store):
    assert not told(caveats.schedule, two(store))


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ([], "100 %"),
        ([{"method": "cosine", "final": 0.3}], "30 %"),
        ([{"method": "warmup_stable_decay", "decay": 0, "final": 0}], "100 %"),
        ([{"method": "batch_size_warmup"}], "100 %"),
    ],
)
def test_a_schedule_that_does_not_end_at_the_budget(store, schedule, share):
    said = told(caveats.schedule, two(store, base={"methods": [adamw(0.002), *schedule]}))
    assert f"ends its budget with the learning rate at {share} of its peak" in said


def test_a_reference_that_needs_no_decay(store):
    assert not told(caveats.schedule, two(store, base={"methods": [{"method": "schedule_free"}, adamw(0.1)]}))


def test_a_reference_that_crosses_in_the_middle_of_its_schedule(store):
    said = told(caveats.schedule, two(store, base={"steps": 2000}))
    assert "reached the target at 4" in said and "the speed-ups would shrink" in said


def test_every_schedule_of_the_learning_rate_is_known():
    """A new schedule would make each reference that uses it look as if it never decayed."""
    classes = [getattr(methods, name) for name in dir(methods)]
    pacing = {
        one.__name__
        for one in classes
        if inspect.isclass(one) and issubclass(one, ScheduleMethod) and "lr" in getattr(one, "paces", ())
    }
    known = {type(methods.parse(name).methods[0]).__name__ for name in caveats.SCHEDULES}
    assert pacing == known
    bent = {name for table in caveats.BENT.values() for name in table} | set(caveats.EVALUATION)
    assert all(methods.find(name) for name in (*caveats.DECAYLESS, *bent))


def test_a_control_that_excludes_one(store):
    base = arm(store, "baseline", range(3), **BASELINE)
    base["times"] = {
        run: {"wall": 10.0 + i, "cpu": 10.0 + i, "source": "sitting"} for i, run in enumerate(base["runs"])
    }
    twin = arm(store, "control", range(3), **BASELINE)

    def raced(factor):
        twin["times"] = {
            run: {"wall": factor * (10.0 + i) * (1 + 0.001 * i), "cpu": 10.0 + i, "source": "sitting"}
            for i, run in enumerate(twin["runs"])
        }
        return told(caveats.control, summary_of(store, base, twin, control="control"))

    assert "in wall time, which excludes 1" in raced(1.2)
    assert not raced(0.9995)
    assert "no control" in told(caveats.control, two(store))


def test_a_metric_that_a_method_bends(store):
    smoothing = {"methods": [adamw(0.002), cosine(), {"method": "label_smoothing", "smoothing": 0.1}]}
    said = told(caveats.bent, two(store, fast=smoothing))
    assert "label_smoothing trains for softer targets" in said and "(in fast)" in said
    assert "(in baseline)" in told(caveats.bent, two(store, base=smoothing))
    assert not told(caveats.bent, two(store, base=smoothing, fast=smoothing))
    assert not told(caveats.bent, two(store, fast=smoothing, metric="accuracy"))
    nested = {"methods": [{"method": "either", "first": {"method": "mixup"}, "second": {"method": "cutmix"}}]}
    assert "mixup trains on mixed targets" in told(caveats.bent, two(store, fast=nested))


def test_a_grid_of_evaluations_coarser_than_the_effect(store):
    like_it = {**BASELINE, "rate": 0.00355}
    said = told(caveats.grid, two(store, fast=like_it))
    assert "more than the difference in steps between baseline and fast: evaluate more often" in said
    assert not told(caveats.grid, two(store))


def test_data_that_the_target_was_not_set_on(store):
    assert "fingerprint differs" in told(caveats.fingerprint, two(store, target_valid=False))
    assert not told(caveats.fingerprint, two(store))


def test_runs_on_other_data_than_the_races(store):
    fast = arm(store, "fast", range(3), **FAST)
    store.run(fast["runs"][0]).update(workload={"name": "stdlib-gpt", "fingerprint": "beef"})
    said = told(caveats.fingerprint, summary_of(store, arm(store, "baseline", range(3), **BASELINE), fast))
    assert "(fingerprint beef, not 0f1e2d3c4b5a)" in said


def test_how_many_seeds_would_resolve_what_is_not_resolved(store):
    fast = arm(store, "close", range(3), **BASELINE)
    fast["times"] = {
        run: {"wall": wall, "cpu": wall, "source": "sitting"}
        for run, wall in zip(fast["runs"], (20.0, 27.0, 31.0))
    }
    base = arm(store, "baseline", range(3), **BASELINE)
    base["times"] = {run: {"wall": 28.0, "cpu": 28.0, "source": "sitting"} for run in base["runs"]}
    summary = summary_of(store, base, fast)
    assert summary.arms[1].wall.verdict == "not resolved"
    assert "as far from 1 as it looks: close (1.09x) about 51." in told(caveats.power, summary)
    assert not told(caveats.power, two(store))
    assert not told(caveats.power, summary_of(store, base, fast, target_valid=False))


def test_a_verdict_that_does_not_outlive_the_number_of_comparisons(store):
    base = arm(store, "baseline", range(3), **BASELINE)
    walls = (24.5, 25.0, 25.9)
    base["times"] = {run: {"wall": 28.0, "cpu": 28.0, "source": "sitting"} for run in base["runs"]}
    arms = [arm(store, f"arm {i}", range(3), **BASELINE) for i in range(6)]
    for one in arms:
        one["times"] = {run: {"wall": w, "cpu": w, "source": "sitting"} for run, w in zip(one["runs"], walls)}
    assert summary_of(store, base, arms[0]).arms[1].wall.verdict == "faster"
    assert not told(caveats.comparisons, summary_of(store, base, arms[0]))
    assert "With 6 comparisons at once" in told(caveats.comparisons, summary_of(store, base, *arms))


def tuning_of(**trials):
    """A stored tuning: each arm's rates that were tried, the best first."""
    entries = [
        {
            "name": name, "hash": f"given {name}", "spaces": {"adamw.lr": "log:1e-4..1e-2"}, "confirmation": None,
            "winner": {"values": {"adamw.lr": rates[0]}, "hash": f"won {name}"},
            "trials": [{"number": i, "values": {"adamw.lr": rate}, "metrics": []} for i, rate in enumerate(rates)],
        }
        for name, rates in trials.items()
    ]  # fmt: skip
    return {"schema": 1, "id": "t", "created": "now", "workload": "stdlib-gpt", "rungs": [], "arms": entries}


def test_a_tuned_value_at_the_edge_of_what_was_tried(store):
    summary = two(store)
    edge, inside = (0.01, 0.001, 0.005), (0.005, 0.001, 0.01)
    said = told(caveats.tuning, summary, [tuning_of(baseline=inside, fast=edge)])
    assert "fast: its best adamw.lr, 0.01, is the largest tried" in said and "baseline:" not in said
    assert not told(caveats.tuning, summary, [tuning_of(baseline=inside, fast=inside)])
    assert not told(caveats.tuning, summary, [tuning_of(another=edge)])
    assert not told(caveats.tuning, summary, [])


def test_arms_that_were_tuned_unequally(store):
    summary, inside = two(store), (0.005, 0.001, 0.01)
    said = told(caveats.tuning, summary, [tuning_of(fast=inside)])
    assert "was tuned with 0 trials, fast with 3: less hard, which alone can fake a speed-up" in said
    said = told(caveats.tuning, summary, [tuning_of(baseline=inside)])
    assert "was tuned with 3 trials, fast with 0: harder" in said
    assert not told(caveats.tuning, summary, [tuning_of(baseline=inside), tuning_of(fast=inside)])


def test_a_folders_tunings_are_read_with_its_races(store):
    (store.root / "tunings").mkdir()
    _write(store.root / "tunings" / "t.json", tuning_of(fast=(0.01, 0.001)))
    (store.root / "tunings" / "torn.json").write_text('{"workload": "stdl')
    warnings = two(store).warnings
    assert any("less hard" in one for one in warnings) and any(
        "is the largest tried" in one for one in warnings
    )
    _write(store.root / "tunings" / "t.json", {**tuning_of(fast=(0.01, 0.001)), "workload": "digits"})
    assert not any("tried" in one for one in two(store).warnings)
