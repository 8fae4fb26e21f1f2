from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import ADAMW, BROKEN, SLOW, Tiny

from stretto.core import Recipe
from stretto.measure import race as racing
from stretto.measure.outcomes import smoothed
from stretto.measure.race import Standing, race
from stretto.measure.store import Store
from stretto.measure.summary import plain, summarise
from stretto.methods import AdamW
from stretto.recipes import Arm


def run_race(store: Store, arms: Sequence[Arm], seeds: Sequence[int] = (0, 1), **options: object) -> dict:
    return store.race(
        race(Tiny(), arms, store, **{"target": "baseline", "seeds": seeds, "footprints": False} | options)
    )


def outcomes(store: Store, found: dict) -> dict[str, list[tuple[str, object]]]:
    return {
        arm["name"]: [
            (store.run(run).record["state"], store.run(run).record["crossing"]) for run in arm["runs"]
        ]
        for arm in found["arms"]
    }


def test_the_control_on_equal_seeds_is_equal_in_everything_but_the_clock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = run_race(store, [ADAMW])
    one, control = found["arms"]
    assert control["name"] == found["control"] == "adamw (control)"
    for a, b in zip(one["runs"], control["runs"]):
        assert a != b
        first, second = store.run(a).rows(), store.run(b).rows()
        assert [row["loss"] for row in first] == [row["loss"] for row in second]
        assert {run["state"] for run in (store.run(a).record, store.run(b).record)} == {"target"}


def test_a_fresh_control_has_other_seeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = run_race(store, [ADAMW], control="fresh")
    seeds = [[store.run(run).record["seed"] for run in arm["runs"]] for arm in found["arms"]]
    assert seeds == [[0, 1], [10_000, 10_001]]


def test_the_median_of_evaluations_may_be_what_crosses_and_is_another_run(tmp_path: Path) -> None:
    store, workload = Store(tmp_path), Tiny()
    plain_race = run_race(store, [ADAMW], seeds=(0,), control="off")
    workload.smooth, workload.eval_every = 3, 0.02
    name = race(workload, [ADAMW], store, target="baseline", seeds=(0,), control="off", footprints=False)
    found = store.race(name)
    (run,) = (store.run(one) for one in found["arms"][0]["runs"])
    assert run.id not in plain_race["arms"][0]["runs"]
    assert [row["step"] for row in run.rows()][:3] == [1, 2, 3]
    rows = smoothed(run.rows(), "loss", 3)
    first = next(row["step"] for row in rows if row["loss"] is not None and row["loss"] <= found["target"])
    assert run.record["crossing"]["at"] == first
    assert summarise(store, found).goal == "loss 0.13 (median of 3 evaluations)"


