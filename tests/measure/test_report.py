"""The report says what the runs say: numbers, verdicts or their absence, and no name becomes markup."""

import json
import math
import re

import pytest
from made import HOSTILE, adamw, arm, make_race

from stretto.measure import report
from stretto.measure.statistics import Outcome, geometric_mean, speed_up
from stretto.measure.store import Store
from stretto.measure.summary import count, plain, seconds, size, summarise, table

BASELINE = {"rate": 0.0035, "cost": 0.03, "steps": 2000}
FAST = {"rate": 0.02, "cost": 0.047, "steps": 500}


def arms_of(summary):
    return {one.name: one for one in summary.arms}


def race_of(store, *arms, **fields):
    return summarise(store, make_race(list(arms), **fields))


def times(store, entry, unit):
    found = []
    for name in entry["runs"]:
        run = store.run(name)
        row = next(row for row in run.rows() if row["step"] == run.record["crossing"]["at"])
        found.append(row[unit])
    return found


def test_the_numbers_are_those_of_the_first_crossing(store):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    summary = race_of(store, base, fast)
    found = arms_of(summary)["fast"]
    slow, quick = times(store, base, "wall"), times(store, fast, "wall")
    assert found.mean("wall") == pytest.approx(geometric_mean(quick))
    assert found.mean("cpu") == pytest.approx(1.9 * geometric_mean(quick))
    expected = speed_up(*([Outcome(i, t) for i, t in enumerate(arm)] for arm in (slow, quick)))
    assert found.wall == expected and found.wall.method == "paired" and found.wall.verdict == "faster"
    assert found.parts.step_efficiency * found.parts.step_cost == pytest.approx(expected.estimate)
    ((_, sentence),) = summary.answers
    assert sentence == (
        f"fast reached loss 2 in {seconds(geometric_mean(quick))} where baseline took "
        f"{seconds(geometric_mean(slow))}: {expected} (3 seeds, wall time)."
    )
    assert arms_of(summary)["baseline"].wall is None


def test_misses_are_never_a_number(store):
    base = arm(store, "baseline", range(3), **BASELINE)
    never = arm(store, "never", range(3), rate=0.0008, cost=0.02, steps=2000)
    summary = race_of(store, base, never)
    found = arms_of(summary)["never"]
    assert found.hits == 0 and found.mean("wall") is None and found.parts is None
    assert found.wall.method == "bound" and found.wall.low == 0
    assert "not reached" in plain(summary)
    assert "never did not reach loss 2 in any of 3 runs where baseline took" in summary.answers[0][1]
    swapped = race_of(store, base, never, reference="never")
    assert arms_of(swapped)["baseline"].wall.high == math.inf
    assert "never missed it in 3 of 3 runs: > " in swapped.answers[0][1]


def test_runs_that_missed_are_in_the_estimate(store):
    base = arm(store, "baseline", range(3), **BASELINE)
    store.run(base["runs"][1]).update(state="done", crossing=None)
    summary = race_of(store, base, arm(store, "fast", range(3), **FAST))
    found = arms_of(summary)["fast"].wall
    assert found.method == "aft" and found.verdict == "faster" and found.low < found.estimate < found.high
    assert "baseline missed it in 1 of 3 runs: " + str(found) in summary.answers[0][1]
    assert summary.answers[0][1].endswith("Runs that missed count as longer than their budget.")


@pytest.mark.parametrize("unit", ["wall", "steps"])
def test_beside_misses_a_crossing_lies_between_two_evaluations(store, unit):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    missed = store.run(base["runs"][1])
    missed.update(state="done", crossing=None)
    found = getattr(arms_of(race_of(store, base, fast))["fast"], unit)
    runs = {arm["name"]: [store.run(name) for name in arm["runs"]] for arm in (base, fast)}
    key = "step" if unit == "steps" else unit
    expected = []
    for arms in runs.values():
        expected.append([])
        for seed, run in enumerate(arms):
            at = {row["step"]: row[key] for row in run.rows()}
            crossing = run.record["crossing"]
            if crossing:
                expected[-1].append(Outcome(seed, at[crossing["at"]], before=at[crossing["before"]]))
            else:
                expected[-1].append(Outcome(seed, at[max(at)], reached=False))
    assert found.estimate == pytest.approx(speed_up(*expected).estimate)
    assert found.low == pytest.approx(speed_up(*expected).low)


