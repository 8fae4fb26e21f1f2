"""The trainer on many ranks: the losses, metrics and decisions of one process, on every rank."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import ranks
import torch
import torch._dynamo  # slow to import, so once, before ranks are forked
import torch.nn.functional as F
from torch import Tensor, nn

from stretto import shards
from stretto.core import Forward
from stretto.data import Arrays
from stretto.methods import parse
from stretto.models.gpt import GPT, next_token_loss
from stretto.models.resnet import ResNet
from stretto.train import (
    Execution,
    Trainer,
    scattered,
    tensor_parallel,  # noqa: F401  # slow to import, likewise
)
from stretto.workloads import Workload

RECIPE = "adamw:lr=0.01, warmup_stable_decay, ema:half_life=0.2, gradient_clipping:norm=0.5, label_smoothing"


class Words(Workload):
    """Next-token prediction on noise that has a pattern."""

    name, batch, budget, metric, measured_on = "words", 8, 64, "loss", "noise"
    targets = {"baseline": 0.0}
    fingerprint = "noise"

    def data(self, split: Literal["train", "valid"]) -> Arrays:
        generator = torch.Generator().manual_seed(len(split))
        tokens = torch.randint(0, 24, (24, 1), generator=generator) + torch.arange(9) * 5
        return Arrays(tokens[:, :-1] % 24, tokens[:, 1:] % 24)

    def model(self) -> nn.Module:
        return GPT(24, length=8, width=16, depth=2, heads=4).double()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(outputs, targets)

    def evaluate(self, predict: Forward) -> dict[str, float]:
        data = self.data("valid")
        return {"loss": float(next_token_loss(predict(data.inputs), data.targets).mean())}


class Pictures(Words):
    """Float32 images and batch norm."""

    name = "pictures"

    def data(self, split: Literal["train", "valid"]) -> Arrays:
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.randint(0, 3, (24,), generator=generator)
        return Arrays(torch.randn(24, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels)

    def model(self) -> nn.Module:
        return ResNet(channels=1, classes=3, widths=(4, 6))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def evaluate(self, predict: Forward) -> dict[str, float]:
        data = self.data("valid")
        return {"loss": float(F.cross_entropy(predict(data.inputs), data.targets))}


def train(
    workload: type[Workload], recipe: str, slices: int, options: dict[str, Any]
) -> tuple[list[float], float, Any]:
    execution = Execution(precision="float64", device="cpu", **options)
    trainer = Trainer(workload(), parse(recipe), execution=execution, slices=slices, seed=3)
    losses = []
    while not trainer.finished:
        trainer.advance(1)
        losses.append(trainer.loss)
    metric = trainer.evaluate()["loss"]
    names = dict(trainer.update.model.named_parameters())
    return losses, metric, {name: shards.whole(p.detach()) for name, p in names.items()}


def test_ddp_waits_for_no_parameter_that_a_method_leaves_out() -> None:
    recipe = "adamw:lr=0.01, stochastic_depth:drop=0.8:by=batch"
    losses = train(Words, recipe, 2, {})[0]
    for found in ranks.run(train, 2, Words, recipe, 2, {"parallel": "ddp"}):
        assert found[0] == pytest.approx(losses, rel=1e-8)


@pytest.mark.parametrize("workload, count, slices, options", [
    (Words, 2, 2, {"parallel": "ddp"}),
    (Words, 2, 4, {"parallel": "fsdp"}),
    (Words, 4, 4, {"parallel": "hsdp", "replicas": 2}),
    (Words, 2, 1, {"parallel": "tp"}),
    (Words, 4, 2, {"parallel": "tp+fsdp", "tensor": 2}),
    (Words, 4, 4, {"parallel": "fsdp", "meta": True, "checkpointing": True}),
    (Pictures, 2, 2, {"parallel": "ddp"}),
    (Pictures, 4, 4, {"parallel": "fsdp"}),
], ids=lambda value: value["parallel"] if isinstance(value, dict) else None)  # fmt: skip
def test_losses_metrics_and_weights_are_those_of_one_process(
    workload: type[Workload],
    count: int,
    slices: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scattered, "SMALL", 64)
    monkeypatch.setattr(scattered, "WINDOW", 1 << 10)
    losses, metric, weights = train(workload, RECIPE, slices, {})
    assert losses[-1] < losses[0]
    for found in ranks.run(train, count, workload, RECIPE, slices, options):
        assert found[0] == pytest.approx(losses, rel=1e-8)
        assert found[1] == pytest.approx(metric, rel=1e-8)
        torch.testing.assert_close(found[2], weights, rtol=1e-7, atol=1e-9)


def skips(parallel: Any, rank: int, step: int, always: bool) -> tuple[int, list[float], str]:
    """One rank finds a gradient, or with nan inputs a loss, that is not finite; what all of them do."""
    trainer = Trainer(Words(), parse("adamw"), execution=Execution(parallel, device="cpu"), max_skips=2)
    if torch.distributed.get_rank() == rank:
        spoil(trainer, step, always)
    error = ""
    try:
        trainer.advance(5)
    except FloatingPointError as raised:
        error = str(raised)
    head = shards.whole(dict(trainer.update.model.named_parameters())["head.weight"].detach())
    return trainer.step, [trainer.loss, float(head.sum())], error


def spoil(trainer: Trainer, step: int, always: bool) -> None:
    weigh = trainer.update.loss

    def loss(outputs: Any, targets: Any) -> Tensor:
        bad = always or trainer.step == step
        return weigh(outputs, targets) * (math.inf if bad else 1.0)

    trainer.update.loss = loss  # type: ignore[method-assign]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_one_rank_cannot_step_no_rank_steps(parallel: str) -> None:
    first, second = ranks.run(skips, 2, parallel, 1, 2, False)
    assert first == second and first[0] == 5 and math.isfinite(first[1][1]) and not first[2]
    first, second = ranks.run(skips, 2, parallel, 1, 2, True)
    assert first[0] == second[0] == 2
    for outcome in (first, second):
        assert "2 steps in a row, the last of them 1" in outcome[2]


class Wider(Words):
    """On rank 1."""

    def model(self) -> nn.Module:
        return GPT(24, length=8, width=16 + 16 * torch.distributed.get_rank(), depth=2, heads=4).double()


def refused(options: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as raised:
        Trainer(Wider(), parse("adamw"), execution=Execution(device="cpu", **options))
    return str(raised.value)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_a_rank_with_other_shapes_is_one_error_on_every_rank(parallel: str) -> None:
    says = "ranks have different models: rank 1 has tokens.weight (24, 32) where rank 0 has tokens.weight (24, 16)"
    for text in ranks.run(refused, 2, {"parallel": parallel}):
        assert text.startswith(says)


def test_an_infinite_gradient_in_one_shard_is_seen_by_all() -> None:
    assert ranks.run(spoilt_shard, 2) == [False, False]


def spoilt_shard() -> bool:
    trainer = Trainer(Words(), parse("adamw"), execution=Execution("fsdp", device="cpu"))
    for p in trainer.update.model.parameters():
        p.grad = torch.zeros_like(p)
    head: Any = trainer.update.model.head
    if torch.distributed.get_rank() == 1:
        shards.local(head.weight.grad)[0, 0] = math.inf
    return trainer._gradients_finite()
