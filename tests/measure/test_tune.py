"""Tuning: what is tried, at which budgets, what is paid, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import ADAMW, SLOW, Tiny

from stretto import methods, recipes, workloads
from stretto.commands.tune import Tune, told
from stretto.core import Recipe
from stretto.measure import samplers, single, tune
from stretto.measure.race import race
from stretto.measure.reading import tunings
from stretto.measure.store import Store
from stretto.methods import SGD, AdamW, LabelSmoothing, Muon, WarmupStableDecay, _spaces
from stretto.recipes import Arm

SGD_ARM = Arm("sgd", Recipe(SGD(lr=0.01), WarmupStableDecay()))
LR = [_spaces.parse("adamw.lr=log:1e-4..0.1")]
SMALL = tune.Effort(trials=4, eta=2, rungs=2, confirm_seeds=2)


def run_tuning(arms: list[Arm], asked: list, store: Store, effort: tune.Effort) -> dict:
    drawn = _spaces.choose([arm.recipe for arm in arms], asked)
    return tune.tune(Tiny(), arms, drawn, store, effort)


def ends(text: str) -> tuple[object, ...]:
    return _spaces.parse(text).ends


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict]:
    store = Store(tmp_path_factory.mktemp("tuned"))
    return store, run_tuning([ADAMW, SGD_ARM], [], store, SMALL)


# ---- spaces


def test_a_space_reads_ranges_choices_and_what_the_method_declares() -> None:
    assert ends("muon.lr=log:0.005..0.08") == (0.005, 0.08)
    assert ends("muon.iterations=linear:3..7") == (3, 7)
    assert ends("muon.coefficients=jordan|polar") == ("jordan", "polar")
    assert ends("label_smoothing.smoothing") == (0.0, 0.3)
    assert str(_spaces.parse("Muon.lr = log:5e-3..0.08")) == "log:0.005..0.08"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("muon.rl=log:1..2", r"muon has no field 'rl'; did you mean lr\?"),
        ("moun.lr=log:1..2", "there is no method 'moun'; did you mean muon"),
        ("muon=log:1..2", "names no field"),
        ("muon.momentum", "declares no range; give one: muon.momentum="),
        ("muon.lr=log:0.1..0.1", r"the range 0.1..0.1 of muon.lr is empty"),
        ("muon.lr=log:0..0.1", "begins at 0; begin above 0"),
        ("muon.lr=0.1", "it should look like log:"),
        ("muon.lr=log:a..b", "lr is 'a'; it takes float"),
        ("muon.iterations=linear:1.5..3", "iterations is 1.5; it takes int"),
        ("ema.half_life=linear:(1,2)..3", "it takes a duration"),
        ("muon.coefficients=jordan|poler", "coefficients is 'poler'"),
    ],
)
def test_a_wrong_space_is_told_in_a_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _spaces.parse(text)


def test_declared_spaces_name_fields_hold_their_defaults_and_are_accepted_by_their_methods() -> None:
    declaring = [method for method in methods.CATALOGUE.values() if method.spaces]
    assert {AdamW, SGD, Muon, LabelSmoothing} <= set(declaring)
    for method in declaring:
        default = method()
        for space in _spaces.choose([Recipe(default)], [])[0]:
            low, high = space.ends
            assert low <= getattr(default, space.field) <= high, space.name


def test_shares_spread_evenly_on_the_scale_and_whole_numbers_stay_whole() -> None:
    log = _spaces.parse("muon.lr=log:0.01..1")
    assert [log.at(share) for share in (0.0, 0.5, 1.0)] == [0.01, 0.1, 1.0]
    whole = _spaces.parse("muon.iterations=linear:3..5")
    assert [whole.at((i + 0.5) / 9) for i in range(9)] == [3, 3, 3, 4, 4, 4, 5, 5, 5]
    choice = _spaces.parse("muon.coefficients=jordan|polar")
    assert [choice.at(share) for share in (0.0, 0.49, 0.5, 0.999)] == ["jordan"] * 2 + ["polar"] * 2


def test_spaces_asked_for_replace_the_declared_ones_where_they_fit() -> None:
    momentum = _spaces.parse("muon.momentum=linear:0.8..0.98")
    own, declared = _spaces.choose([Recipe(Muon()), Recipe(AdamW())], [momentum])
    assert own == (momentum,)
    assert [space.name for space in declared] == ["adamw.lr", "adamw.weight_decay"]


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_more_trials_begin_with_those_of_fewer(sampler: str) -> None:
    asked = [_spaces.parse("adamw.lr"), _spaces.parse("muon.iterations=log:2..9")]
    asked.append(_spaces.parse("muon.coefficients=jordan|polar"))
    drawn = []
    for count in (4, 12):
        draw = samplers.SAMPLERS[sampler](asked)
        drawn.append([])
        for i in range(count):
            drawn[-1].append(draw.ask())
            draw.tell(math.inf if i == 2 else float(i))
    assert drawn[0] == drawn[1][:4]
    assert all(2e-4 <= values["adamw.lr"] <= 2e-2 for values in drawn[1])
    assert all(type(values["muon.iterations"]) is int for values in drawn[1])
    assert len({values["muon.coefficients"] for values in drawn[1]}) == 2


def test_optuna_draws_where_earlier_trials_did_well() -> None:
    draw = samplers.TPE([_spaces.parse("adamw.lr=log:1e-4..1")])
    drawn = []
    for _ in range(60):
        drawn.append(draw.ask()["adamw.lr"])
        draw.tell(abs(math.log(drawn[-1] / 0.01)))
    late = [value for value in drawn[30:] if 0.003 < value < 0.03]
    assert len(late) >= 15  # an even draw would leave 8 of 30 there


def test_a_sampler_that_is_not_installed_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="the sampler optuna is not installed; pip install"):
        samplers.TPE([_spaces.parse("adamw.lr")])


# ---- halving


def test_rungs_end_at_the_full_budget_and_begin_above_a_few_steps() -> None:
    assert tune.Effort(trials=9).budgets(900, batch=8) == [100, 300, 900]
    assert tune.Effort(trials=9).budgets(320, batch=8) == [106, 320]
    assert tune.Effort(trials=9, rungs=3).budgets(320, batch=8) == [35, 106, 320]
    assert tune.Effort(trials=26).budgets(10**6, batch=1)[0] == 10**6 // 9
    with pytest.raises(ValueError, match="first of 3 rungs would have 8 examples, less than a batch of 16"):
        tune.Effort(trials=9, rungs=3).budgets(80, batch=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trials": 1}, "trials is 1; it must be 2 or more"),
        ({"eta": 1}, "eta is 1; it must be 2 or more"),
        ({"rungs": 4}, "rungs is 4; 9 trials, of which one in 3 goes on, fill 1 to 3"),
        ({"sampler": "optima"}, "did you mean optuna"),
    ],
)
def test_an_effort_that_cannot_be_is_told(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune.Effort(**fields)


def test_each_rung_keeps_the_best_and_trains_them_anew_to_the_end_of_its_budget(tuned) -> None:
    """A rung that went on from the shorter one would end on a schedule that was cut in the middle."""
    store, record = tuned
    assert record["rungs"] == [160, 320]
    for entry in record["arms"]:
        first = [trial["metrics"][0][0] for trial in entry["trials"]]
        gone_on = [trial for trial in entry["trials"] if len(trial["metrics"]) == 2]
        assert len(first) == 4 and len(gone_on) == 2
        assert sorted(trial["metrics"][0][0] for trial in gone_on) == sorted(first)[:2]
        assert entry["winner"]["metrics"] == min(trial["metrics"][1] for trial in gone_on)
        for trial in gone_on:
            runs = [store.run(runs[0]) for runs in trial["runs"]]
            assert [run.record["budget"] for run in runs] == [160, 320]
            assert [(run.rows()[0]["step"], run.rows()[-1]["step"]) for run in runs] == [(1, 20), (2, 40)]
            assert {(run.record["state"], run.record["sitting"]) for run in runs} == {("done", None)}
            assert not any(list(run.checkpoints.glob("*")) for run in runs)


def test_the_winner_is_confirmed_on_seeds_that_no_trial_and_no_race_has(tuned) -> None:
    store, record = tuned
    entry = record["arms"][1]
    assert entry["trials"][0]["values"] == {"sgd.lr": 0.01, "sgd.weight_decay": 5e-4}
    assert record["seeds"] == [20_000] and record["fresh_seeds"] == [30_000, 30_001]
    for runs, recipe in zip(entry["confirmation"]["runs"], (entry["winner"], entry)):
        records = [store.run(run).record for run in runs]
        assert [one["seed"] for one in records] == record["fresh_seeds"]
        assert {one["identity"]["recipe_hash"] for one in records} == {recipe["hash"]}
    gain = tune.gain(record, entry["confirmation"]["winner"], entry["confirmation"]["given"])
    assert gain and gain.estimate > 0.02


def test_both_arms_have_equal_trials_and_budgets_and_the_record_says_so(tuned) -> None:
    store, record = tuned
    assert tune.trials(record) == {"adamw": 4, "sgd": 4}
    assert tune.examples(record) == {"adamw": 4 * 160 + 2 * 320, "sgd": 4 * 160 + 2 * 320}
    assert tunings(store, "tiny") == [json.loads(json.dumps(record))]
    assert record["arms"][1]["spaces"] == {"sgd.lr": "log:0.01..1", "sgd.weight_decay": "log:5e-05..0.005"}


def test_nothing_is_paid_twice(tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the same tuning, nor by one of another sampler where it tries the same, nor by a longer one."""
    store, record = tuned
    trained = []
    go_on = single._Training.go_on
    monkeypatch.setattr(single._Training, "go_on", lambda self: (trained.append(self.run.id), go_on(self)))
    again = run_tuning([ADAMW, SGD_ARM], [], store, SMALL)
    assert trained == [] and again["arms"] == record["arms"] and again["id"] == record["id"]
    more = run_tuning([ADAMW], [], store, dataclasses.replace(SMALL, trials=5))
    assert [trial["runs"][0] for trial in more["arms"][0]["trials"][:4]] == [
        trial["runs"][0] for trial in record["arms"][0]["trials"]
    ]
    assert len(trained) <= 2 + 2  # the fifth trial, and perhaps it goes on and wins
    assert len(tunings(store, "tiny")) == 2


