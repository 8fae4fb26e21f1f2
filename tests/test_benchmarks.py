"""The benchmark of methods: it knows every method, and what it compares is equal."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import methods as benchmark
import scale
import scale_model
from by_hand import CASES, HOSTS, NO_COST, Entry
from optimizer_shapes import Shapes

from stretto.methods import CATALOGUE

CHEAP = [entry for entry in CASES if entry.host == "gpt" and (entry.foreach or entry.method == "z_loss")]


def name(entry: Entry) -> str:
    return f"{entry.method}-{entry.host}"


def check(entry: Entry) -> None:
    case = entry.build(HOSTS[entry.host])
    with torch.random.fork_rng():
        benchmark.assert_equal(entry, case)
        if entry.foreach:
            benchmark.assert_foreach(entry)


def test_every_method_has_a_case_or_a_reason_to_have_none() -> None:
    assert benchmark.missing() == []
    assert not {entry.method for entry in CASES} & set(NO_COST)
    assert {entry.method for entry in CASES} | set(NO_COST) == set(CATALOGUE)


@pytest.mark.parametrize("entry", CHEAP, ids=name)
def test_by_hand_gives_the_same_values_and_calls_do_not_grow_with_the_tensors(entry: Entry) -> None:
    check(entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in CASES if entry not in CHEAP], ids=name)
def test_by_hand_gives_the_same_values(entry: Entry) -> None:
    check(entry)


def test_a_case_whose_values_differ_is_found() -> None:
    entry = next(entry for entry in CASES if entry.method == "z_loss")
    case = benchmark.dataclasses.replace(
        entry.build(HOSTS["conv"]), by_hand=lambda: (torch.zeros(()), torch.ones(32, 10))
    )
    with pytest.raises(AssertionError, match="z_loss on conv"):
        benchmark.assert_equal(entry, case)


def test_quick_run_times_two_methods_and_prints_a_row_for_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--quick", "--only", "squared_relu,sequence_length_warmup"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = [line.split()[:2] for line in printed.splitlines()]
    assert ["squared_relu", "gpt"] in rows and ["sequence_length_warmup", "gpt"] in rows
    assert "median ratio over 2 methods" in printed


def test_the_page_on_scale_has_the_tables_that_the_model_prints(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    assert scale_model.memory() in page
    named = (line for line in page.splitlines() if line.startswith("| GPT-2 124M | 64 |"))
    every = str(scale_model.cheapest("GPT-2 124M", 64, 1024, scale_model.TF32))
    costs, shares, choices = named
    assert scale_model.figure(scale_model.cost("GPT-2 124M", 64).state, 1e6) in costs
    assert f"{scale_model.share('GPT-2 124M', 64, 10, 1024, scale_model.TF32):.1%}" in shares
    assert choices.split(" | ")[6] == every
    copy = tmp_path / "page.md"
    copy.write_text(page)
    scale.write(copy, {"memory": "| new |"})
    assert "<!-- memory -->\n| new |\n<!-- end -->" in copy.read_text()
    with pytest.raises(ValueError, match="no place for the table other"):
        scale.write(copy, {"other": ""})


def test_ranks_are_measured_beside_what_the_layout_foretells() -> None:
    small = Shapes("small", ((64, 16),), ((64, 64), (64,)) * 2)
    found = scale.on_ranks(2, small, "fsdp", "Shampoo", 1)
    moved = found.step_wire - scale.on_ranks(2, small, "fsdp", "AdamW", 1).step_wire
    assert found.foretold_wire > 0 and moved > 0.9 * found.foretold_wire
    assert found.step_cpu > 0 and 0.5 <= found.load < 1
