"""One process that acts as k slices equals k ranks, however they are wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from stretto import shards
from stretto.core import (
    At,
    AverageMethod,
    Batch,
    BatchMethod,
    PassesMethod,
    Phase,
    Recipe,
    SelectMethod,
    State,
)
from stretto.methods import AdamW, GradientClipping, LabelSmoothing, MixUp, WarmupStableDecay
from stretto.models.gpt import GPT, next_token_loss
from stretto.models.resnet import ResNet
from stretto.plan import Plan
from stretto.update import Updater, unwrap

STEPS = 50


@dataclass(frozen=True)
class Swap(BatchMethod):
    """Replaces tokens by draws of their row, and some by those of a partner in the slice."""

    phases = (Phase.MIX,)

    def batch(self, batch: Batch, at: At) -> Batch:
        assert batch.rows is not None
        partner = torch.randperm(len(batch), generator=at.generator("swap"))
        draws = at.uniform("swap", batch.rows, batch.inputs.shape[1])
        swapped = torch.where(draws < 0.1, batch.inputs[partner], batch.inputs)
        return batch._replace(inputs=torch.where(draws > 0.95, (draws * 1000).long() % 13, swapped))


@dataclass(frozen=True)
class Shadow(AverageMethod):
    """An exponential average, on whatever is there."""

    def average(self, model: nn.Module, at: At, state: State) -> None:
        for name, p in model.named_parameters():
            if name not in state:
                state[name] = p.detach().clone()
            shards.local(state[name]).lerp_(shards.local(p), 0.2)

    def averaged(self, model: nn.Module, optimizer: Any, at: At, state: State) -> State:
        return dict(state)


@dataclass(frozen=True)
class Hardest(SelectMethod):
    """Half of each slice in every other step, and less of one."""

    uneven: bool = False
    phases = (Phase.SELECT,)

    def select(self, batch: Batch, at: At, losses: Callable[[Batch], Tensor]) -> Batch:
        if at.step % 2:
            return batch
        count = len(batch) // 2 - (self.uneven and at.slice == 0)
        return batch.take(losses(batch).topk(count).indices.sort().values)


@dataclass(frozen=True)
class Ascend(PassesMethod):
    """A second pass from further up, entry by entry."""

    phases = (Phase.ASCEND,)

    def passes(self, params: list[nn.Parameter], at: At) -> Any:
        yield
        kept = [shards.local(p).clone() for p in params]
        try:
            for p in params:
                if p.grad is not None:
                    shards.local(p).add_(shards.local(p.grad), alpha=0.05)
            yield
        finally:
            for p, value in zip(params, kept):
                shards.local(p).copy_(value)


def sentences(count: int = 64) -> tuple[Tensor, Tensor]:
    """Tokens (count, 8) and the next ones, of which some rows ignore many and others none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 13, (count, 9), generator=generator)
    ignored = torch.rand(count, 8, generator=generator) < torch.rand(count, 1, generator=generator) ** 3
    return tokens[:, :-1], tokens[:, 1:].masked_fill(ignored, -100)


def pictures(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 8, 8) and classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (count,), generator=generator)


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(13, 8, width=16, depth=2, heads=2).double()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(3, 4, widths=(4, 8)).double()


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def hsdp(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def alone(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Case:
    """A recipe on a net, and how it is cut."""

    recipe: Recipe
    net: Callable[[], nn.Module] = gpt
    data: Callable[[], tuple[Tensor, Tensor]] = sentences
    loss: Any = next_token_loss
    steps: int = STEPS
    batch: int = 16
    microbatch: int | None = None


def curve(case: Case, wrap: Callable[[Any], nn.Module], slices: int | None = None) -> dict[str, Any]:
    """Losses of all steps, over all ranks, then predictions and full weights at the end."""
    inputs, targets = case.data()
    model = wrap(case.recipe.model(case.net()))
    plan = Plan(case.recipe, len(inputs), case.batch, steps=case.steps, slices=slices)
    update = Updater(case.recipe, model, case.loss, plan, microbatch=case.microbatch)
    losses = []
    for at in plan:
        index = plan.indices(at)
        total = torch.zeros((), dtype=torch.float64)
        for part in update(Batch(inputs[index], targets[index]), at):
            loss = update.loss(model(part.inputs), part.targets)
            loss.backward()
            if update.round == 0:
                total += loss.detach()
        losses.append(total)
    found = torch.stack(losses)
    if plan.group is not None:
        dist.all_reduce(found, group=plan.group)
    with update.evaluating(plan.calibration(TensorDataset(inputs, targets), 2)) as predict:
        outputs = predict(inputs[:8])
    state = update.state_dict()
    return {
        "losses": found / plan.ranks, "outputs": outputs, "examples": state["examples"],
        "model": {name: shards.whole(value).clone() for name, value in state["model"].items()},
    }  # fmt: skip


def assert_equal(case: Case, wrap: Callable[[Any], nn.Module], count: int) -> None:
    """On so many ranks as in one process with as many slices."""
    expected = curve(case, alone, count)
    assert expected["losses"].isfinite().all() and expected["losses"].std() > 1e-3
    for found in ranks.run(curve, count, case, wrap):
        assert_same(found, expected)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=1e-8)
    torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=0, atol=1e-7)
    assert found["examples"] == expected["examples"] and found["model"].keys() == expected["model"].keys()
    for name, value in found["model"].items():
        torch.testing.assert_close(value, expected["model"][name], rtol=0, atol=1e-7)


