"""Comparisons at equal quality, from the plan to every form of the report."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import adamw, arm, cosine, make_race
from tiny import ADAMW, BROKEN, Tiny

from stretto import recipes, workloads
from stretto.commands.quality import Quality
from stretto.commands.report import Report
from stretto.core import Recipe
from stretto.measure import equal_figures, export, figures, report, sources
from stretto.measure import race as racing
from stretto.measure.equal import equal_table, summarise_quality
from stretto.measure.quality_plan import QualityPlan, describe, plan_quality, run
from stretto.measure.store import Store
from stretto.methods import AdamW, WarmupStableDecay
from stretto.recipes import Arm

SHARES = (0.25, 0.5, 1.0, 2.0)
HALF = Arm("half", Recipe(AdamW(lr=0.03), WarmupStableDecay()))


def planned(store: Store, *others: Arm, shares: tuple[float, ...] = SHARES, seeds: int = 2) -> QualityPlan:
    return plan_quality(Tiny(), [ADAMW, *(others or (HALF,))], shares, range(seeds), store)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A store with one comparison, and its id."""
    store = Store(tmp_path_factory.mktemp("equal"))
    return store, run(planned(store), store, footprints=False)["id"]


# ---- plans


def test_an_arm_is_a_recipe_at_a_share_of_its_budget_in_whole_steps(tmp_path: Path) -> None:
    plan = planned(Store(tmp_path), Arm("wide", HALF.recipe, batch=16, budget=1000))
    assert [arm.budget for arm in plan.arms] == [80, 160, 320, 640, 256, 496, 992, 2000]
    assert plan.arms[0].name == "adamw at 25 %" and plan.arms[-1].name == "wide at 200 %"


def test_hours_are_those_of_all_budgets_and_of_the_control(tmp_path: Path) -> None:
    plan = QualityPlan(Tiny(), (ADAMW, HALF), SHARES, (0, 1), (0,) * 9, (1 / 320, 2 / 320), 0.0)
    assert plan.hours_left == pytest.approx(2 * (3.75 + 2 * 3.75 + 0.25))
    some = QualityPlan(Tiny(), (ADAMW, HALF), SHARES, (0, 1), (2,) * 8 + (0,), (1 / 320, 2 / 320), 0.0)
    assert (some.missing, some.hours_left) == (0, 0.0)


# ---- running


def test_all_arms_train_to_the_end_on_the_same_seeds(trained: tuple[Store, str]) -> None:
    store, name = trained
    record = store.quality(name)
    race = store.race(record["race"])
    assert record["state"] == "done" and race["target"] is None
    runs = [store.run(one).record for arm in race["arms"] for one in arm["runs"]]
    assert {run["state"] for run in runs} == {"done"} and len(runs) == 18
    assert [(arm["recipe"], arm["share"]) for arm in record["arms"]] == [
        (recipe, share) for recipe in ("adamw", "half") for share in SHARES
    ]


def test_asked_again_nothing_is_trained_and_the_record_is_the_same(trained: tuple[Store, str]) -> None:
    store, name = trained
    plan = planned(store)
    assert plan.missing == 0 and "16 of them stored already" in "\n".join(describe(plan))
    assert run(plan, store, footprints=False)["id"] == name and len(store.qualities()) == 1


def test_a_new_contestant_meets_the_stored_baseline(trained: tuple[Store, str], tmp_path: Path) -> None:
    """Seconds that were stored would not compare with new ones: each arm's cost is measured again."""
    store = Store(shutil.copytree(trained[0].root, tmp_path / "runs"))
    plan = planned(store, Arm("fast", Recipe(AdamW(lr=0.05), WarmupStableDecay())))
    assert plan.missing == 8
    found = summarise_quality(store, run(plan, store, footprints=False))
    assert found.unit == "wall" and [one.name for one in found.contestants] == ["fast"]


# ---- the numbers


def test_the_speed_up_is_the_ratio_of_budgets_times_that_of_costs(trained: tuple[Store, str]) -> None:
    store, name = trained
    found = summarise_quality(store, store.quality(name))
    (one,) = found.contestants
    assert len(one.at) == 4 and len(one.cells) == 4 and one.main[0].share == 1.0
    qualities = [sum(run.quality for run in cell.runs) / 2 for cell in one.cells]
    assert [each.quality for each in one.at] == pytest.approx(qualities)
    inner = [each for each in (*one.at, *one.curve) if each.speed_up.estimate]
    assert inner and one.cost
    for each in inner:
        assert each.speed_up.estimate == pytest.approx(each.needed.estimate / each.budget / one.cost.estimate)
    assert set(found.places) == {arm.name for arm in planned(store).arms}


