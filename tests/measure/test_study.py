from __future__ import annotations

import io
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import ADAMW, SLOW, Tiny

from stretto import recipes, workloads
from stretto.commands.study import Study
from stretto.core import Recipe
from stretto.measure import designs, study_plan
from stretto.measure import race as racing
from stretto.measure.race import Standing
from stretto.measure.store import Store
from stretto.measure.study import run
from stretto.measure.study_plan import StudyPlan, compose, describe, plan_study, replaced, resolvable
from stretto.measure.study_summary import allowed, design_of, study_table, summarise_study
from stretto.methods import EMA, SGD, AdamW, Lion, Muon, WarmupStableDecay, parse
from stretto.recipes import Arm


def planned(store: Store, methods: str = "ema, sgd:lr=0.05", seeds: int = 2, **options: Any) -> StudyPlan:
    given: dict[str, Any] = {"design": designs.factorial, "reference": ADAMW} | options
    chosen = [parse(short).methods[0] for short in methods.split(", ")]
    return plan_study(
        Tiny(), "baseline", given.pop("reference"), chosen, given.pop("design"), range(seeds), store, **given
    )


def studied(store: Store, **options: Any) -> dict[str, Any]:
    return run(planned(store, **options), store, footprints=False)


# ---- compositions


def test_a_method_wins_the_place_of_the_references_own() -> None:
    reference = Recipe(AdamW(lr=0.02), WarmupStableDecay())
    assert compose(reference, []) == reference
    assert compose(reference, [Muon(), EMA()]) == Recipe(Muon(), EMA(), WarmupStableDecay())
    assert compose(reference, [AdamW(lr=1.0)]) == Recipe(AdamW(lr=1.0), WarmupStableDecay())
    assert replaced(reference, Muon()) == ["adamw:lr=0.02"] and replaced(reference, EMA()) == []


def test_two_chosen_methods_that_want_one_place_are_no_composition() -> None:
    with pytest.raises(ValueError, match="Muon and Lion both want"):
        compose(Recipe(AdamW()), [Muon(), Lion()])


def test_a_composition_keeps_batch_and_budget_of_the_reference(tmp_path: Path) -> None:
    plan = planned(Store(tmp_path), reference=Arm("short", ADAMW.recipe, batch=4, budget=160))
    arm = plan.arm(("ema", "sgd"))
    assert (arm.name, arm.batch, arm.budget) == ("ema + sgd", 4, 160)


# ---- plans


def dry(design: designs.Design, seeds: int, spread: float = 0.07) -> dict[str, study_plan.Resolved]:
    plan = StudyPlan(Tiny(), "baseline", ADAMW, (), tuple(range(seeds)), design, (), spread=spread)
    return {one.question: one for one in resolvable(plan)}


def test_precision_is_what_the_literature_promises() -> None:
    """16 runs of a 2^(5−1) at a run sd of 0.07: average effects to 0.035, interactions to 0.07."""
    found = dry(designs.fraction("abcde", resolution=5), seeds=1)
    assert found["on average"].sd == pytest.approx(0.035)
    assert found["interactions"].sd == pytest.approx(0.07)


def test_one_at_a_time_is_as_sharp_as_two_arms_and_says_nothing_of_company() -> None:
    """A design of two arms in disguise: sd √(2 / n), and the smallest effect of `power`."""
    found = dry(designs.alone("abcde"), seeds=3)
    assert list(found) == ["alone"] and found["alone"].sd == pytest.approx(0.07 * (2 / 3) ** 0.5)
    ten = dry(designs.alone("ab"), seeds=10, spread=0.07)["alone"]
    assert ten.smallest == pytest.approx(0.10, abs=0.015)  # 80 % power for 10 % at 10 seeds


def test_four_times_the_seeds_halve_the_sd() -> None:
    few, many = (dry(designs.factorial("abc"), seeds)["on average"] for seeds in (2, 8))
    assert many.sd == pytest.approx(few.sd / 2) and many.smallest < few.smallest


def test_a_plan_says_what_replaces_what_what_is_left_out_and_what_is_mixed_then(tmp_path: Path) -> None:
    plan = planned(Store(tmp_path), methods="muon, lion, ema")
    text = "\n".join(describe(plan))
    assert "muon in place of adamw:lr=0.02" in text
    assert plan.conflicts == (("muon", "lion"),)
    assert len(plan.compositions) == 6 and "left out, as they cannot run: " in text
    assert "interactions: 2 of 3" in text and "is mixed with" in text
    assert "12 runs (6 compositions, 2 seeds), 0 of them stored already, and 2 of the control" in text
    assert plan.hours_left > 0


def test_what_fails_at_its_first_step_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """`blur_pool` finds nothing to change in an MLP: a study that would stop in the middle."""
    with pytest.raises(ValueError, match="factorial tells nothing of blur_pool with what can run: BlurPool "):
        planned(Store(tmp_path), methods="ema, blur_pool")


