from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.cli import main
from stretto.measure.store import Store


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    return exit_info.value.code or 0  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("rice", "digits"), "did you mean race?"),
        (("race", "stdlib-gtp"), "stdlib-gpt"),
        (("race", "digits", "--recipes", "baselin"), "baseline"),
        (("race", "digits", "--recipes", "adamv:lr=0.1"), "adamw"),
        (("race", "digits", "--recipes", "adamw:rl=0.1"), "lr"),
        (("race", "digits", "--recipes", "adamw:lr=fast"), "lr"),
        (("race", "digits", "--recipes", "adamw, muon"), "recipe - "),
        (("race", "digits", "--recipes", "mixup:alpha=-1, adamw"), "alpha"),
        (("race", "digits", "--recipes", "mixup"), "no optimizer"),
        (("race", "digits", "--recipes", "rotary_positions, adamw"), "RotaryPositions"),
        (("race", "digits", "--recipes", "baseline @ bunch=3"), "batch"),
        (("race", "digits", "--recipes", "baseline", "baseline"), "twice"),
        (("race", "digits", "--recipes", "missing.json"), "missing.json"),
        (("race", "digits", "--target", "modern"), "baseline"),
        (("race", "digits", "--seeds", "0"), "--seeds"),
        (("race", "digits", "--evaluations", "0"), "take 1 or more"),
        (("race", "digits", "--smooth", "0"), "take 1 or more"),
        (("study", "digits", "--methods", "muon:lr=0.02,momentum=0.9"), "after a colon: method:momentum=0.9"),
        (("study", "digits", "--methods", "muon"), "one against another is a race"),
        (("study", "digits", "--methods", "muon", "ema", "--budget-hours", "0"), "--budget-hours"),
        (("quality", "digits", "--recipes", "baseline"), "baseline"),
        (("recommend", "nothing-of-that-name"), "is no runs folder"),
        (("tune", "digits", "--space", "muon.lr"), "muon"),
        (("tune", "digits", "--trials", "0"), "trials"),
        (("report", "nothing-of-that-name"), "is no runs folder"),
        (("methods", "mixupp"), "mixup"),
        (("methods", "mixupp", "--model", "stretto:gpt"), "mixup"),
        (("methods", "mixup", "--model", "stretto:gtp"), "gpt"),
        (("methods", "mixup", "--model", "resnet50"), "torchvision:resnet50"),
        (("methods", "mixup", "--model", "no_such_module:net"), "no_such_module"),
        (("methods", "mixup", "--model", "json:dumpz"), "dumps"),
        (("methods", "mixup", "--model", "builtins:dict"), "torch.nn.Module"),
        (("methods", "--model", "stretto:gpt"), "NAME"),
        (("train", "digits", "--recipe", "fats"), "fast"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_the_way_out(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = () if arguments[0] in ("methods", "rice") else ("--out", str(tmp_path))
    assert call(*arguments, *out) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err


def test_a_folder_that_cannot_be_written_is_said_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    begin = time.monotonic()
    assert call("race", "digits", "--out", str(tmp_path / "file" / "runs")) == 2
    assert time.monotonic() - begin < 5
    assert "--out" in capsys.readouterr().err


def test_runs_of_another_version_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "stretto.json").write_text('{"schema": 99}')
    assert call("race", "digits", "--out", str(tmp_path)) == 2
    assert "schema 99" in capsys.readouterr().err


def test_a_recipe_file_is_read_and_its_mistakes_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"methods": [{"method": "adamw", "lr": 0.004}], "batch": 64, "budget": 640}))
    assert call("train", "digits", "--recipe", str(path), "--out", str(tmp_path / "runs")) == 0
    assert "done, accuracy" in capsys.readouterr().out
    [run] = Store(tmp_path / "runs").runs()
    assert run.record["budget"] == 640 and run.rows()[-1]["step"] == 10
    path.write_text(json.dumps({"methods": [{"method": "adamw", "lrr": 0.004}]}))
    assert call("train", "digits", "--recipe", str(path), "--out", str(tmp_path / "runs")) == 2
    assert "lr" in capsys.readouterr().err
    path.write_text("{")
    assert call("train", "digits", "--recipe", str(path), "--out", str(tmp_path / "runs")) == 2


def test_methods_are_listed_by_slot_with_source_cost_and_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods") == 0
    rows = capsys.readouterr().out.splitlines()
    slots = [row.split()[0] for row in rows if row[:1].isalpha()]
    assert slots.index("schedule") < slots.index("model") < slots.index("batch") < slots.index("optimizer")
    at = next(i for i, row in enumerate(rows) if row.startswith("  mixup "))
    assert "1710.09412" in rows[at + 1] and rows[at + 2].split()[0] == "cost"
    assert rows[at + 3].split()[0] == "evidence"
    assert call("methods", "--brief") == 0
    brief = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("  mixup ") for row in brief) == 1 and len(brief) < len(rows) / 3


def test_one_slot_and_one_card_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "optimizer") == 0
    printed = capsys.readouterr().out
    assert "  muon " in printed and "  mixup " not in printed
    assert call("methods", "MixUp") == 0
    assert "1710.09412" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_terminal_gets_columns_that_fit_it(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    assert call("methods") == 0
    printed = capsys.readouterr().out
    assert "\x1b[1m" in printed
    rows = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()[:-1]  # the last is a sentence
    assert width * 0.8 < max(map(len, rows)) <= min(width, 120)


def test_the_page_of_the_docs_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "--markdown") == 0
    assert capsys.readouterr().out.startswith("<!-- printed by")


def test_what_a_method_changes_in_a_model_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "squared_relu", "--model", "stretto:gpt") == 0
    printed = capsys.readouterr().out
    assert "2109.08668" in printed
    assert re.search(r"blocks\.\{0-3\}\.mlp\.activation +GELU -> SquaredReLULayer", printed)
    assert call("methods", "qk_norm, mixup:alpha=0.4", "--model", "stretto:gpt") == 0
    assert "mixup acts at batch/mix" in capsys.readouterr().out


def test_a_method_with_nothing_to_change_says_so_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "rotary_positions", "--model", "stretto:resnet") == 1
    printed = capsys.readouterr()
    assert "in stretto:resnet: RotaryPositions looks for" in printed.out and not printed.err


def test_a_model_of_the_users_own_is_found_beside_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_own_net.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert call("methods", "ema", "--model", "my_own_net:net") == 0
    assert "12 parameters, as before" in capsys.readouterr().out


def test_doctor_says_what_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    assert call("doctor", "--data", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed and "cifar10" in printed and "stdlib-gpt" in printed


def test_a_race_prints_its_table_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--out", str(tmp_path), "--seeds", "2")
    short = ("baseline @ budget=640", "sgd:lr=0.2 @ budget=640")
    assert call("race", "digits", "--recipes", *short, *options) == 0
    printed = capsys.readouterr().out
    assert "| recipe" in printed and "(control)" in printed
    assert list((tmp_path / "races").glob("*.html"))
    assert call("report", "--out", str(tmp_path)) == 0
    assert "| recipe" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_prints_the_table_so_far_and_keeps_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stretto", "race", "digits", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not any(run.rows() for run in Store(tmp_path).runs()):
        time.sleep(0.1)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "| recipe" in printed and "interrupted" in printed
    assert all(run.rows() for run in Store(tmp_path).runs() if run.record["state"] != "interrupted")
