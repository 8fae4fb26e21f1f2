"""Intervals hold the truth as often as they say: few draws and loose bars always, 4,000 and the real ones if slow."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
spec = importlib.util.spec_from_file_location("stretto_coverage", PATH)  # there is another module `coverage`
benchmark = sys.modules["stretto_coverage"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("seeds", benchmark.SEEDS)
@pytest.mark.parametrize("kind", ["paired", "welch"])
def test_students_intervals_cover(kind, seeds):
    assert 0.93 <= benchmark.student(kind, seeds, 4000) <= 0.97


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize("misses", benchmark.MISSES)
def test_intervals_with_misses_cover(misses, seeds):
    row = benchmark.censored(benchmark.BASE, misses, seeds, 200)
    assert benchmark.faults(row, slack=0.03) == []
    assert row.dropped < row.estimate < 1.35  # to drop the misses makes the difference small


def test_intervals_with_misses_between_evaluations_cover():
    row = benchmark.censored(benchmark.EVALUATED, 0.38, 5, 200)
    assert benchmark.faults(row, slack=0.03) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [*benchmark.CASES, benchmark.EVALUATED], ids=lambda case: case.name)
def test_every_bar_is_met(case):
    for misses in benchmark.MISSES:
        for seeds in benchmark.SEEDS:
            row = benchmark.censored(case, misses, seeds, 4000)
            assert benchmark.faults(row) == []
            if (
                seeds == 10 and case.truth
            ):  # of equal arms that mostly miss, the intervals cover more than needed
                assert row.covered <= 0.97
