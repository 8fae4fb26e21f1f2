"""Reports of what is not one tidy race: several folders, runs of no race, spoilt folders, and five hundred runs."""

import json
import time

import pytest
from made import arm, make_race, train

from stretto.commands.report import Report
from stretto.measure import export, report, sources
from stretto.measure.store import Store
from stretto.measure.summary import summarise

BASELINE = {"rate": 0.0035, "cost": 0.03, "steps": 2000}
FAST = {"rate": 0.02, "cost": 0.047, "steps": 500}


def make_runs(store, **changes):
    """Runs that no race lists, of two arms."""
    for name, training in (("baseline", BASELINE), ("fast", FAST)):
        for seed in range(3):
            run = train(store, name, seed, **training)
            run.update(
                workload={"name": "stdlib-gpt", "fingerprint": "f00d", "metric": "loss", **changes},
                identity={**run.record["identity"], "batch": 64, "budget": 64_000, "target": 2.0},
            )


def raced(folder, created="2026-11-07T10:15:00+00:00", **fields):
    store = Store(folder)
    arms = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    return store, store.save_race(make_race(arms, created=created, **fields))


def test_runs_of_no_race_are_grouped_by_arm_and_get_no_verdict(store):
    make_runs(store)
    part = sources.newest(store)
    assert (part.kind, part.id) == ("runs", "stdlib-gpt")
    assert [(one.name, len(one.results)) for one in part.summary.arms] == [("baseline", 3), ("fast", 3)]
    assert part.summary.race["reference"] == "baseline" and part.summary.arms[1].wall.estimate > 1
    assert any("belong to no race" in warning for warning in part.summary.warnings)
    assert "no verdict" in part.summary.answers[0][1] and "faster" not in part.summary.answers[0][1]
    assert "Stretto runs" in report.page([part])


def test_runs_of_several_sittings_are_compared_in_steps(store):
    make_runs(store)
    store.runs()[0].update(sitting="another")
    assert all(one.wall is None for one in sources.newest(store).summary.arms)


def test_runs_that_do_not_compare_are_named_and_left_out(store):
    make_runs(store)
    odd, other = store.runs()[:2]
    odd.update(workload={"name": "stdlib-gpt", "fingerprint": "beef", "metric": "loss"})
    other.update(identity={**other.record["identity"], "target": 1.9})
    digits = store.create({"workload": "digits", "recipe_hash": "x"}, {"state": "done", "seed": 0})
    part = sources.newest(store)
    assert part.notes == (
        "Left out: 1 run of workload digits, which does not compare with the others.",
        "Left out: 1 run on data with fingerprint beef, which does not compare with the others.",
        "Left out: 1 run of target 1.9, which does not compare with the others.",
    )
    assert sum(len(one.results) for one in part.summary.arms) == 4
    assert all(note in export.as_markdown([part]) for note in part.notes)
    assert sources.find([str(store.root / "digits")], store.root)[0][0].summary.runs[0].id == digits.id


def test_equal_names_of_different_recipes_stay_apart(store):
    make_runs(store)
    fast = [run for run in store.runs() if run.record["arm"] == "fast"]
    fast[0].update(identity={**fast[0].record["identity"], "budget": 1})
    assert sorted(one.name for one in sources.newest(store).summary.arms) == ["baseline", "fast", "fast (2)"]


def test_a_run_of_a_newer_schema_is_named_and_left_out(store):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    newer, bare = fast["runs"][:2]
    store.run(newer).update(schema=2)
    (store.run(bare).path / "run.json").write_text("{}")
    summary = summarise(store, make_race([base, fast]))
    assert summary.warnings[:2] == tuple(
        f"Run {name} is left out: its run.json {why}."
        for name, why in sorted(
            [(newer, "has schema 2, this version reads 1"), (bare, "lacks seed and state")]
        )
    )
    assert len(summary.arms[1].results) == 1 and summary.arms[1].unfinished == 2


def test_a_torn_last_line_is_named_and_the_rest_counts(store):
    base, fast = arm(store, "baseline", range(3), **BASELINE), arm(store, "fast", range(3), **FAST)
    run = store.run(fast["runs"][0])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9999, "lo')
    summary = summarise(store, make_race([base, fast]))
    assert summary.warnings[0] == f"The last evaluation of run {run.id} was torn by a kill and is left out."
    assert summary.arms[1].hits == 3
    assert not any("torn" in one for one in summarise(store, make_race([base])).warnings)