def test_a_race_without_a_target_shares_its_runs(tuned) -> None:
    store, record = tuned
    found = store.race(
        race(Tiny(), [ADAMW], store, target=None, seeds=[30_000], control="off", footprints=False)
    )
    assert found["arms"][0]["runs"][0] == record["arms"][0]["confirmation"]["runs"][1][0]


def test_a_trial_that_diverges_loses(tmp_path: Path) -> None:
    asked = [_spaces.parse("sgd.lr=0.1|1e30")]
    effort = tune.Effort(trials=6, eta=2, rungs=1, confirm_seeds=1)
    arm = Arm("sgd", Recipe(SGD(lr=0.01, momentum=0.0, nesterov=False)))
    record = run_tuning([arm], asked, Store(tmp_path), effort)
    (entry,) = record["arms"]
    lost = [trial for trial in entry["trials"] if trial["metrics"] == [[None]]]
    assert lost and all(trial["values"]["sgd.lr"] == 1e30 for trial in lost)
    assert entry["winner"]["values"]["sgd.lr"] == 0.1
    curve = tune.curve(record, entry)
    assert len(curve) == 5 and all(math.isfinite(value) for value in curve)


def test_an_interrupted_tuning_goes_on_to_the_same_record(
    tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = tuned
    store, calls = Store(tmp_path), itertools.count()
    train = single.train

    def interrupted(*args: object, **options: object) -> object:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return train(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(single, "train", interrupted)
        stopped = run_tuning([ADAMW, SGD_ARM], [], store, SMALL)
    assert stopped["state"] == "interrupted" and tune.trials(stopped) == {"adamw": 4, "sgd": 0}
    assert told(stopped)
    ended = run_tuning([ADAMW, SGD_ARM], [], store, SMALL)
    assert ended["state"] == "done" and ended["arms"] == whole["arms"]
    assert tunings(store, "tiny") == [json.loads(json.dumps(ended))]


def test_arms_that_cannot_be_tuned_alike_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    longer = dataclasses.replace(SGD_ARM, budget=640)
    with pytest.raises(ValueError, match="one budget, not adamw: 320, sgd: 640"):
        run_tuning([ADAMW, longer], [], store, SMALL)
    with pytest.raises(ValueError, match=r"no recipe here has muon, .*; known: adamw, warmup_stable_decay"):
        run_tuning([ADAMW], [_spaces.parse("muon.lr")], store, SMALL)
    with pytest.raises(ValueError, match="nothing is declared to tune in warmup_stable_decay"):
        run_tuning([Arm("none", Recipe(WarmupStableDecay()))], [], store, SMALL)
    with pytest.raises(ValueError, match=r"adamw\.lr is given twice"):
        run_tuning([ADAMW], LR * 2, store, SMALL)
    with pytest.raises(ValueError, match="weight_decay is -1"):
        run_tuning([ADAMW], [_spaces.parse("adamw.weight_decay=linear:-1..1")], store, SMALL)
    assert store.runs() == []


# ---- what a record tells


@pytest.mark.parametrize("falls", [True, False])
def test_the_expected_best_equals_the_mean_over_all_draws(falls: bool) -> None:
    values = [0.3, 1.7, 1.7, -2.0, 0.9]
    best = min if falls else max
    for k in (1, 2, 3, 5):
        draws = list(itertools.product(values, repeat=k))
        brute = math.fsum(best(draw) for draw in draws) / len(draws)
        assert tune.expected_best(values, k, falls) == pytest.approx(brute, rel=1e-12)
    with pytest.raises(ValueError, match="best of 0 among 5"):
        tune.expected_best(values, 0)


def entry_of(tried: list[object], best: object) -> dict:
    return {
        "arms": [
            {"name": "one", "trials": [{"values": {"muon.x": value}} for value in tried],
             "winner": {"values": {"muon.x": best}}}
        ]
    }  # fmt: skip


def test_a_winner_beyond_which_nothing_was_tried_is_at_the_edge() -> None:
    assert tune.edges(entry_of([0.1, 0.3, 0.2], 0.2)) == []
    (largest,) = tune.edges(entry_of([0.1, 0.3, 0.2], 0.3))
    assert (
        largest
        == "one: its best muon.x, 0.3, is the largest tried (0.1 to 0.3), and a better one may lie beyond."
    )
    (smallest,) = tune.edges(entry_of([4, 8, 16], 4))
    assert "4, is the smallest tried (4 to 16)" in smallest
    assert tune.edges(entry_of([0.1, 0.1], 0.1)) == []
    assert tune.edges(entry_of(["jordan", "polar"], "polar")) == []
    assert tune.edges({"arms": [{"name": "one", "trials": [], "winner": None}]}) == []


def test_a_gain_is_positive_where_the_metric_improves_and_none_where_a_run_diverged() -> None:
    falls, rises = {"falls": True}, {"falls": False}
    assert tune.gain(falls, [1.0, 2.0], [2.0, 3.1]).estimate == pytest.approx(1.05)
    assert tune.gain(rises, [1.0, 2.0], [2.0, 3.1]).estimate == pytest.approx(-1.05)
    assert tune.gain(falls, [1.0, None], [2.0, 3.0]) is None
    assert tune.gain(falls, [1.0], [2.0]) is None


# ---- the command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"adamw": (ADAMW.recipe, None, None), "slow": (SLOW.recipe, None, None)}
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", Tiny)
    monkeypatch.setitem(recipes.WORKLOADS, "tiny", SimpleNamespace(RACES={"baseline": arms}))


def test_the_command_prints_winner_confirmation_trials_and_edges(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Tune(
        "tiny",
        "adamw",
        ("adamw.lr=log:1e-4..1e-3",),
        "slow",
        trials=3,
        rungs=1,
        confirm_seeds=2,
        out=tmp_path,
    )
    assert command.run() == 0
    out = capsys.readouterr().out
    assert "adamw: 3 trials at budgets of 320 examples, 960 examples in all" in out
    assert "nothing tried was better than the recipe as it stands" in out
    assert "note: adamw: its best adamw.lr, 0.02, is the largest tried" in out
    assert "tuning gained" in out and "adamw gains" in out and "over slow, both tuned" in out
    assert f"record: {tmp_path / 'tunings'}" in out


def test_the_command_refuses_equal_recipes(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are both 'adamw'"):
        Tune("tiny", "adamw", against="adamw", out=tmp_path).run()
