"""Where runs missed, and on the way: numbers as by hand, from runs that were made up."""

from __future__ import annotations

import math

import pytest
from made import arm, make_race

from stretto.measure import export, figures, report, sources
from stretto.measure.misses import missed
from stretto.measure.on_the_way import on_the_way
from stretto.measure.summary import summarise

BASELINE = {"rate": 0.0035, "cost": 0.03, "steps": 2000}
FAST = {"rate": 0.02, "cost": 0.047, "steps": 500}


@pytest.fixture
def arms(store):
    return arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)


def miss(store, entry, which):
    run = store.run(entry["runs"][which])
    run.update(state="done", crossing=None)
    return run.rows()[-1]["wall"]


def test_without_misses_there_is_nothing_to_tell_of_them(store, arms):
    summary = summarise(store, make_race(list(arms)))
    assert missed(summary) == {} and "reached" not in [one.name for one in figures.drawings(summary)]
    assert missed(summarise(store, make_race(list(arms), target=None))) == {}


def test_a_hit_costs_what_was_spent_over_the_hits_and_the_median_is_the_second_of_three(store, arms):
    base, fast = arms
    longest = max(range(3), key=lambda which: store.run(base["runs"][which]).rows()[-1]["wall"])
    end = miss(store, base, longest)
    summary = summarise(store, make_race([base, fast]))
    found = missed(summary)
    walls = sorted(result.wall for result in summary.arms[0].results)
    assert walls[-1] == end and summary.timed
    assert found["baseline"].per_hit == pytest.approx(sum(walls) / 2)
    assert found["baseline"].median.estimate == walls[1] and math.isinf(found["baseline"].median.high)
    assert found["baseline"].restricted is None and found["baseline"].logrank is None
    horizon = end  # of the arm with a miss; the other is known for good
    means = [sum(min(r.wall, horizon) for r in one.results) / 3 for one in summary.arms]
    assert found["fast"].restricted.estimate == pytest.approx(means[0] / means[1])
    assert 0 < found["fast"].logrank < 0.1
    assert "reached" in [one.name for one in figures.drawings(summary)]


def test_where_no_run_of_an_arm_got_there_a_hit_has_no_cost(store, arms):
    base, fast = arms
    for which in range(3):
        miss(store, base, which)
    found = missed(summarise(store, make_race([base, fast])))["baseline"]
    assert math.isinf(found.per_hit) and math.isinf(found.median.estimate)


def test_on_the_way_targets_are_the_references_and_the_easier_come_first(store, arms):
    summary = summarise(store, make_race(list(arms)))
    found = on_the_way(summary)
    assert len(found) == 3 and list(found) == sorted(found, reverse=True) and min(found) > 2.0
    for target, ups in found.items():
        assert list(ups) == ["fast"] and ups["fast"].method == "paired"
        times = [
            [next(wall for _, wall, loss in run.points if loss <= target) for run in one.results]
            for one in summary.arms
        ]
        expected = math.prod(a / b for a, b in zip(*times)) ** (1 / 3)
        assert ups["fast"].estimate == pytest.approx(expected, rel=0.02)  # a lucky evaluation does not count


def test_on_the_way_to_nowhere(store, arms):
    base, fast = arms
    assert on_the_way(summarise(store, make_race([base, fast], target=None))) == {}
    for which in range(3):
        miss(store, base, which)
    assert on_the_way(summarise(store, make_race([base, fast]))) == {}


def test_the_page_and_its_data_have_both(store, arms):
    base, fast = arms
    miss(store, base, 1)
    race = store.save_race(make_race([base, fast]))
    part = sources.race_part(store, race)
    page = report.page([part])
    assert "Where runs missed" in page and "On the way" in page and "2 of 3" in page
    data = export.as_data(part)["arms"]
    assert data[0]["misses"]["median"].keys() == {"estimate", "low", "high"} and data[0]["on_the_way"] == []
    assert len(data[1]["on_the_way"]) == 3
    rows = export.as_csv([part])
    assert rows.count(",on the way,fast,") == 3 and ",per hit,baseline," in rows
