"""Checkpoints of one process: complete or absent, found, loaded bit for bit, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.core import Batch, Recipe
from stretto.methods import EMA, SGD, SOAP, AdamW, Lookahead, WarmupStableDecay
from stretto.plan import Plan
from stretto.train import Trainer, checkpoint
from stretto.update import Updater
from stretto.workloads import Digits

RECIPE = Recipe(AdamW(lr=4e-3), WarmupStableDecay(), EMA(half_life=0.1))
INPUTS = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, width), nn.Linear(width, width)
            self.head = nn.Linear(width, 3)
        if tied:
            self.second.weight = nn.Parameter(self.second.weight.detach())
            self.third = nn.Linear(width, width)
            self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        return self.head(self.third(x) if hasattr(self, "third") else x)


def updater(recipe: Recipe = RECIPE, slices: int = 1, **options: Any) -> Updater:
    plan = Plan(recipe, examples=len(INPUTS), batch=8, steps=12, slices=slices)
    return Updater(recipe, recipe.model(Net(**options)), F.cross_entropy, plan)


def train(update: Updater, steps: int) -> Updater:
    """Some steps of the loop of the README."""
    update.plan.resume(update.step)
    targets = INPUTS.argmax(1) % 3
    for _, at in zip(range(steps), update.plan):
        index = update.plan.indices(at)
        for part in update(Batch(INPUTS[index], targets[index]), at):
            update.loss(update.wrapped(part.inputs), part.targets).backward()
    return update


def equal(first: Updater, second: Updater) -> bool:
    return str(first.state_dict()) == str(second.state_dict()) and all(
        torch.equal(a, b) for a, b in zip(leaves(first.state_dict()), leaves(second.state_dict()))
    )


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value] if isinstance(value, Tensor) else []


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_a_resumed_trainer_equals_an_uninterrupted_one(digits: Digits, tmp_path: Path) -> None:
    whole, first, second = (Trainer(digits, RECIPE, seed=0) for _ in range(3))
    whole.advance(6)
    first.advance(3)
    path = checkpoint.save(first, tmp_path, watch={"wall": 0.1})
    assert path.name == "step-000003" and checkpoint.find(tmp_path) == path
    assert checkpoint.load(second, path) == {"watch": {"wall": 0.1}}
    second.advance(3)
    assert equal(whole.update, second.update)
    assert whole.evaluate() == second.evaluate()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(SGD(lr=0.1)),
        Recipe(SOAP(lr=0.01)),
        Recipe(SOAP(lr=0.01), Lookahead()),
        Recipe(AdamW(lr=0.01), Lookahead(), WarmupStableDecay()),
    ],
    ids=str,
)
def test_every_optimizer_goes_on_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    whole, second = train(updater(recipe), 7), updater(recipe)
    checkpoint.load(second, checkpoint.save(train(updater(recipe), 4), tmp_path))
    assert equal(whole, train(second, 3))


def test_what_has_not_begun_is_saved_too(tmp_path: Path) -> None:
    second = train(updater(), 2)
    checkpoint.load(second, checkpoint.save(updater(), tmp_path))
    assert equal(train(second, 3), train(updater(), 3))


# -- complete or absent


def test_a_kill_before_the_renaming_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = train(updater(), 1)
    kept = checkpoint.save(update, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(train(update, 1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002.partial"]
    with pytest.warns(UserWarning, match=r"step-000002\.partial is torn"):
        assert checkpoint.find(tmp_path) == kept
    checkpoint.save(update, tmp_path)  # over what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def lose_a_file(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def cut_a_file(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-7])


def lose_the_contents(path: Path) -> None:
    (path / ".metadata").unlink()


def cut_the_contents(path: Path) -> None:
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:100])


@pytest.mark.parametrize("tear", [lose_a_file, cut_a_file, lose_the_contents, cut_the_contents])
def test_a_torn_checkpoint_is_skipped_with_a_warning(tear: Callable[[Path], None], tmp_path: Path) -> None:
    update = updater()
    older = checkpoint.save(train(update, 1), tmp_path)
    tear(checkpoint.save(train(update, 1), tmp_path))
    with pytest.warns(UserWarning, match="step-000002 is torn"):
        assert checkpoint.find(tmp_path) == older
    newer = checkpoint.save(update, tmp_path)
    assert checkpoint.find(tmp_path) == newer
    tear(older)
    tear(newer)
    with pytest.warns(UserWarning, match="is torn"):
        assert checkpoint.find(tmp_path) is None


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path / "none") is None
    checkpoint.prune(tmp_path / "none")


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    update = updater()
    for _ in range(4):
        checkpoint.save(train(update, 1), tmp_path)
    (tmp_path / "step-000009.partial").mkdir()
    (tmp_path / "step-0000010000000").mkdir()  # more digits sort as numbers do
    lose_a_file(tmp_path / "step-000004")
    checkpoint.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    checkpoint.prune(tmp_path, keep=0)
    assert not list(tmp_path.iterdir())


# -- what lies on the disk


def test_keys_are_plain_and_any_tool_reads_them(tmp_path: Path) -> None:
    update = train(updater(tied=True), 2)
    path = checkpoint.save(update, tmp_path)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    expected = ("model.first.weight", "optimizer.first.weight.exp_avg", "state.ema.average.first.weight")
    assert {*expected, "numbers"} <= set(stored)
    assert not any("third.weight" in key for key in stored)  # tied to the second's
    read = {
        "model.head.bias": torch.zeros(3),
        "numbers": torch.zeros(stored["numbers"].size, dtype=torch.uint8),
    }
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.load(read, checkpoint_id=path)
    assert torch.equal(read["model.head.bias"], update.model.head.bias)  # type: ignore[arg-type,union-attr]
    assert json.loads(bytes(read["numbers"].tolist()))["state"]["step"] == 2
    second = updater(tied=True)
    checkpoint.load(second, path)
    assert second.model.second.weight is second.model.third.weight  # type: ignore[union-attr]
    assert equal(update, second)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch unpickles the table of contents of a checkpoint as it stands."""
    path = checkpoint.save(updater(), tmp_path)
    asked: list[object] = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: (asked.append(k.get("weights_only")), load(*a, **k))[1]
    )
    checkpoint.load(updater(), path)
    assert set(asked) == {True}
    (path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match=r"no place for posix\.mkdir"):
        checkpoint.load(updater(), path)
    assert not (tmp_path / "ran").exists()
    with pytest.warns(UserWarning, match="is torn"):
        assert checkpoint.find(tmp_path) is None


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_groups_of_another_order_are_the_same_groups(tmp_path: Path) -> None:
    """Indices of parameters, which torch stores, depend on the order of groups."""

    def made(order: int) -> Updater:
        net = Net()
        named = list(net.named_parameters())
        parts = (named[:2], named[2:])[::order]
        groups = [{"params": [p for _, p in part[::order]], "lr": 0.1 * len(part)} for part in parts]
        plan = Plan(Recipe(), examples=len(INPUTS), batch=8, steps=12)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return Updater(Recipe(), net, F.cross_entropy, plan, optimizer=optimizer)

    whole, second = train(made(1), 4), made(-1)
    checkpoint.load(second, checkpoint.save(train(made(1), 2), tmp_path))
    assert [group["lr"] for group in second.optimizer.param_groups] == [0.4, 0.2]
    train(second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters()))