def test_a_failed_run_counts_as_a_miss_even_before_its_first_evaluation(store):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    run = store.run(fast["runs"][1])
    run.update(state="failed", error="the loss was not finite in 5 steps", crossing=None, clock=None)
    (run.path / "metrics.jsonl").unlink()
    fast["times"] = {run.id: {"why": "it has no evaluation"}}
    summary = race_of(store, base, fast)
    found = arms_of(summary)["fast"]
    assert (found.hits, len(found.results)) == (2, 3) and found.wall.verdict == "not resolved"
    assert any("fast, seed 1, failed: the loss was not finite" in warning for warning in summary.warnings)


def test_unfinished_and_missing_runs_count_nowhere(store):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    store.run(fast["runs"][0]).update(state="interrupted")
    fast["runs"].append("gone")
    summary = race_of(store, base, fast, interrupted=True)
    found = arms_of(summary)["fast"]
    assert len(found.results) == 2 and found.unfinished == 2 and found.wall.method == "welch"
    assert any("2 of its runs did not finish" in warning for warning in summary.warnings)
    assert any("interrupted" in warning for warning in summary.warnings)


def test_seconds_of_another_sitting_are_not_compared(store):
    base = arm(store, "baseline", range(3), **BASELINE)
    old = arm(store, "old", range(3), **FAST, sitting="before")
    summary = race_of(store, base, old)
    found = arms_of(summary)["old"]
    assert found.wall is None and found.cpu is None and found.parts is None
    assert found.steps.verdict == "faster"
    assert "Seconds are not compared: it was trained in another sitting." in summary.answers[0][1]
    old["times"] = {run: {"wall": 3.0, "cpu": 6.0, "source": "remeasured"} for run in old["runs"]}
    found = arms_of(race_of(store, base, old))["old"]
    assert found.mean("wall") == pytest.approx(3.0) and found.wall.verdict == "faster"
    crossed = next(point for point in found.results[0].points if point[0] == found.results[0].steps)
    assert crossed[1] == pytest.approx(3.0)  # the curve is drawn at the cost measured now


def test_a_run_that_went_on_after_an_interrupted_race_lends_it_no_seconds(store):
    """The interrupted race stored the seconds so far; with the later crossing they would be far too short."""
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    fast["times"] = {run: {"wall": 0.1, "cpu": 0.1, "source": "sitting"} for run in fast["runs"]}
    for run in fast["runs"]:
        store.run(run).update(sitting=None)
    assert arms_of(race_of(store, base, fast))["fast"].wall is None


def test_the_control_is_shown_and_warns_where_it_excludes_one(store):
    base = arm(store, "baseline", range(3), **BASELINE)
    same = {
        run: {"wall": t, "cpu": t, "source": "sitting"}
        for run, t in zip(base["runs"], times(store, base, "wall"))
    }
    control = arm(store, "control", range(3), **BASELINE)
    drift = {run: {**time, "wall": time["wall"] * 1.2} for run, time in zip(control["runs"], same.values())}
    base["times"], control["times"] = same, drift
    summary = race_of(store, base, control, control="control")
    said = [warning for warning in summary.warnings if "came out at 0.83x [0.83, 0.83] in wall" in warning]
    assert len(said) == 1 and "excludes 1" in said[0] and not any("CPU" in one for one in summary.warnings)
    assert [one.name for one, _ in summary.answers] == ["baseline"]
    control["times"] = dict(zip(control["runs"], same.values()))
    assert not any(
        "excludes" in warning for warning in race_of(store, base, control, control="control").warnings
    )
    assert any("no control" in warning for warning in race_of(store, base).warnings)


def test_other_data_gets_no_verdict(store):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    summary = race_of(store, base, fast, target_valid=False)
    assert "], no verdict (3 seeds" in summary.answers[0][1] and "faster" not in summary.answers[0][
        1
    ] + plain(summary)
    assert any("fingerprint differs" in warning for warning in summary.warnings)


