"""A study's report says the same in every form: on the page, in Markdown, CSV and JSON, and as a sheet of figures."""

import csv
import io
import json
import re
import shutil

import pytest
from made import METHODS, make_study

from stretto.measure import export, figures, report, sources, study_figures
from stretto.measure.store import Store
from stretto.measure.study_summary import shown
from stretto.measure.summary import summarise


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A store with one study, and its id."""
    store = Store(tmp_path_factory.mktemp("studied") / "runs")
    return store, make_study(store)


@pytest.fixture(scope="module")
def part(studied):
    return sources.study_part(*studied)


@pytest.fixture(scope="module")
def text(part):
    return report.page([part]).replace("\N{NO-BREAK SPACE}", " ").replace("<wbr>", "")


def test_the_answer_comes_first_then_what_to_know_then_the_methods(part, text):
    places = [text.index(one) for one in (part.study.sentences[0], "Before you believe it", "The methods",
                                          "Together", "The recommendation", "The compositions", "Every run",
                                          "The recipes, in full", "Machine and versions")]  # fmt: skip
    assert places == sorted(places)


def test_the_page_holds_the_three_answers_the_pairs_the_gap_and_the_shares(part, text):
    for one in part.study.answers:
        for effect in (one.alone, one.in_company, one.on_average):
            assert shown(study_figures.factor(effect)) in text
    assert all(f"{a} × {b}</th><td>{shown(found)}" in text for (a, b), found in part.pairs)
    assert shown(part.study.gap.fitted) in text
    assert all(shown(found) in text for found in part.study.best.shares.values())
    assert "mixup and ema together give" in text and "less than its parts" in text


def test_the_page_is_whole_and_loads_nothing(text):
    loaded = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http://" not in loaded and "https://" not in loaded and "@import" not in loaded
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert text.count("<figure") == 7 and "#0a0b" not in text


def test_of_many_compositions_the_fastest_are_in_colour(part):
    colours = figures.colours(part.summary)
    assert colours[:2] == ["--reference", "--control"]
    coloured = {arm.name for arm, one in zip(part.summary.arms, colours) if one.startswith("--arm")}
    assert coloured == {arm.name for arm, _ in part.summary.answers[:6]}


def test_the_cost_of_a_speed_up_is_a_product_of_three(part):
    """Compiling counts once a run, so the faster arm loses by it."""
    arms = {arm.name: arm for arm in part.summary.arms}
    name = part.summary.answers[0][0].name
    cost, base, fast = figures.costs(part.summary)[name], arms["baseline"], arms[name]
    whole = [(1.0 * one.mean("wall")) for one in (base, fast)]
    assert cost.step_efficiency * cost.step_cost == pytest.approx(whole[0] / whole[1])
    assert cost.overhead < 1 and cost.total == pytest.approx((whole[0] + 0.5) / (whole[1] + 0.5), rel=1e-3)


def test_json_has_its_keys_and_every_number_of_the_page(part):
    data = json.loads(export.as_json([part]))
    assert list(data) == ["schema", "suites", "reports"] and data["schema"] == 1 and data["suites"] == []
    (found,) = data["reports"]
    assert set(found) == {
        "kind", "id", "created", "workload", "metric", "falls", "fingerprint", "target", "target_valid",
        "reference", "control", "answers", "caveats", "arms", "runs", "study", "quality",
    }  # fmt: skip
    assert set(found["arms"][3]) == {
        "name", "short", "batch", "budget", "parameters", "memory", "flops", "seeds", "reached", "unfinished",
        "times", "speed_up", "cost", "frontier", "on_the_way", "misses",
    }  # fmt: skip
    assert set(found["runs"][0]) == {
        "run", "arm", "seed", "state", "reached", "steps", "before", "fraction", "wall", "cpu", "compile", "last",
    }  # fmt: skip
    study = found["study"]
    assert set(study) == {"methods", "unit", "answers", "interactions", "gap", "best", "sentences"}
    assert study["methods"] == list(METHODS) and len(study["interactions"]) == 10
    alone = next(one["alone"] for one in study["answers"] if one["method"] == "ema")
    assert alone == study_figures.factor(part.study.answers[1].alone)._asdict()
    assert found["arms"][2]["speed_up"]["wall"]["estimate"] == part.summary.arms[2].wall.estimate


def test_csv_holds_the_figures_of_the_json(part):
    rows = list(csv.DictReader(io.StringIO(export.as_csv([part]))))
    assert list(rows[0]) == list(export.COLUMNS) and all(row["report"] == part.id for row in rows)
    found = {(row["figure"], row["of"], row["and"]): row for row in rows}
    assert len(found) == len(rows)
    gap = found["gap", "", "fitted"]
    assert [float(gap[end]) for end in ("estimate", "low", "high")] == list(part.study.gap.fitted)
    together = found["interaction", "mixup", "ema"]
    assert float(together["estimate"]) == part.pairs[0][1].estimate
    assert found["speed-up", "ema", "wall"]["verdict"] == "faster"
    assert len([row for row in rows if row["figure"] == "run"]) == 3 * len(part.summary.runs)


def test_markdown_holds_the_words_and_both_tables(part):
    lines = export.as_markdown([part]).splitlines()
    assert lines[0].startswith("# stdlib-gpt, time to loss 2: a study of 5 methods")
    assert all(f"- {sentence}" in lines for sentence in (*part.study.sentences, *part.summary.warnings))
    assert sum(line.startswith("| ") for line in lines) > 30


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_figures_are_drawn_on_a_sheet(part, tmp_path, ending, start):
    path = report.sheet([part], tmp_path / "deep" / f"sheet.{ending}")
    assert path.read_bytes().startswith(start) and path.stat().st_size > 30_000


def test_a_study_that_cannot_tell_everything_still_has_a_page(tmp_path):
    """One seed and no run at the target: no interval, no effect, no best, and no failure."""
    store = Store(tmp_path / "runs")
    study = make_study(store, seeds=(0,), target=1.0)
    for run in store.runs():
        run.update(state="done", crossing=None)
    part = sources.study_part(store, study)
    assert part.study.fit is None and "no effect can be told" in report.page([part])
    assert study_figures.drawings(part.study) == []
    assert json.loads(export.as_json([part]))["reports"][0]["study"]["best"] is None


def test_a_study_of_runs_that_were_trained_to_the_end(tmp_path):
    """Without seconds of one sitting there are steps, and the page says so."""
    store = Store(tmp_path / "runs")
    study = make_study(store, sitting="another")
    part = sources.study_part(store, study)
    assert part.study.unit == "steps" and not part.summary.timed
    text = report.page([part])
    assert "in steps" in text and "steps trained" in text and figures.costs(part.summary) == {}


def test_the_newest_study_is_taken_before_its_race(studied, tmp_path):
    store, study = studied
    part = sources.newest(store)
    assert (part.kind, part.id) == ("study", study)
    assert part.summary.arms == summarise(store, part.summary.race).arms
    assert part.place == store.root / "studies" / study
    shutil.copytree(store.root, tmp_path / "runs")
    newer = json.loads((store.root / "studies" / f"{study}.json").read_text())
    (tmp_path / "runs" / "studies" / f"{study}.json").write_text(json.dumps({**newer, "schema": 2}))
    left = sources.newest(Store(tmp_path / "runs", write=False))
    assert left.kind == "race" and "has schema 2" in left.notes[0]
