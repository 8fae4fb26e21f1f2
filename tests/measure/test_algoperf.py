"""AlgoPerf's scores: the official ones, those by time, what seeds would change, and logs that are not whole."""

import csv
import gzip
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from stretto.commands.algoperf import AlgoPerf
from stretto.measure import algoperf
from stretto.measure.algoperf_logs import BASES, CLOCK, WORKLOADS, Hit, Trial, read

SHARED = Path(os.environ.get("STRETTO_DATA", Path(__file__).parents[3] / "shared" / "data"))
ORACLE = SHARED / "algoperf-v05"
oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"{ORACLE} is absent: the official scores and logs")


HEADER = ("workload", "metric", "target\n")


def official(name):
    with (ORACLE / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def logs():
    return read(ORACLE)


@pytest.fixture(scope="module")
def found(logs):
    return {rule: algoperf.standings(logs, rule) for rule in ("time", "index")}


# ---- against the official scorer


@oracle
def test_by_index_all_154_official_times(found):
    standings = found["index"]
    names = list(WORKLOADS)
    rows = official("official_time_to_target.csv")
    assert len(rows) == 154
    for row in rows:
        ours = standings.times[standings.submissions.index(row["submission"]), names.index(row["workload"])]
        if not row["time_to_target_s"]:  # no logs
            assert math.isnan(ours), row
        else:
            assert ours == pytest.approx(float(row["time_to_target_s"]), abs=1e-3), row  # logged to 0.001 s


@oracle
def test_by_index_all_11_official_scores(found):
    standings, rows = found["index"], official("official_scores.csv")
    assert len(rows) == len(standings.submissions) == 11
    for row in rows:
        i = standings.submissions.index(row["submission"])
        assert standings.scores[i] == pytest.approx(float(row["score_sorted"]), abs=1e-6)
        assert standings.exact[i] == pytest.approx(float(row["score_sorted"]), abs=0.00505)


@oracle
def test_by_time_lawa_ema_gains_and_no_other_moves(found):
    by_time, by_index = (dict(zip(found[rule].submissions, found[rule].scores)) for rule in ("time", "index"))
    assert by_time["lawa_ema"] == pytest.approx(0.3434, abs=5e-5)
    assert by_index["lawa_ema"] == pytest.approx(0.3384, abs=5e-5)
    del by_time["lawa_ema"], by_index["lawa_ema"]
    assert by_time == pytest.approx(by_index)


@oracle
def test_all_of_it_within_five_seconds():
    begun = time.process_time()
    algoperf.score(ORACLE)
    assert time.process_time() - begun < 5


@oracle
def test_seed_intervals_are_the_published_ones(found):
    standings = found["time"]
    assert standings.submissions[:2] == ("shampoo_submission", "schedule_free_adamw")
    assert standings.intervals[0] == pytest.approx([0.645, 0.910], abs=0.005)
    assert standings.intervals[1] == pytest.approx([0.587, 0.779], abs=0.005)
    assert standings.above[0, 1] == pytest.approx(0.74, abs=0.03)
    assert np.allclose(standings.above + standings.above.T, 1)


@oracle
def test_targets_are_those_of_the_table():
    with gzip.open(ORACLE / "evaluations.csv.gz", "rt") as file:
        rows = {tuple(line.split(",")[i] for i in (1, 6, 8)) for line in file}
    seen = {workload: (metric, float(target)) for workload, metric, target in rows - {HEADER}}
    assert {name: (target.metric, target.value) for name, target in WORKLOADS.items()}.items() <= seen.items()
    told = json.loads((ORACLE / "workloads.json").read_text())["v05_external"]
    assert told["base_workloads"] == BASES
    assert set(told["held_out_workloads"]) == set(WORKLOADS) - set(BASES)


@oracle
def test_what_the_logs_lack_is_told_in_a_line_each(found):
    notes = found["time"].notes
    assert len(notes) == 4
    assert any("NaN" in note and "generalized_adam 615" in note for note in notes)
    assert "caspr_adaptive has no logs of criteo1tb, criteo1tb_embed_init, wmt_glu_tanh: missed" in notes
    assert any("not of version 0.5" in note and "ogbg_gelu" in note for note in notes)


@oracle
def test_a_diverged_minimised_metric_is_a_miss_not_a_hit(logs):
    """A comparison that takes NaN for low would let generalized_adam reach its target at the first NaN."""
    runs = {}
    with gzip.open(ORACLE / "evaluations.csv.gz", "rt") as file:
        for line in file:
            if line.startswith("generalized_adam,criteo1tb,"):
                _, _, study, trial, _, _, _, value, _ = line.split(",")
                runs.setdefault((int(study), int(trial)), []).append(float(value))
    diverged = {key: values for key, values in runs.items() if np.isnan(values).any()}
    assert len(diverged) == 5
    for (study, trial), values in diverged.items():
        reached = [i for i, value in enumerate(values) if value <= 0.123735]
        assert logs.hits[Trial("generalized_adam", "criteo1tb", study, trial)].before == min(
            reached, default=math.inf
        )


# ---- rules, worked by hand


def test_medians_count_misses_and_leave_out_what_is_absent():
    inf, nan = math.inf, math.nan
    studies = np.array([[5, 1, 3], [inf, 2, 1], [inf, inf, 1], [4, nan, 2], [nan, nan, nan], [inf, nan, 2]])
    assert algoperf.median(studies) == pytest.approx([3, 2, inf, 3, nan, inf], nan_ok=True)


def times(**columns):
    """Two submissions: 100 s everywhere, except as said."""
    table = np.full((2, len(WORKLOADS)), 100.0)
    for name, column in columns.items():
        table[:, list(WORKLOADS).index(name)] = column
    return table


def test_a_missed_variant_makes_its_base_a_miss_and_more_than_four_times_is_missed():
    def ratio(name, **columns):
        return algoperf.to_fastest(times(**columns))[:, BASES.index(name)].tolist()

    assert ratio("wmt", wmt=[100, 250]) == [1, 2.5]
    assert ratio("wmt", wmt=[100, 400]) == [1, 4]
    assert ratio("wmt", wmt=[100, 401]) == [1, math.inf]
    assert ratio("wmt", wmt_glu_tanh=[100, math.inf]) == [1, math.inf]
    assert ratio("wmt", wmt_glu_tanh=[100, 401]) == [1, math.inf]
    assert ratio("wmt", wmt_glu_tanh=[math.nan, 100]) == [math.inf, 1]
    # a variant counts only where its base was reached: the 10 s do not make the other's 100 s too slow
    assert ratio("wmt", wmt=[math.inf, 100], wmt_glu_tanh=[10, 100]) == [math.inf, 1]
    assert ratio("imagenet_vit", imagenet_vit=[math.inf, math.inf]) == [math.inf, math.inf]
    # once the fastest is missed for its variant, the next is the fastest
    assert ratio("wmt", wmt=[100, 250], wmt_glu_tanh=[math.inf, 100]) == [math.inf, 1]


def test_the_official_score_is_the_trapezoid_rule_over_the_profile():
    ratios = np.random.default_rng(0).uniform(0.9, 5, (50, 8)).clip(1)
    ratios[:3] = [[1.0], [4.0], [math.inf]]
    shares = algoperf.profile(ratios, algoperf.POINTS)
    by_hand = np.trapezoid(shares, algoperf.POINTS, axis=1) / 3
    assert algoperf.official(ratios) == pytest.approx(by_hand)
    assert algoperf.official(ratios) == pytest.approx(algoperf.exact(ratios), abs=0.0051)
    assert algoperf.exact(ratios)[:3].tolist() == [1, 0, 0]


def test_rules_choose_different_trials_and_ties_go_by_number():
    seconds = {1: Hit(5, 90.0), 2: Hit(3, 100.0), 3: Hit(3, 95.0), 4: Hit(math.inf, math.inf)}
    logs = type("Logs", (), {"hits": {Trial("a", "wmt", 0, n): hit for n, hit in seconds.items()}})

    def chosen(rule):
        return algoperf.study_times(logs, rule)[1][0, list(WORKLOADS).index("wmt"), 0]

    assert (chosen("time"), chosen("index")) == (90, 100)


def test_drawn_studies_are_those_of_their_cell_and_absent_ones_stay_absent():
    studies = np.array([[[3.0, 1.0, 2.0], [7.0, np.nan, np.nan], [np.nan] * 3]])
    drawn = algoperf.redrawn(studies, 500)
    assert drawn.shape == (500, 1, 3, 3)
    assert set(drawn[:, 0, 0].ravel()) == {1, 2, 3}
    assert set(drawn[:, 0, 1, 0]) == {7} and np.isnan(drawn[:, 0, 1, 1:]).all()
    assert np.isnan(drawn[:, 0, 2]).all()


# ---- logs that a test makes

HEAD = [CLOCK, "global_step", "validation/loss", "validation/wer", "validation/bleu", "validation/accuracy"]
HEAD += ["validation/ssim", "validation/mean_average_precision", "validation/num_examples"]


def write_trial(folder, seconds, reached=True):
    """A log of two evaluations: one short of every target, one past it after `seconds`."""
    folder.mkdir(parents=True)
    good = [0.01, 0.01, 99, 0.99, 0.99, 0.99] if reached else ["", "", 0, 0, 0, 0]
    rows = [HEAD, [1.5, 1, 9, 9, 0, 0, 0, 0, 10], [seconds, 2, *good, 10]]
    (folder / "eval_measurements.csv").write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return folder / "eval_measurements.csv"


@pytest.fixture
def tree(tmp_path):
    """Two submissions, two studies, two trials: fast takes 100 + 10 study + trial seconds, slow twice that."""
    for name, factor, framework in (("fast", 1, "jax"), ("slow", 2, "pytorch")):
        for study in (0, 1):
            for workload in WORKLOADS:
                for trial in (1, 2):
                    folder = tmp_path / name / f"study_{study}" / f"{workload}_{framework}" / f"trial_{trial}"
                    write_trial(folder, factor * (100 + 10 * study + trial))
    return tmp_path


def test_a_log_tree_scores(tree):
    found = algoperf.score(tree)
    assert found.submissions == ("fast", "slow") and found.notes == ()
    assert np.allclose(found.times[0], 106) and np.allclose(found.times[1], 212)  # medians of 101 and 111
    assert found.exact == pytest.approx([1, 2 / 3]) and found.scores == pytest.approx([1, 2 / 3], abs=0.0051)
    assert found.above[0, 1] == 1


def test_one_submission_and_trees_without_studies_and_teams(tree):
    alone = algoperf.score(tree / "fast")
    assert alone.submissions == ("fast",) and alone.scores == pytest.approx([1])
    shutil.move(tree / "slow", tree / "team" / "slow")
    for workload in (tree / "fast" / "study_0").iterdir():
        shutil.move(workload, tree / "fast" / workload.name)
    shutil.rmtree(tree / "fast" / "study_1")
    found = algoperf.score(tree)
    assert found.submissions == ("fast", "team/slow")
    assert np.allclose(found.times[0], 101)


def test_a_missing_workload_and_a_trial_without_a_log_are_misses_told_once(tree):
    for study in (0, 1):
        shutil.rmtree(tree / "slow" / f"study_{study}" / "wmt_pytorch")
        for trial in (1, 2):
            folder = tree / "slow" / f"study_{study}" / "ogbg_pytorch" / f"trial_{trial}"
            (folder / "eval_measurements.csv").unlink()
    found = algoperf.score(tree)
    assert "slow has no logs of wmt: missed" in found.notes
    assert sum("has no eval_measurements.csv: a miss" in note for note in found.notes) == 4
    assert len(found.notes) == 5
    assert np.isinf(found.ratios[1, [BASES.index("wmt"), BASES.index("ogbg")]]).all()
    assert found.exact == pytest.approx([1, 2 / 3 * 6 / 8])


def test_nan_in_a_falling_and_in_a_rising_metric_is_a_miss(tree):
    for workload in ("criteo1tb", "wmt"):
        for study, trial in ((0, 1), (0, 2), (1, 1), (1, 2)):
            folder = tree / "fast" / f"study_{study}" / f"{workload}_jax" / f"trial_{trial}"
            shutil.rmtree(folder)
            log = write_trial(folder, 100, reached=False)
            log.write_text(log.read_text().replace(",0,0,0,0,10", ",nan,nan,nan,nan,10"))
    found = algoperf.score(tree)
    row = found.times[found.submissions.index("fast")]
    assert np.isinf(row[list(WORKLOADS).index("criteo1tb")]) and np.isinf(row[list(WORKLOADS).index("wmt")])
    assert any(note.startswith("evaluations that are NaN") and "fast" in note for note in found.notes)


def test_a_torn_last_line_is_left_out_and_the_rest_counts(tree):
    log = tree / "fast" / "study_0" / "wmt_jax" / "trial_1" / "eval_measurements.csv"
    log.write_text(log.read_text()[:-10])
    found = algoperf.score(tree)
    assert [note for note in found.notes if "line 3 is torn" in note and str(log) in note]
    assert found.times[0][list(WORKLOADS).index("wmt")] == pytest.approx((102 + 111) / 2)
    log.write_text(log.read_text().replace("validation/bleu", "validation/blue"))
    (note,) = algoperf.score(tree).notes
    assert note == f"{log} has no column validation/bleu: a miss"


def test_workloads_of_other_versions_are_left_out(tree):
    write_trial(tree / "fast" / "study_0" / "finewebedu_lm_jax" / "trial_1", 10)
    assert algoperf.score(tree).notes == ("not of version 0.5, left out: finewebedu_lm",)


@pytest.mark.parametrize("how", ["empty", "absent", "file", "other", "no gzip"])
def test_what_holds_no_logs_is_refused_in_one_line(tmp_path, how):
    path = tmp_path / "logs"
    if how == "file":
        path.write_text("a,b\n1,2\n")
    elif how != "absent":
        path.mkdir()
    if how == "no gzip":
        (path / "evaluations.csv.gz").write_text("submission,workload,study,trial,time_s,value\n")
    if how == "other":
        (path / "evaluations.csv").write_text(
            "submission,workload,study,trial,time_s,value\na,mnist,0,1,2,3\n"
        )
    told = {
        "empty": "holds no AlgoPerf logs", "absent": "does not exist",
        "file": "has no column submission", "other": "no evaluation of an AlgoPerf workload",
        "no gzip": "no evaluation of an AlgoPerf workload",
    }  # fmt: skip
    with pytest.raises(ValueError, match=told[how]) as raised:
        algoperf.score(path)
    assert "\n" not in str(raised.value)


def test_a_table_cut_off_in_the_middle_counts_as_far_as_it_goes(tmp_path):
    rows = [
        f"a,{name},0,1,{100 + i}.5,{0.01 if WORKLOADS[name].falls else 99}"
        for i, name in enumerate(WORKLOADS)
    ]
    text = "submission,workload,study,trial,time_s,value\n" + "\n".join(rows * 200)
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv.gz"
    whole.write_text(text + "\na,wmt,0")
    assert "line 2802 is torn" in read(whole).notes[0]
    cut.write_bytes(gzip.compress(text.encode())[:-30])
    logs = read(cut)
    assert "ends in the middle" in logs.notes[0] and len(logs.hits) == 14
    whole.write_text(text.replace("wmt,0,1", "wmt,0,first"))
    with pytest.raises(ValueError, match="trial 'first' must be whole numbers"):
        read(whole)


# ---- the command


def test_the_command_prints_tables_rows_and_json(tree, capsys):
    shutil.rmtree(tree / "slow" / "study_1" / "wmt_pytorch")
    shutil.rmtree(tree / "slow" / "study_0" / "wmt_pytorch")
    assert AlgoPerf("score", tree).run() == 0
    printed = capsys.readouterr()
    assert printed.err == "note: slow has no logs of wmt: missed\n"
    assert "1  fast" in printed.out and "soonest at the target" in printed.out
    assert [line.split() for line in printed.out.splitlines() if line.startswith("wmt ")] == [
        ["wmt", "106", "no", "logs"]
    ]

    AlgoPerf("score", tree, "index", "csv").run()
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["figure"] for row in rows} == {
        "score",
        "exact",
        "low",
        "high",
        "time",
        "ratio",
        "profile",
        "above",
    }
    (ratio,) = (
        row for row in rows if row["figure"] == "ratio" and row["submission"] == "slow" and row["of"] == "wmt"
    )
    assert ratio["value"] == "inf"

    AlgoPerf("score", tree, format="json").run()
    data = json.loads(capsys.readouterr().out)
    assert data["rule"] == "time" and len(data["notes"]) == 1
    assert (
        data["submissions"]["fast"]["time"]["wmt"] == 106
        and data["submissions"]["slow"]["time"]["wmt"] is None
    )
    assert data["submissions"]["fast"]["above"] == {"slow": 1.0}