def test_a_race_without_a_target_compares_no_times(store, tmp_path):
    base = arm(store, "baseline", range(3), **BASELINE, state="done")
    fast = arm(store, "fast", range(3), **FAST, state="done")
    race = store.save_race(make_race([base, fast], target=None, target_name=None))
    summary = summarise(store, store.race(race))
    assert all(one.wall is None and one.mean("wall") for one in summary.arms)
    assert [one.name for one, _ in summary.answers] == ["fast"]
    assert "no target" in report.write(store, race, tmp_path / "page.html").read_text()


def test_one_seed_and_no_runs_at_all(store):
    base, fast = arm(store, "baseline", [0], **BASELINE), arm(store, "fast", [0], **FAST)
    empty = arm(store, "empty", [], **FAST)
    summary = race_of(store, base, fast, empty)
    assert "too few seeds" in summary.answers[0][1]
    assert summary.answers[1][1] == "empty has no finished run."


def test_the_tables_hold_the_same_cells(store, full_race):
    summary = summarise(store, store.race(full_race))
    lines = plain(summary).splitlines()
    assert len(lines) == 2 + 7 and len({len(line) for line in lines}) == 1
    assert "\\|" in lines[6] and " not reached " in lines[6]
    assert "| 1.23 M " in lines[2] and "| 345 MB " in lines[2] and " reference " in lines[2]
    drawn = table(summary)
    assert drawn.row_count == 7 and len(drawn.columns) == len(lines[0].split(" | "))
    assert HOSTILE in [str(cell) for cell in drawn.columns[0].cells]


def test_the_page_is_small_whole_and_loads_nothing(store, full_race, tmp_path):
    path = report.write(store, full_race, tmp_path / "deep" / "page.html")
    page = path.read_text()
    assert len(page) < 1_000_000
    loaded = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in loaded and "https://" not in loaded and "@import" not in loaded
    assert not re.search(r'(src|href)="(?!#|data:,)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    summary = summarise(store, store.race(full_race))
    assert str(arms_of(summary)["fast"].wall) in page.replace("\N{NO-BREAK SPACE}", " ")
    for text in (
        "betas",
        "[0.9, 0.95]",
        "65536",
        "A processor of 2 cores",
        "2.13.0",
        "0f1e2d3c4b5a",
        "140 blocks",
    ):
        assert text in page
    assert report.write(store, full_race, path).read_text() == page  # nothing in it depends on the moment


def test_hostile_names_stay_text(store, full_race, tmp_path):
    page = report.write(store, full_race, tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "<b>sgd" not in page and "<img" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; | $x^2$ #0a0b05" in page
    for block in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL):
        labels = [line["label"] for line in json.loads(block)["lines"]]
        assert f"{HOSTILE}, seed 0" in labels


def test_many_long_runs_still_fit(store, tmp_path):
    store = Store(tmp_path / "many")
    arms = [arm(store, f"arm {i}", range(5), rate=0.0035, cost=0.03, steps=2) for i in range(8)]
    for run in store.runs():
        (run.path / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "loss": 5 / step**0.1, "wall": step / 7, "cpu": step / 3}) + "\n"
                for step in range(1, 1000)
            )
        )
    race = store.save_race(make_race(arms, reference="arm 0"))
    assert report.write(store, race, tmp_path / "page.html").stat().st_size < 1_000_000


def test_a_rising_metric_a_recipe_in_another_form_and_an_unreadable_place(store, tmp_path):
    base = arm(store, "baseline", range(2), **BASELINE)
    base["recipe"] = {"kind": "another form", "deep": adamw(0.1)}
    race = store.save_race(make_race([base], falls=False, created="long ago"))
    page = report.write(store, race, tmp_path / "page.html").read_text()
    assert "another form" in page and "long ago" in page
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        report.write(store, race, tmp_path / "file" / "page.html")


def test_numbers_have_the_digits_a_reader_needs():
    assert [seconds(x) for x in (0.5234, 2.94, 31.4, 205.0, 7600)] == [
        "0.52 s",
        "2.9 s",
        "31 s",
        "3.4 min",
        "2.1 h",
    ]
    assert [count(x) for x in (None, 12, 4_500, 1_234_567, 7e9)] == ["", "12", "4.5 k", "1.23 M", "7 G"]
    assert [size(x) for x in (None, 345_000_000, 2.5e9)] == ["", "345 MB", "2.5 GB"]
