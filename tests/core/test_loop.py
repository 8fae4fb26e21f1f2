"""The plain loop of the README, as anybody writes it, and the same gone on with after a break."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from stretto import Batch, Plan, Recipe, Updater
from stretto.methods import (
    EMA,
    AdamW,
    GradientClipping,
    LabelSmoothing,
    MixUp,
    WarmupStableDecay,
    ZeroInitResidual,
)
from stretto.models.resnet import ResNet


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(3, 5, (8, 16))


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (64,), generator=generator)
    noise = torch.randn(64, 3, 8, 8, generator=generator)
    return TensorDataset(noise + labels[:, None, None, None], labels)


def recipe() -> Recipe:
    return Recipe(
        ZeroInitResidual(), MixUp(0.2), LabelSmoothing(), AdamW(lr=2e-2), WarmupStableDecay(),
        EMA(half_life=0.2), GradientClipping(),
    )  # fmt: skip


@pytest.mark.parametrize("leave", [1, 7])
def test_the_plain_loop_trains_evaluates_saves_and_goes_on(leave, tmp_path):
    """A user's own loop that needs more than the one in the README, or goes on otherwise than it began."""
    path = tmp_path / "run.pt"

    def run(stop: int | None = None, resume: bool = False) -> tuple[Updater, list[float]]:
        mine = recipe()
        data = mine.data(images())
        plan = Plan(mine, examples=len(data), batch=16, epochs=3, seed=0)
        loader = DataLoader(data, batch_sampler=plan.batches())
        model = mine.model(resnet())
        update = Updater(mine, model, F.cross_entropy, plan)
        if resume:
            update.load_state_dict(torch.load(path, weights_only=True))
            plan.resume(update.step)
        losses = []
        for at, (inputs, labels) in zip(plan, loader):
            if at.step == stop:
                break
            for part in update(Batch(inputs, labels), at):
                loss = update.loss(model(part.inputs), part.targets)
                loss.backward()
            losses.append(loss.item())
        with update.evaluating(plan.calibration(data)) as predict:
            hits = (predict(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
        losses.append(hits.item())
        torch.save(update.state_dict(), path)
        return update, losses

    whole, losses = run()
    assert whole.step == 12 and losses[-2] < losses[0] and losses[-1] > 0.4
    run(stop=leave)
    resumed, rest = run(resume=True)
    assert rest == losses[leave:]
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_four_slices_and_micro_batches_run_the_same_recipe():
    """A recipe whose losses change with the memory it is given."""
    firsts = []
    for microbatch in (None, 2, 4):
        mine = recipe() - ZeroInitResidual
        data = images()
        plan = Plan(mine, examples=len(data), batch=16, steps=1, slices=4)
        model = mine.model(resnet()).eval()  # batch norm is local to a micro-batch
        update = Updater(mine, model, F.cross_entropy, plan, microbatch=microbatch)
        inputs, labels = next(iter(DataLoader(data, batch_sampler=plan.batches())))
        total = 0.0
        for part in update(Batch(inputs, labels), plan.at(0)):
            loss = update.loss(model(part.inputs), part.targets)
            loss.backward()
            total += loss.item()
        firsts.append((total, model.head.weight.detach().clone()))
    for total, weight in firsts[1:]:
        assert total == pytest.approx(firsts[0][0], rel=1e-5)
        torch.testing.assert_close(weight, firsts[0][1], rtol=1e-3, atol=1e-4)
