"""Recommendations: the recipe that a study speaks for, in words and as a file, and its race on fresh seeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import Tiny

from stretto import recipes, workloads
from stretto.commands.recommend import Recommend, arms
from stretto.core import Recipe
from stretto.measure import race as racing
from stretto.measure import recommend
from stretto.measure.composition import Best
from stretto.measure.outcomes import Interval
from stretto.measure.store import Store
from stretto.methods import EMA, AdamW, WarmupStableDecay
from stretto.recipes import Arm

BASE = Arm("base", Recipe(AdamW(lr=0.005), WarmupStableDecay()))
QUICK, SLUGGISH = AdamW(lr=0.02), EMA(half_life=0.5)
ARMS = [
    BASE,
    Arm("adamw", Recipe(QUICK, WarmupStableDecay())),
    Arm("ema", BASE.recipe + SLUGGISH),
    Arm("adamw + ema", Recipe(QUICK, WarmupStableDecay(), SLUGGISH)),
]


class Quick(Tiny):
    name = "quick"
    eval_every = 0.025
    targets = {"baseline": 0.3}


def a_study(**fields: object) -> dict:
    """A factorial of two methods: a faster rate in the place of the reference's, and an average that lags."""
    return {
        "id": "made", "state": "done", "workload": "quick", "fingerprint": "tiny-data", "target_name": "baseline",
        "reference": {"name": "base", **BASE.recipe.to_json(), "batch": 8, "budget": 320},
        "methods": ["adamw:lr=0.02", "ema:half_life=0.5"],
        "design": {"name": "factorial", "rows": [[0, 0], [1, 0], [0, 1], [1, 1]],
                   "words": [], "dropped": [], "conflicts": []},
        "arms": [arm.name for arm in ARMS], "seeds": [0, 1, 2], "executor": "interleaved", "race": None, **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("study"))
    race = racing.race(Quick(), ARMS, store, target="baseline", seeds=[0, 1, 2], footprints=False)
    store.save_study(a_study(race=race))
    return store.root


def confirm(store: Store, study: str, count: int) -> dict | None:
    found = recommend.recommend(store, study)
    return recommend.confirm(store, Quick(), found, *arms(found), count, footprints=False)


def test_the_recommended_recipe_holds_what_helps_and_nothing_that_slows(raced: Path) -> None:
    found = recommend.recommend(Store(raced), "made")
    assert found.best and found.best.composition == ("adamw",)
    assert arms(found) == (Arm("base", BASE.recipe, 8, 320), Arm("adamw", ARMS[1].recipe, 8, 320))
    told = recommend.sentences(found)
    assert told[0].startswith("The best composition is adamw: ")
    assert told[-1] == "Not worth adding: ema."


def test_the_sentences_name_shares_costs_and_what_to_drop() -> None:
    best = Best(
        ("a", "b"),
        Interval(2.0, 1.8, 2.2),
        0.9,
        {"a": Interval(1.9, 1.7, 2.1), "b": Interval(1.05, 0.95, 1.15)},
        {"a": Interval(1.8, 1.6, 2.0), "b": Interval(1.01, 0.9, 1.1)},
        ("b",),
    )
    summary = SimpleNamespace(
        sentences=["Use a + b."], methods=("a", "b", "c"), study={"state": "interrupted"}, best=best
    )
    assert recommend.sentences(summary) == [
        "Use a + b.",
        "The study is interrupted; this is what its runs so far tell.",
        "Its members' shares, which multiply to the whole: a 1.90x [1.70, 2.1], b 1.05x [0.95, 1.15].",
        "What leaving one out costs: a 1.80x [1.60, 2.0], b 1.01x [0.90, 1.10].",
        "To drop where it is simpler without: b; no cost of that is known.",
        "Not worth adding: c.",
    ]


def test_the_file_is_the_recipe_that_a_race_reads(raced: Path, tmp_path: Path) -> None:
    _, arm = arms(recommend.recommend(Store(raced), "made"))
    path = tmp_path / "new" / "best.json"
    recommend.write_file(arm, path)
    assert recipes.arm(str(path), "digits", "baseline") == arm
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*; choose another with --to"):
        recommend.write_file(arm, tmp_path / "file" / "best.json")


