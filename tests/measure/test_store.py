"""Runs on disk: named by content, readable at any moment, refused where they cannot be right."""

import json
import math
import random
import signal
import subprocess
import sys
import time

import pytest

from stretto.measure.store import SCHEMA, Run, Store, run_id

IDENTITY = {"workload": "digits", "recipe_hash": "abc123", "seed": 0, "budget": 1000}


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "runs")


def test_the_id_is_a_hash_of_content_whatever_the_order():
    assert run_id(IDENTITY) == run_id(dict(reversed(IDENTITY.items()))) == "6ab7162d109f"
    assert run_id(IDENTITY) != run_id({**IDENTITY, "seed": 1})


def test_a_run_is_found_again_by_its_identity_and_by_its_id(store):
    run = store.create(IDENTITY, {"state": "running", "seed": 0})
    assert run.path == store.root / "digits" / "abc123" / run_id(IDENTITY)
    run.update(state="target", crossing={"before": 10, "at": 20})
    for found in (store.find(IDENTITY), store.run(run.id), Store(store.root, write=False).runs("digits")[0]):
        assert found.record == run.record
        assert found.record["state"] == "target" and found.record["schema"] == SCHEMA
    assert store.find({**IDENTITY, "seed": 1}) is None
    assert store.runs("other") == []
    with pytest.raises(ValueError, match="no readable run beef"):
        store.run("beef")


def test_runs_are_sorted_and_torn_records_left_out(store):
    runs = [store.create({**IDENTITY, "seed": seed}, {"state": "done"}) for seed in range(4)]
    (runs[0].path / "run.json").write_text('{"state": "do')
    (runs[1].path / "run.json").unlink()
    assert [run.id for run in store.runs()] == sorted(run.id for run in runs[2:])


def test_a_finished_run_is_never_replaced_and_an_unfinished_one_starts_afresh(store):
    run = store.create(IDENTITY, {"state": "running"})
    run.append({"step": 5, "loss": 2.0})
    run = store.create(IDENTITY, {"state": "running"})
    assert run.rows() == []
    run.update(state="done")
    with pytest.raises(ValueError, match="stored already, as done"):
        store.create(IDENTITY, {"state": "running"})


def test_rows_come_by_step_and_a_repeated_evaluation_replaces_the_first(store):
    run = store.create(IDENTITY, {})
    for step, loss in ((10, 3.0), (20, 2.5), (15, 2.7), (20, 2.4)):
        run.append({"step": step, "loss": loss})
    assert [(row["step"], row["loss"]) for row in run.rows()] == [(10, 3.0), (15, 2.7), (20, 2.4)]


def test_a_line_torn_by_a_kill_does_not_swallow_the_next(store):
    run = store.create(IDENTITY, {})
    run.append({"step": 1, "loss": 3.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in run.rows()] == [1]
    run.append({"step": 3, "loss": 2.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('7\n{"loss": 1}\n\xff\n')  # a number, a row without a step, no JSON at all
    assert [row["step"] for row in run.rows()] == [1, 3]


def test_not_a_number_is_written_as_null(store):
    run = store.create(IDENTITY, {"crossing": math.nan, "clock": {"wall": [math.inf, 1.0]}})
    run.append({"step": 1, "loss": math.nan})
    assert run.rows() == [{"step": 1, "loss": None}]
    for path in (run.path / "run.json", run.path / "metrics.jsonl"):
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert store.find(IDENTITY).record["clock"] == {"wall": [None, 1.0]}


WRITER = """
import sys
from stretto.measure.store import Run, Store
run = Store(sys.argv[1]).find({"workload": "w", "recipe_hash": "r"})
start = max((row["step"] for row in run.rows()), default=-1) + 1
for step in range(start, 10**6):
    run.append({"step": step, "loss": 1 / (step + 1), "text": "x" * 200})
    run.update(last=step)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_every_completed_row_readable(tmp_path):
    store = Store(tmp_path)
    run = store.create({"workload": "w", "recipe_hash": "r"}, {})
    rng = random.Random(0)
    completed = -1
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        writer.send_signal(signal.SIGKILL)
        printed = writer.communicate()[0].split()
        completed = max([completed, *map(int, printed)])
        rows = run.rows()
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert len(rows) > completed
        assert store.find({"workload": "w", "recipe_hash": "r"}).record["last"] >= completed
    assert completed > 3


def test_races_are_kept_with_the_newest_last(store):
    first = store.save_race({"workload": "digits", "target": math.nan})
    second = store.save_race({"workload": "digits", "arms": []})
    assert store.races() == [first, second]
    assert store.race(first)["target"] is None and store.race(first)["id"] == first
    race = store.race(second)
    assert store.save_race({**race, "arms": [1]}) == second
    assert store.race(second) == {**race, "arms": [1]}
    with pytest.raises(ValueError, match=f"no race nought .*{first}"):
        store.race("nought")


def test_another_schema_is_refused_with_a_way_out(tmp_path):
    Store(tmp_path)
    Store(tmp_path)
    (tmp_path / "stretto.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match=r"schema 99, this version writes 1; choose another with --out"):
        Store(tmp_path)
    (tmp_path / "stretto.json").write_text("{")
    with pytest.raises(ValueError, match="an unreadable stretto"):
        Store(tmp_path, write=False)


def test_a_folder_that_cannot_be_written_is_named_with_cause_and_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/runs cannot be written \(Not a directory\).*--out"):
        Store(tmp_path / "file" / "runs")
    with pytest.raises(ValueError, match="cannot be written"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match="no runs folder"):
        Store(tmp_path / "absent", write=False)
    assert not (tmp_path / "absent").exists()


def test_names_cannot_leave_the_folder(store):
    with pytest.raises(ValueError, match="cannot name a folder"):
        store.create({"workload": "../elsewhere", "recipe_hash": "a"}, {})


def test_opening_leaves_no_probe_behind(store):
    assert [path.name for path in store.root.iterdir()] == ["stretto.json"]
    assert isinstance(store.create(IDENTITY, {}), Run)