FULL = Recipe(AdamW(lr=1e-2), WarmupStableDecay(), LabelSmoothing(0.1), Swap(), Shadow())


@pytest.mark.parametrize(
    ("wrap", "count"), [(ddp, 2), (fsdp, 2), pytest.param(fsdp, 4, marks=pytest.mark.slow)]
)
def test_ranks_equal_slices(wrap, count):
    """Means taken rank by rank of tokens that are counted unevenly; draws of local rows."""
    assert_equal(Case(FULL), wrap, count)


@pytest.mark.parametrize(("wrap", "count"), [(ddp, 2), (fsdp, 2), (hsdp, 4)])
def test_micro_batches_change_nothing(wrap, count):
    """Gradients reduced once too often, or of the last micro-batch only."""
    assert_equal(Case(FULL, steps=6, microbatch=3), wrap, count)


@pytest.mark.parametrize("wrap", [ddp, fsdp])
@pytest.mark.parametrize("uneven", [False, True])
def test_selected_examples_count_alike_on_all_ranks(wrap, uneven):
    """Examples of a rank that keeps few weighing more; a forward without backward that breaks the next one."""
    assert_equal(Case(FULL + Hardest(uneven), steps=8), wrap, 2)


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_both_passes_of_an_ascent_reduce_gradients(wrap):
    """A way up that each rank finds for itself; gathered weights that are not those moved."""
    assert_equal(Case(FULL + Ascend(), steps=6, microbatch=4), wrap, 2)


def test_clipping_is_by_the_norm_over_all_ranks():
    """Gradients clipped before they are reduced."""
    assert_equal(Case(FULL + GradientClipping(0.1), steps=10), ddp, 2)


IMAGES = functools.partial(Case, net=resnet, data=pictures, loss=F.cross_entropy, steps=20)


@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_batch_norm_of_ranks_is_that_of_slices(wrap, microbatch):
    """Running statistics of rank 0 alone; those of the last slice weighing most; evaluation that differs by rank."""
    assert_equal(IMAGES(Recipe(AdamW(lr=1e-2), MixUp(0.4), Shadow()), microbatch=microbatch), wrap, 2)


def test_batch_norm_without_averages_is_merged_too():
    """Statistics that are merged only where weights are averaged."""
    assert_equal(IMAGES(Recipe(AdamW(lr=1e-2)), batch=8), ddp, 4)


@pytest.mark.parametrize("case", [Case(FULL, steps=10), IMAGES(Recipe(AdamW(lr=1e-2), Shadow()))])
def test_two_slices_a_rank_equal_four_ranks(case):
    """Fewer ranks than a run began with, which go another way."""
    expected = curve(case, alone, 4)
    for found in ranks.run(curve, 2, case, ddp, 4):
        assert_same(found, expected)


# -- the user's own loop


def own_loop(wrap: Callable[[Any], nn.Module], slices: int | None = None) -> tuple[Tensor, Tensor]:
    recipe = Recipe(AdamW(lr=1e-2), MixUp(0.2), LabelSmoothing(0.1), WarmupStableDecay(), Shadow())
    inputs, targets = pictures()
    data = recipe.data(TensorDataset(inputs, targets))
    plan = Plan(recipe, examples=len(data), batch=16, epochs=3, slices=slices)
    loader: DataLoader[Any] = DataLoader(data, batch_sampler=plan.batches())
    model = wrap(recipe.model(resnet()))
    update = Updater(recipe, model, F.cross_entropy, plan)
    for at, (images, labels) in zip(plan, loader):
        for part in update(Batch(images, labels), at):
            update.loss(model(part.inputs), part.targets).backward()
    with update.evaluating(plan.calibration(data)) as predict:
        outputs = predict(inputs[:8])
    weights = [shards.whole(p).flatten() for p in unwrap(model).parameters()]
    return outputs, torch.cat(weights).detach()


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_the_users_own_loop_runs_as_it_is_written(wrap):
    """A loop that has to know on how many ranks it runs."""
    expected = own_loop(alone, 2)
    for found in ranks.run(own_loop, 2, wrap):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