def made(store: Store, speed: float = 2.0, cost: float = 1.25, **fields: Any) -> str:
    """A made-up comparison: so many times fewer steps, each so many times dearer."""
    kinds = {"baseline": (0.0015, 0.03), "fast": (0.0015 * speed, 0.03 * cost)}
    record: dict[str, Any] = {"workload": "stdlib-gpt", "base": "baseline", "state": "done", "arms": []}
    arms = []
    for recipe, (rate, seconds) in kinds.items():
        for share in SHARES:
            name = f"{recipe} at {100 * share:g} %"
            methods = [adamw(rate), cosine()]
            steps = round(1000 * share)
            training = {"rate": rate, "cost": seconds, "steps": steps, "state": "done"}
            arms.append(arm(store, name, range(4), methods=methods, **training) | {"hash": recipe})
            record["arms"].append({"name": name, "recipe": recipe, "share": share})
    control = {"rate": 0.0015, "cost": 0.03, "steps": 250, "state": "done"}
    arms.insert(1, arm(store, "baseline at 25 % (control)", range(4), **control))
    named = {"reference": arms[0]["name"], "control": arms[1]["name"]}
    race = make_race(arms, target=None, target_name=None, **named, **fields)
    return store.save_quality(record | {"race": store.save_race(race)})


def test_a_known_speed_up_is_found_at_every_quality(tmp_path: Path) -> None:
    """Half the steps at 1.25 times the cost: 1.6x, and a bound where the baseline's budgets end."""
    store = Store(tmp_path)
    found = summarise_quality(store, store.quality(made(store)))
    (one,) = found.contestants
    assert one.cost and one.cost.low < 1.25 < one.cost.high
    assert one.main[1].speed_up.estimate == pytest.approx(1.6, rel=0.15)
    told = [each.speed_up for each in one.curve if each.speed_up.estimate]
    assert len(told) > 20 and sum(ratio.low < 1.6 < ratio.high for ratio in told) >= 0.9 * len(told)
    last = one.at[-1].speed_up
    assert last.method == "bound" and last.low == pytest.approx(0.8, rel=0.05)
    assert found.answers[0].startswith("fast has 1.") and "faster (4 seeds, wall time)" in found.answers[0]
    assert "better in loss (with this probability) than baseline at 25 % (1.00)" in found.details[-1]
    colours = figures.colours(found.race)
    assert set(colours) == {"--reference", "--control", "--arm-0"} and equal_figures.hues(found) == [
        "--arm-0"
    ]


