from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stretto.core import Recipe
from stretto.methods import EMA, SGD, AdamW, GradientClipping, WarmupStableDecay
from stretto.train import Trainer
from stretto.workloads import Digits, StdlibGPT, find
from stretto.workloads.stdlib_gpt import LEFT_OUT

RECIPE = Recipe(AdamW(lr=4e-3), WarmupStableDecay(), EMA(half_life=0.1), GradientClipping())


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def weights(trainer: Trainer) -> list[Tensor]:
    return [value.clone() for value in trainer.model.state_dict().values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second))


def test_the_same_seed_twice_gives_the_same_bits_and_another_seed_others(digits: Digits) -> None:
    one, same, other = (Trainer(digits, RECIPE, seed=seed) for seed in (0, 0, 1))
    for trainer in (one, same, other):
        trainer.advance(5)
    assert equal(weights(one), weights(same))
    assert not equal(weights(one), weights(other))


def test_advancing_in_pieces_equals_at_once_also_beside_another_trainer(digits: Digits) -> None:
    """A race leaves trainers standing; whoever advances in between must not move their draws."""
    whole, cut, beside = (Trainer(digits, RECIPE, seed=seed) for seed in (0, 0, 7))
    whole.advance(6)
    for _ in range(3):
        cut.advance(2)
        beside.advance(1)
        beside.evaluate()
        torch.rand(3)
    assert equal(weights(whole), weights(cut))


def test_evaluating_changes_nothing_and_learns(digits: Digits) -> None:
    trainer, silent = Trainer(digits, RECIPE, seed=0, budget=64 * 40), Trainer(digits, RECIPE, budget=64 * 40)
    before = trainer.evaluate()
    for _ in range(40):
        trainer.advance()
        if trainer.step % 10 == 0:
            trainer.evaluate()
    silent.advance(40)
    assert trainer.finished
    assert equal(weights(trainer), weights(silent))
    assert before["accuracy"] < 0.3 < 0.8 < trainer.evaluate()["accuracy"]


def test_steps_without_finite_gradients_are_skipped_then_stop_the_run_by_name(digits: Digits) -> None:
    trainer = Trainer(digits, Recipe(SGD()), max_skips=3)
    trainer.advance(1)
    kept = dict(trainer.model.named_parameters())["head.weight"].clone()
    handle = dict(trainer.model.named_parameters())["head.weight"].register_hook(
        lambda grad: grad * float("nan")
    )
    trainer.advance(2)
    assert torch.equal(dict(trainer.model.named_parameters())["head.weight"], kept)
    assert (trainer.step, trainer.skips) == (3, 2)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, the last of them 3.*head\.weight"):
        trainer.advance(1)
    handle.remove()
    trainer.advance(1)
    assert trainer.skips == 0


def test_the_standard_library_splits_by_file_and_leaves_tests_out() -> None:
    workload = StdlibGPT()
    again = StdlibGPT()
    assert workload.fingerprint == again.fingerprint
    train, valid = workload.data("train"), workload.data("valid")
    assert 5e6 < len(train.stream) < 2e7
    assert 0.02 < len(valid.stream) / len(train.stream) < 0.1
    assert {"test", "encodings", "site-packages", "idle_test"} <= LEFT_OUT
    inputs, targets = train.take(torch.tensor([0, 5]))
    assert inputs.shape == targets.shape == (2, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(torch.stack([train[0][0], train[5][0]]), inputs)


def test_an_untrained_gpt_knows_nothing_about_bytes() -> None:
    loss = Trainer(find("stdlib-gpt"), RECIPE).evaluate()["loss"]
    assert loss == pytest.approx(5.545, abs=0.1)  # log 256