def test_a_second_call_trains_nothing_and_keeps_the_sitting(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = run_race(store, [ADAMW])
    second = run_race(store, [ADAMW])
    assert second["order"] == []
    assert second["sitting"] == first["sitting"]
    assert second["arms"] == first["arms"]


def test_a_stored_arm_beside_a_new_one_is_measured_again_and_not_trained_again(tmp_path: Path) -> None:
    """Seconds of two sittings do not compare: stored steps count, at a cost measured beside the new arm."""
    store = Store(tmp_path)
    first = run_race(store, [ADAMW], control="off")
    other = Arm("other", ADAMW.recipe.replace(AdamW, lr=0.01))
    fields: list[set[int]] = []
    second = run_race(
        store,
        [ADAMW, other],
        control="off",
        watch=lambda standings: fields.append({standing.seed for standing in standings}),
    )
    stored, new = second["arms"]
    assert stored["runs"] == first["arms"][0]["runs"]
    assert {time["source"] for time in stored["times"].values()} == {"remeasured"}
    assert {time["source"] for time in new["times"].values()} == {"sitting"}
    for run, time_again in stored["times"].items():
        before = first["arms"][0]["times"][run]
        assert time_again["wall"] != before["wall"]
        assert time_again["wall"] == pytest.approx(before["wall"], rel=9.0)
    assert second["order"].count(0) == 2 * racing.PROBE_BLOCKS
    assert {seed for seeds in fields for seed in seeds} == {
        0,
        1,
    }  # its cost for a seed beside that seed's new run:
    assert all(len(seeds) == 1 for seeds in fields)  # later the machine may be slower
    steps = {
        s
        for arm in (first["arms"][0], stored)
        for run in arm["runs"]
        for s in [store.run(run).record["crossing"]["at"]]
    }
    assert len(steps) <= 2


def test_blocks_of_contestants_alternate_in_changing_order(tmp_path: Path) -> None:
    found = run_race(Store(tmp_path), [ADAMW, SLOW], seeds=[0], control="off")
    order = found["order"]
    rounds = [tuple(order[i : i + 2]) for i in range(0, 2 * order.count(0), 2)]
    assert {frozenset(one) for one in rounds} == {frozenset((0, 1))}
    assert len(set(rounds)) == 2 or len(rounds) < 6


def test_a_target_never_reached_is_no_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = run_race(store, [ADAMW, SLOW], control="off")
    assert outcomes(store, found)["slow"] == [("done", None)] * 2
    summary = summarise(store, found)
    slow = summary.arms[1]
    assert slow.mean("wall") is None and slow.wall is not None and slow.wall.estimate is None
    assert "not reached" in plain(summary)


def test_an_arm_that_diverges_fails_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = run_race(store, [ADAMW, BROKEN], control="off")
    states = {name: {state for state, _ in runs} for name, runs in outcomes(store, found).items()}
    assert states == {"adamw": {"target"}, "broken": {"failed"}}
    assert "steps in a row" in store.run(found["arms"][1]["runs"][0]).record["error"]


def test_an_interrupted_race_goes_on_to_the_same_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store(tmp_path / "whole")
    expected = run_race(whole, [ADAMW, SLOW], control="off")
    monkeypatch.setattr(racing, "CHECKPOINT_SECONDS", 0.0)
    store, seen = Store(tmp_path / "cut"), []

    def interrupt(standings: Sequence[Standing]) -> None:
        seen.append(standings)
        if len(seen) == 7:
            raise KeyboardInterrupt

    cut = run_race(store, [ADAMW, SLOW], control="off", watch=interrupt)
    assert cut["interrupted"] and not expected["interrupted"]
    assert {run.record["state"] for run in store.runs()} == {"interrupted"}
    found = run_race(store, [ADAMW, SLOW], control="off")
    assert outcomes(store, found) == outcomes(whole, expected)
    for a, b in zip(found["arms"], expected["arms"]):
        for x, y in zip(a["runs"], b["runs"]):
            assert [r["loss"] for r in store.run(x).rows()] == [r["loss"] for r in whole.run(y).rows()]
    resumed = found["arms"][0]["times"][found["arms"][0]["runs"][0]]
    assert resumed["source"] == "remeasured"  # its own seconds are of two sittings


def test_another_target_or_another_batch_is_another_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run_race(store, [ADAMW], seeds=[0], control="off")
    run_race(store, [ADAMW], seeds=[0], control="off", target=None)
    run_race(store, [Arm("adamw", ADAMW.recipe, batch=4)], seeds=[0], control="off")
    assert len(store.runs()) == 3


def test_a_run_without_target_spends_its_budget(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = run_race(store, [Arm("a", Recipe(AdamW()))], seeds=[3], control="off", target=None)
    run = store.run(found["arms"][0]["runs"][0])
    assert run.record["state"] == "done" and run.rows()[-1]["fraction"] == 1.0


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from tiny import ADAMW, SLOW, Tiny
from stretto.measure import race
from stretto.measure.store import Store
race.CHECKPOINT_SECONDS = 0.0
Tiny.budget = 8 * 4000
judge = race.Contestant._judge
def announce(self):
    print("evaluation", flush=True)
    judge(self)
race.Contestant._judge = announce
race.race(Tiny(), [ADAMW, SLOW], Store(sys.argv[1]), target="never", seeds=[0, 1], control="off", footprints=False)
"""


@pytest.mark.slow
def test_kill_9_during_a_race_loses_no_completed_evaluation(tmp_path: Path) -> None:
    """Every evaluation that was announced is readable, and the race called again goes on from there."""
    here = str(Path(__file__).parent)
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), here], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        announced = 0
        for _ in process.stdout:
            announced += 1
            if announced >= 5 + 3 * attempt:
                break
        time.sleep(0.01 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        stored = [row for run in Store(tmp_path).runs() for row in run.rows()]
        assert len(stored) >= announced
    before = {run.id: [row["loss"] for row in run.rows()] for run in Store(tmp_path).runs()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for run in Store(tmp_path).runs():
        assert run.record["state"] == "done"
        losses = [row["loss"] for row in run.rows()]
        assert len(losses) == 20
        assert losses[: len(before.get(run.id, []))] == before.get(run.id, [])
