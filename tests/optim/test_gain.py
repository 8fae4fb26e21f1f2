"""The benchmark of what the family gains: what must hold on problems whose theory is known, and its table."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import optimizer_gain as benchmark


def steps(problem: str, member: str, lr: float, seed: int) -> int:
    found = benchmark.run(benchmark.PROBLEMS[problem], member, lr, seed, "test")
    assert found.reached, found
    return found.steps


def test_on_rotated_least_squares_factors_reach_the_target_in_fewer_steps_than_adamw() -> None:
    base = steps("least-squares", "AdamW", 0.1, 101)
    for member in ("Shampoo", "KLShampoo", "SOAP"):
        assert 1.5 * steps("least-squares", member, 0.1, 101) < base, member


def test_on_the_diagonal_quadratic_adamw_is_not_beaten_by_much() -> None:
    base = steps("diagonal", "AdamW", 0.03, 100)
    for member in ("Shampoo", "SOAP"):
        assert 1.2 * steps("diagonal", member, 0.1, 100) > base, member


def test_a_crossing_holds_at_the_next_evaluation() -> None:
    losses = iter([1.0, 2.0, 0.5, 2.0, 0.5, 0.5])  # the first is that before training

    class Told(benchmark.DiagonalQuadratic):
        def loss(self) -> float:
            return next(losses)

    problem = benchmark.Problem("told", Told, 6, 1.0, 1, range(-3, 0))
    found = benchmark.run(problem, "AdamW", 0.01, 0, "test")
    assert found.reached and found.steps == 4


def test_quick_run_prints_and_keeps_a_row_for_each_member(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["optimizer_gain.py", "--quick", "--out", str(tmp_path)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert all(f"| {member} |" in printed for member in benchmark.QUICK_MEMBERS)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    trials = {
        m: sum(r["member"] == m and r["purpose"] == "tuning" for r in runs)
        for m in {r["member"] for r in runs}
    }
    assert len(set(trials.values())) == 1