def test_it_is_confirmed_on_seeds_that_the_study_did_not_use(raced: Path) -> None:
    store = Store(raced)
    confirmation = confirm(store, "made", 3)
    assert confirmation and confirmation["seeds"] == [3, 4, 5]
    race = store.race(confirmation["race"])
    assert [arm["name"] for arm in race["arms"]] == ["base", "base (control)", "adamw"]
    assert {store.run(run).record["seed"] for arm in race["arms"] for run in arm["runs"]} == {3, 4, 5}
    assert confirmation["speed_up"]["estimate"] > 1
    word = recommend.WORDS[confirmation["speed_up"]["verdict"]]  # the clock of a busy machine may hide it
    assert confirmation["sentence"].startswith(f"{word}: adamw reached loss 0.3 in ")
    study = store.study("made")
    assert study["confirmation"] == json.loads(json.dumps(confirmation))
    assert {key: study[key] for key in a_study()} == a_study(race=study["race"])
    told = recommend.recommend(store, "made").sentences
    assert f"On fresh seeds: {confirmation['sentence']}" in told
    store.save_study({**study, "confirmation": {**study["confirmation"], "composition": ["ema"]}})
    told = recommend.recommend(store, "made").sentences
    assert f"Another one, on fresh seeds: {confirmation['sentence']}" in told
    store.save_study(study)


def test_an_interrupted_confirmation_is_not_stored(raced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(raced)
    study = store.study("made")
    study.pop("confirmation", None)
    store.save_study(study)

    def stop(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(racing.Contestant, "block", stop)
    assert confirm(store, "made", 5) is None
    assert store.study("made") == study


def test_other_data_is_refused_before_it_trains(raced: Path) -> None:
    store = Store(raced)
    store.save_study(a_study(id="other", fingerprint="older", race=store.study("made")["race"]))
    with pytest.raises(ValueError, match=r"run on other data .* is older, not tiny-data"):
        confirm(store, "other", 2)


def test_a_study_that_does_not_tell_is_told_in_a_line(raced: Path) -> None:
    store = Store(raced)
    with pytest.raises(ValueError, match=r"no study nosuch in .*; it has made"):
        recommend.recommend(store, "nosuch")
    store.save_study(a_study(id="unraced", state="planned"))
    with pytest.raises(ValueError, match="study unraced has no race yet"):
        recommend.recommend(store, "unraced")
    race = store.race(store.study("made")["race"])
    for arm in race["arms"]:
        arm["runs"] = []
    store.save_study(a_study(id="empty", race=store.save_race({**race, "id": "empty"})))
    with pytest.raises(ValueError, match="study empty has too few runs to recommend from: No run reached"):
        recommend.recommend(store, "empty")


def test_the_command_writes_the_recipe_and_stores_the_verdict(
    raced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "quick", Quick)
    monkeypatch.setattr(racing, "footprint", lambda *_: racing.UNKNOWN)
    assert Recommend("made", confirm_seeds=2, to=tmp_path / "best.json", out=raced).run() == 0
    out = capsys.readouterr().out
    assert "The best composition is adamw" in out and f"recipe: {tmp_path / 'best.json'}" in out
    assert "The study expected " in out
    assert Store(raced).study("made")["confirmation"]["seeds"] == [3, 4]
    assert Recommend("made", confirm_seeds=0, out=raced).run() == 0
    assert "not confirmed: --confirm-seeds is 0" in capsys.readouterr().out
    assert (raced / "recipes" / "made.json").exists()
    with pytest.raises(ValueError, match="--confirm-seeds is -1"):
        Recommend("made", confirm_seeds=-1, out=raced).run()
    with pytest.raises(ValueError, match="is no runs folder"):
        Recommend("made", out=tmp_path / "none").run()


def test_where_nothing_is_worth_adding_the_recipe_is_the_reference(
    raced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(raced)
    turned = a_study(id="turned", race=store.study("made")["race"], methods=["adamw:lr=0.005", "ema"])
    turned["arms"] = ["adamw", "base", "adamw + ema", "ema"]
    turned["reference"] |= {"name": "quick", **ARMS[1].recipe.to_json()}
    store.save_study(turned)
    assert Recommend("turned", out=raced).run() == 0
    out = capsys.readouterr().out
    assert "None of adamw, ema is worth adding to quick" in out and "there is nothing to confirm" in out
    assert recipes.arm(str(raced / "recipes" / "turned.json"), "digits", "baseline").recipe == ARMS[1].recipe