def test_values_that_are_not_plain_are_refused_by_name(tmp_path: Path) -> None:
    update = updater()
    update.optimizer.param_groups[0]["device"] = torch.device("cpu")
    with pytest.raises(ValueError, match=r"groups\.param_groups\.0\.device is device.*hold tensors, numbers"):
        checkpoint.save(update, tmp_path)
    assert not list(tmp_path.iterdir())


# -- checkpoints of another run


def refused(tmp_path: Path, saved: Updater, other: Updater, message: str) -> None:
    path = checkpoint.save(train(saved, 2), tmp_path)
    before = [leaf.clone() for leaf in leaves(train(other, 1).state_dict())]
    with pytest.raises(ValueError, match=message):
        checkpoint.load(other, path)
    after = leaves(other.state_dict())
    assert len(before) == len(after) and all(map(torch.equal, before, after))


def test_another_model_is_refused_with_what_differs_and_nothing_changed(tmp_path: Path) -> None:
    message = (
        r"of another model: shapes differ: first\.weight \(8, 4\) there, \(9, 4\) here.* and 2 more; load"
    )
    refused(tmp_path, updater(), updater(width=9), message)


def test_missing_and_unexpected_parameters_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "a", updater(), updater(tied=True), r"another model: it has no third\.bias;")
    refused(tmp_path / "b", updater(tied=True), updater(), r"another model: this model has no third\.bias;")


def test_another_recipe_and_other_slices_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "a", updater(), updater(Recipe(AdamW())), "a run with recipe .* and this run has")
    refused(tmp_path / "b", updater(), updater(slices=2), "a run with slices 1, and this run has slices 2")