def test_several_folders_share_a_page_and_one_without_runs_is_named(tmp_path):
    stores = [raced(tmp_path / name)[0] for name in ("a", "b")]
    empty = Store(tmp_path / "empty")
    names = [str(store.root) for store in (stores[0], empty, stores[1])]
    parts, failures = sources.find(names, tmp_path)
    assert [part.store.root.name for part in parts] == ["a", "b"]
    assert len(failures) == 1 and f"{empty.root} has no readable run" in failures[0]
    page = report.page(parts)
    assert 'href="#part-1-top"' in page and 'id="part-1-top"' in page and 'data-curves="part-1-time"' in page
    assert len(json.loads(export.as_json(parts))["reports"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing is no runs folder, and no race, study or quality of .*: 2"),
        ("folder", "folder is no runs folder"),
        ("runs/none", "has no readable run of none"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name, message):
    raced(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "runs" / "none").mkdir()
    with pytest.raises(ValueError, match=message):
        sources.find([name], tmp_path / "runs")


def test_the_newest_readable_race_is_taken(tmp_path):
    store, first = raced(tmp_path / "runs")
    (store.root / "races" / "9-torn.json").write_text('{"schema": 1, "wor')
    (store.root / "races" / "8-bare.json").write_text('{"schema": 1, "created": "now"}')
    part = sources.newest(store)
    assert (part.kind, part.id) == ("race", first) and len(part.notes) == 2
    assert "race 9-torn" in part.notes[0] and "is unreadable" in part.notes[0]
    assert "race 8-bare" in part.notes[1] and "lacks workload, metric" in part.notes[1]
    assert sources.find([first], store.root)[0][0].notes == ()


@pytest.mark.parametrize("chosen", ["md", "csv", "json"])
def test_the_command_prints_what_can_be_read_or_writes_it(tmp_path, capsys, chosen):
    store, race = raced(tmp_path / "runs")
    assert Report((race,), chosen, out=store.root).run() == 0
    printed = capsys.readouterr().out
    assert Report(out=store.root, to=tmp_path / f"there.{chosen}").run() == 0
    assert (tmp_path / f"there.{chosen}").read_text() == printed and len(printed) > 500
    assert capsys.readouterr().out == f"report: {tmp_path / 'there'}.{chosen}\n"


@pytest.mark.parametrize("chosen", ["html", "png"])
def test_the_command_puts_pages_and_figures_beside_the_race(tmp_path, capsys, chosen):
    store, race = raced(tmp_path / "runs")
    assert Report(format=chosen, out=store.root).run() == 0
    place = store.root / "races" / f"{race}.{chosen}"
    assert place.stat().st_size > 10_000 and f"report: {place}\n" in capsys.readouterr().out


def test_the_command_reports_what_it_can_and_says_what_it_cannot(tmp_path, capsys):
    store, _ = raced(tmp_path / "runs")
    assert Report((str(store.root), "absent"), "md", out=store.root).run() == 2
    told = capsys.readouterr()
    assert told.out.startswith("# stdlib-gpt") and told.err.count("\n") == 1 and "absent" in told.err


def test_an_ending_that_names_no_format(tmp_path):
    store, _ = raced(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"report\.doc ends in none of html, md, csv, json, png, pdf"):
        Report(to=tmp_path / "report.doc", out=store.root).run()


def test_a_sheet_needs_a_finished_run(store, tmp_path):
    race = store.save_race(make_race([arm(store, "baseline", [], **BASELINE)]))
    with pytest.raises(ValueError, match="no run has finished"):
        report.sheet([sources.race_part(store, race)], tmp_path / "sheet.png")


@pytest.mark.slow
def test_five_hundred_runs_are_reported_in_ten_seconds(tmp_path):
    store = Store(tmp_path / "runs")
    arms = [
        arm(store, f"arm {i:02d}", range(10), **{**BASELINE, "rate": 0.0035 + i / 1e4}) for i in range(50)
    ]
    store.save_race(make_race(arms, reference="arm 00"))
    start = time.perf_counter()
    path = report.write_text(report.page([sources.newest(store)]), tmp_path / "page.html")
    assert time.perf_counter() - start < 10
    assert path.stat().st_size < 2_000_000 and path.read_text().count("arm 49, seed 9") == 2