def test_without_seconds_that_compare_it_is_told_in_examples(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = summarise_quality(store, store.quality(made(store, sitting="another")))
    (one,) = found.contestants
    assert (found.unit, one.cost) == ("examples", None) and "in examples" in found.answers[0]
    assert one.main[1].speed_up.estimate == pytest.approx(2.0, rel=0.15)
    assert any("Speed-ups are in examples." in warning for warning in found.race.warnings)


def test_runs_that_fail_leave_their_budget_out_and_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = summarise_quality(
        store, run(replace(planned(store), recipes=(ADAMW, BROKEN)), store, footprints=False)
    )
    assert found.contestants == () and equal_figures.drawings(found) == []
    assert (
        found.sentences[0] == "No speed-up can be told: no recipe but adamw has a mean quality at any budget."
    )
    assert "broken at 25 % is left out: 2 of its 2 runs ended without a quality." in found.race.warnings
    assert equal_table(found)


def test_an_interrupted_comparison_says_so_and_goes_on(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), 0

    def stop(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 20:
            raise KeyboardInterrupt

    record = run(planned(store), store, footprints=False, watch=stop)
    part = sources.quality_part(store, record["id"])
    assert record["state"] == "interrupted" and "No speed-up can be told" in part.sentences[0]
    assert "It was interrupted: this is what it has so far." in report.page([part])
    again = run(planned(store), store, footprints=False)
    assert (again["id"], again["state"]) == (record["id"], "done")


# ---- the report


def test_the_report_says_the_same_in_every_form(trained: tuple[Store, str]) -> None:
    store, name = trained
    part = sources.find([str(store.root)], store.root)[0][0]
    assert (part.kind, part.id) == ("quality", name)  # not its race, which is newer or as new
    assert part.equal
    text = html.unescape(report.page([part])).replace("\N{NO-BREAK SPACE}", " ")
    text = text.replace("\N{NON-BREAKING HYPHEN}", "-").replace("<wbr>", "")
    places = [text.index(one) for one in (part.equal.answers[0], "At equal quality",
                                          "The trainings", "Every run", "The recipes, in full")]  # fmt: skip
    assert places == sorted(places) and "none is ahead" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and "equal-quality" in text
    markdown = export.as_markdown([part])
    assert "## At equal quality" in markdown and "## Trainings" in markdown
    (data,) = json.loads(export.as_json([part]))["reports"]
    assert data["study"] is None and data["quality"]["recipes"][0]["recipe"] == "half"
    rows = list(csv.DictReader(io.StringIO(export.as_csv([part]))))
    assert sum(row["figure"] == "equal quality, at" for row in rows) == 4


def test_a_sheet_has_the_figure(trained: tuple[Store, str], tmp_path: Path) -> None:
    part = sources.quality_part(*trained)
    assert report.part_drawings(part)[0].name == "equal-quality"
    assert report.sheet([part], tmp_path / "sheet.png").stat().st_size > 10_000


# ---- what is refused, and the command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", Tiny)
    races = {"baseline": {"adamw": (ADAMW.recipe, 8, 320), "half": (HALF.recipe, 8, 320)}}
    monkeypatch.setitem(recipes.WORKLOADS, "tiny", types.SimpleNamespace(RACES=races))
    monkeypatch.setattr(racing, "footprint", lambda *_: racing.Footprint(1_000, 2_000))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipes": ("adamw",)}, "equal quality wants 2 recipes or more, the baseline first, not 1"),
        ({"recipes": ("adamw", "hlaf")}, "tiny has no recipe 'hlaf'; did you mean half"),
        ({"recipes": ("adamw", "adamw")}, "adamw at 25 % and adamw at 25 % are the same training"),
        ({"recipes": ("half", "half @ budget=640")}, "are the same training; leave one out"),
        ({"budgets": (0.5, 1.0, 2.0)}, "the baseline's curve wants 4 budgets or more, not 0.5, 1, 2"),
        ({"budgets": (0.5, 0.501, 1.0, 2.0)}, "adamw at 50 % and adamw at 50.1 % are the same training"),
        ({"budgets": (-1.0, 0.5, 1.0, 2.0)}, "--budgets holds -1; a share of a recipe's budget is above 0"),
        ({"budgets": (math.nan, 0.5, 1.0, 2.0)}, "--budgets holds nan; a share"),
        ({"seeds": 1}, "an interval wants 2 seeds or more, not 1"),
        ({"workload": "tinny"}, "'tinny'"),
        ({"recipes": ("adamw", "sgd:lr=1e30")}, "a recipe fails in its first steps: "),
    ],
)
def test_a_mistake_is_told_in_one_line(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"workload": "tiny", "recipes": ("adamw", "half")} | options
    with pytest.raises(ValueError) as found:
        Quality(out=tmp_path, **asked).run()
    assert told in str(found.value) and "\n" not in str(found.value)


@pytest.mark.usefixtures("tiny")
def test_nobody_to_ask_is_a_plan_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert Quality("tiny", out=tmp_path).run() == 2
    shown = capsys.readouterr()
    assert "24 runs (2 recipes, 4 budgets, 3 seeds), 0 of them stored" in shown.out and "at most" in shown.out
    assert "give --yes" in shown.err
    assert not Store(tmp_path).runs() and not Store(tmp_path).qualities()


@pytest.mark.usefixtures("tiny")
def test_yes_trains_it_and_the_report_finds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Quality("tiny", ("adamw", "half"), seeds=2, yes=True, out=tmp_path).run() == 0
    shown = capsys.readouterr().out
    (name,) = Store(tmp_path).qualities()
    assert shown.index("half has ") < shown.index("| recipe") and f"qualities/{name}.json" in shown
    assert (tmp_path / "qualities" / f"{name}.html").stat().st_size > 10_000
    assert Report((name,), format="md", out=tmp_path).run() == 0
    assert "speed-up at equal quality" in capsys.readouterr().out


def test_one_not_trained_yet_says_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.save_quality({"state": "running", "race": None})
    with pytest.raises(ValueError, match=f"quality {name} has no race yet: it is running; run it again"):
        summarise_quality(store, store.quality(name))