def test_the_reference_is_raced_where_the_design_lacks_it(tmp_path: Path) -> None:
    plan = planned(Store(tmp_path), design=designs.leave_one_out)
    assert plan.compositions[0] == () and plan.design.has_baseline
    assert {one.question for one in resolvable(plan)} >= {"alone", "in company"}


def test_a_budget_too_small_names_hours_and_the_nearest_smaller_design(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an hour a run: 8 compositions on 2 seeds and the control are 18 h, a screen's 4 are 10."""
    monkeypatch.setattr(study_plan, "_probe", lambda _, chosen: dict.fromkeys(chosen, 1.0))
    monkeypatch.setattr(study_plan, "_evaluating", lambda *_: 0.0)
    store, methods = Store(tmp_path), "ema, lookahead, gradient_clipping"
    assert planned(store, methods=methods, budget_hours=18.0).hours_left == 18.0
    too_much = "factorial is 16 runs, 18 h, over the budget of 12 h"
    with pytest.raises(
        ValueError, match=f"^{too_much}; the nearest smaller is Plackett-Burman of 4, 8 runs, 10 h$"
    ):
        planned(store, methods=methods, budget_hours=12.0)


def test_what_is_stored_costs_only_the_measuring_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 compositions of which 2 seeds are stored and one is not: a run and a probe each, and a control of 3."""
    monkeypatch.setattr(study_plan, "_probe", lambda _, chosen: dict.fromkeys(chosen, 1.0))
    monkeypatch.setattr(study_plan, "_hours_of", lambda _: 1.0)
    monkeypatch.setattr(study_plan, "_evaluating", lambda *_: 0.5)
    store = Store(tmp_path)
    studied(store)
    assert planned(store, seeds=3).hours_left == 1.5 * (4 * 2 + 3)
    assert planned(store).hours_left == 0.0


def test_the_spread_comes_from_stored_runs_of_the_reference(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert planned(store).spread_from == 0
    studied(store, seeds=4, design=designs.alone)
    assert planned(store).spread_from in (0, 4)  # 0 where all of them crossed at the same step


# ---- running


def test_a_study_extended_by_a_seed_and_a_method_trains_only_what_is_new(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = studied(store)
    runs = {run.id for run in store.runs()}
    assert len(runs) == (4 + 1) * 2
    plan = planned(store, seeds=3)
    assert plan.runs == 12 and plan.missing == 4
    second = run(plan, store, footprints=False)
    assert second["id"] != first["id"]
    assert len(store.runs()) == len(runs) + 4 + 1
    third = planned(store, methods="ema, sgd:lr=0.05, gradient_clipping:norm=0.3", seeds=3)
    assert third.missing == 12


def test_the_same_study_again_trains_nothing_and_gives_the_same_table(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = studied(store)
    again = studied(store)
    assert store.studies() == [first["id"]] and again["created"] == first["created"]
    assert store.race(again["race"])["order"] == []
    tables = {study_table(summarise_study(store, study)) for study in (first, again)}
    assert len(tables) == 1


def test_an_interrupted_study_says_so_and_goes_on_under_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    seen: list[Sequence[Standing]] = []

    def interrupt(standings: Sequence[Standing]) -> None:
        seen.append(standings)
        if len(seen) == 30:
            raise KeyboardInterrupt

    cut = run(planned(store), store, footprints=False, watch=interrupt)
    assert cut["state"] == "interrupted"
    whole = studied(store)
    assert whole["state"] == "done" and store.studies() == [cut["id"]]


def test_a_study_is_stored_as_what_it_asks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    study = studied(store, methods="muon:lr=0.03, ema, sgd:lr=0.05")
    assert study["methods"] == ["muon:lr=0.03", "ema", "sgd:lr=0.05"]
    assert study["reference"] == {
        "name": "adamw", "methods": ADAMW.recipe.to_json()["methods"], "batch": 8, "budget": 320,
    }  # fmt: skip
    assert study["arms"][0] == "adamw" and "muon + ema" in study["arms"]
    design, able = design_of(study), allowed(study)
    assert len(design.rows) == 6 == len(study["arms"]) and design.methods == ("muon", "ema", "sgd")
    assert able(("muon", "ema")) and not able(("muon", "sgd")) and not able(("muon", "ema", "sgd"))


def test_an_effect_alone_is_the_ratio_of_steps_in_a_full_factorial_without_noise(tmp_path: Path) -> None:
    """Columns that were mixed up between the design and the race."""
    store = Store(tmp_path)
    found = summarise_study(store, studied(store), "steps")
    arms = {arm.name: arm.mean("steps") for arm in found.race.arms}
    told = {one.method: one for one in found.answers}
    for name in ("ema", "sgd"):
        assert told[name].measured_alone.estimate == pytest.approx(arms["adamw"] / arms[name])
    fitted = -found.interactions["ema", "sgd"].estimate
    measured = arms["ema"] * arms["sgd"] / (arms["adamw"] * arms["ema + sgd"])
    assert 2.718281828**fitted == pytest.approx(measured)
    assert found.sentences[0].startswith(("The best composition is", "None of "))


def test_a_study_without_a_hit_tells_nothing_and_does_not_fail(tmp_path: Path) -> None:
    store = Store(tmp_path)
    study = studied(store, methods="ema, gradient_clipping", reference=SLOW)
    found = summarise_study(store, study)
    assert found.fit is None and found.best is None
    assert found.sentences == ["No run reached the target, so no effect can be told."]


# ---- what is refused, and the command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", Tiny)
    races = {"baseline": {"adamw": (ADAMW.recipe, 8, 320)}}
    monkeypatch.setitem(recipes.WORKLOADS, "tiny", types.SimpleNamespace(RACES=races))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methods": ("ema",)}, "a study wants 2 methods or more, not 1"),
        ({"methods": ("ema", "ema:half_life=0.1")}, "ema is named twice"),
        ({"methods": ("ema", "lookahed")}, "there is no method 'lookahed'; did you mean lookahead"),
        ({"methods": ("ema", "adamw:lr=0.02")}, "adamw:lr=0.02 is in the reference adamw already"),
        ({"seeds": 0}, "--seeds is 0; it must be 1 or more"),
        ({"workers": 0}, "--workers is 0; it must be 1 or more"),
        ({"budget_hours": -1.0}, "--budget-hours is -1; it must be above 0"),
        ({"design": "alone", "seeds": 1}, "alone with 1 seed leaves no spread to judge effects by"),
        ({"design": "fraction"}, "no fraction of 2 methods has resolution 5"),
        ({"design": "screen", "resolution": 4}, "--resolution belongs to --design fraction, not to screen"),
        ({"target": "basline"}, "tiny has no target 'basline'; did you mean baseline"),
        ({"base": "hot"}, "tiny has no recipe 'hot'"),
        ({"methods": ("muon", "lion"), "design": "leave-one-out", "seeds": 1}, "leave-one-out"),
    ],
)
def test_a_mistake_is_told_in_one_line(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ("ema", "sgd:lr=0.05"), "design": "factorial"} | options
    with pytest.raises(ValueError) as found:
        Study("tiny", out=tmp_path, **asked).run()
    assert told in str(found.value) and "\n" not in str(found.value)


@pytest.mark.usefixtures("tiny")
def test_nobody_to_ask_is_a_plan_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Study("tiny", ("ema", "sgd:lr=0.05"), "factorial", out=tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command.run() == 2
    shown = capsys.readouterr()
    assert "8 runs (4 compositions, 2 seeds)" in shown.out and "give --yes" in shown.err
    assert not Store(tmp_path).runs() and not Store(tmp_path).studies()


@pytest.mark.usefixtures("tiny")
def test_yes_runs_it_and_gives_the_answer_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "footprint", lambda *_: racing.Footprint(1_000, 2_000))
    assert Study("tiny", ("ema", "sgd:lr=0.05"), "factorial", yes=True, out=tmp_path).run() == 0
    shown = capsys.readouterr().out
    assert shown.index("ema: ") < shown.index("| method") and "study: " in shown


def test_a_study_of_another_schema_or_unreadable_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.save_study({"workload": "tiny"})
    path = tmp_path / "studies" / f"{name}.json"
    path.write_text(json.dumps({"schema": 9}))
    with pytest.raises(ValueError, match=rf"study {name} in .* has schema 9, this version reads 1"):
        store.study(name)
    path.write_text("{")
    with pytest.raises(ValueError, match="is unreadable"):
        store.study(name)
    with pytest.raises(ValueError, match="no study nothing in"):
        store.study("nothing")
    assert studied(store)["state"] == "done"


def test_a_study_not_raced_yet_says_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.save_study({"state": "running", "race": None})
    with pytest.raises(
        ValueError, match=f"study {name} has no race yet: it is running; run it again to go on"
    ):
        summarise_study(store, store.study(name))


def test_seeds_of_sgd_and_the_reference_are_shared(tmp_path: Path) -> None:
    """A study of arms on seeds of their own: pairs and blocks would be lost."""
    store = Store(tmp_path)
    study = studied(store)
    race = store.race(study["race"])
    seeds = {arm["name"]: [store.run(one).record["seed"] for one in arm["runs"]] for arm in race["arms"]}
    assert set(map(tuple, seeds.values())) == {(0, 1)}
    assert SGD.name in seeds
