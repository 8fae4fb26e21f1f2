"""Steps that are left, skipped, saved and resumed on several ranks; what is sent in one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_slices import FULL, Ascend, Shadow, ddp, fsdp, gpt, pictures, resnet, sentences
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stretto import shards
from stretto.core import Batch, Recipe
from stretto.methods import AdamW, Lookahead, MixUp
from stretto.models.gpt import next_token_loss
from stretto.plan import Plan
from stretto.update import Updater, unwrap


def on_sentences(wrap: Any, recipe: Recipe, **more: Any) -> tuple[Updater, Any]:
    model = wrap(recipe.model(gpt()))
    plan = Plan(recipe, 64, 16, steps=6)
    return Updater(recipe, model, next_token_loss, plan, **more), model


def step(update: Updater, model: nn.Module) -> None:
    inputs, targets = sentences()
    at = update.plan.at(update.step)
    index = update.plan.indices(at)
    for part in update(Batch(inputs[index], targets[index]), at):
        update.loss(model(part.inputs), part.targets).backward()


def full_weights(model: nn.Module) -> Tensor:
    return torch.cat([shards.whole(p.detach()).flatten() for p in unwrap(model).parameters()])


# -- leaving and skipping


class Torn(nn.Module):
    """Fails once when it is told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise MemoryError
        return x


def leave(update: Updater, model: nn.Module, parts: int, how: str) -> None:
    """Run so many parts, then leave before a forward, before a backward, or by a fault within a forward."""
    inputs, targets = sentences()
    at = update.plan.at(update.step)
    index = update.plan.indices(at)
    for number, part in enumerate(update(Batch(inputs[index], targets[index]), at)):
        if number == parts and how == "before":
            break
        loss = update.loss(model(part.inputs), part.targets)
        if number == parts:
            break
        loss.backward()


def left_early(wrap: Any, parts: int, how: str) -> list[Any]:
    found = []
    for leaves in (False, True):
        recipe = FULL + Ascend()
        net = gpt()
        net.norm = nn.Sequential(net.norm, torn := Torn())  # type: ignore[arg-type]
        model = wrap(recipe.model(net))
        update = Updater(recipe, model, next_token_loss, Plan(recipe, 64, 16, steps=6), microbatch=3)
        step(update, model)
        if leaves and how != "fault":
            leave(update, model, parts, how)
        elif leaves:
            torn.fails = True
            with pytest.raises(MemoryError):
                leave(update, model, parts, how)
            torn.fails = False
        assert update.step == 1 and all(p.grad is None for p in unwrap(model).parameters())
        step(update, model)
        step(update, model)
        found.append(full_weights(model))
    return found


@pytest.mark.parametrize("wrap", [ddp, fsdp])
@pytest.mark.parametrize(
    ("parts", "how"), [(0, "after"), (1, "before"), (1, "after"), (3, "before"), (4, "after"), (0, "fault")]
)
def test_a_step_that_was_left_leaves_no_trace(wrap, parts, how):
    """Gradients of a micro-batch, or weights gathered on the way up, that enter the next step."""
    for stayed, left in ranks.run(left_early, 2, wrap, parts, how):
        assert torch.equal(stayed, left)


def skipped() -> Any:
    update, model = on_sentences(fsdp, FULL)
    before = full_weights(model)
    inputs, targets = sentences()
    at = update.plan.at(0)
    index = update.plan.indices(at)
    for part in update.passes(Batch(inputs[index], targets[index]), at):
        update.loss(model(part.inputs), part.targets).backward()
    bad = torch.tensor(dist.get_rank() == 1)
    if update.agreed(bad):
        update.skip()
    step(update, model)
    return (
        torch.equal(before, full_weights(model)),
        update.step,
        update.agreed(torch.tensor([1.5, dist.get_rank()])),
    )


def test_what_one_rank_finds_all_do():
    """A rank that skips alone, and waits for the others in the next step for ever."""
    for same, steps, largest in ranks.run(skipped, 2):
        assert not same and steps == 2 and largest.tolist() == [1.5, 1.0]


def agreed_over_a_mesh() -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    recipe = Recipe(AdamW())
    plan = Plan(recipe, 64, 16, steps=1, mesh=mesh)
    assert plan.ranks == 2 and plan.rank == dist.get_rank() // 2
    update = Updater(recipe, gpt(), next_token_loss, plan)
    return update.agreed(torch.tensor(float(dist.get_rank()))).item()


def test_tensor_parallel_ranks_agree_too():
    """An infinity in the shard of one rank of a tensor-parallel pair."""
    assert ranks.run(agreed_over_a_mesh, 4) == [3.0] * 4


# -- saving and going on


def resumed(wrap: Any) -> Any:
    recipe = Recipe(AdamW(lr=1e-2), MixUp(0.4), Shadow())
    inputs, targets = pictures()

    def fresh() -> tuple[Updater, nn.Module]:
        model = wrap(recipe.model(resnet()))
        return Updater(recipe, model, F.cross_entropy, Plan(recipe, 64, 16, steps=6)), model

    def go(update: Updater, model: nn.Module, steps: int) -> None:
        for number in range(update.step, update.step + steps):
            at = update.plan.at(number)
            index = update.plan.indices(at)
            for part in update(Batch(inputs[index], targets[index]), at):
                update.loss(model(part.inputs), part.targets).backward()

    whole, model = fresh()
    go(whole, model, 3)
    state = whole.state_dict()
    sharded = [isinstance(value, DTensor) for value in state["state"]["shadow"].values()]
    file = io.BytesIO()
    torch.save(state, file)
    go(whole, model, 3)
    second, other = fresh()
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    kept = [isinstance(value, DTensor) for value in second.state["shadow"].values()]
    go(second, other, 3)
    ends = [update.state_dict() for update in (whole, second)]
    models, averages = (
        ([*end["model"].values()] for end in ends),
        (end["state"]["shadow"].values() for end in ends),
    )
    same = [
        all(torch.equal(shards.local(a), shards.local(b)) for a, b in zip(*both))
        for both in (models, averages)
    ]
    return same, sharded, kept


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(wrap):
    """Averages that become whole tensors on each rank; statistics of rank 0 for all."""
    for same, sharded, kept in ranks.run(resumed, 2, wrap):
        assert all(same) and sharded == kept and set(sharded) == {wrap is fsdp}


# -- what is sent


def reductions() -> list[int]:
    buckets = []

    def hook(state, bucket):  # torch reads annotations, and wants none that are texts
        buckets.append(bucket.index())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    update, model = on_sentences(ddp, FULL + Ascend(), microbatch=3)
    assert isinstance(model, DistributedDataParallel)
    model.register_comm_hook(None, hook)
    step(update, model)
    sharded, other = on_sentences(fsdp, FULL + Ascend(), microbatch=3)
    scattered: list[int] = []
    for module in sharded.wrapping.sharded:
        module.set_all_reduce_hook(
            lambda reduced: scattered.append(len(reduced))
        )  # after each reduce-scatter
    step(sharded, other)
    return [len(buckets), len(scattered)]


def test_gradients_are_reduced_once_a_pass():
    """Micro-batches that each pay for the wire."""
    assert ranks.run(reductions, 2) == [[2, 2 * 3]] * 2  # two passes; two blocks and what is around them


class Sharing(torch.optim.SGD):
    """Notes with whom it shares its work."""

    group: Any = None

    def share(self, group: Any) -> None:
        self.group = group


def shared() -> bool:
    recipe = Recipe(Lookahead())
    model = ddp(gpt())
    optimizer = Sharing(model.parameters(), lr=0.1)
    Updater(recipe, model, next_token_loss, Plan(recipe, 64, 16, steps=1), optimizer=optimizer)
    return optimizer.group is model.process_group


def test_the_innermost_optimizer_is_asked_to_share_its_work():
    """A wrapper's method of the same name, called with a group of ranks."""
    assert all(ranks.run(shared, 2))


# -- bad input


def misfits() -> None:
    with pytest.raises(
        ValueError, match=r"3 slices cannot be shared equally by 2 ranks; give slices= a multiple"
    ):
        Plan(Recipe(), 64, 12, steps=1, slices=3)
    with pytest.raises(ValueError, match=r"a batch of 15 cannot be cut into 2 equal slices"):
        Plan(Recipe(), 64, 15, steps=1)
    update, _ = on_sentences(ddp, FULL)
    with pytest.raises(ValueError, match="takes 8 examples of each rank and was given 16"):
        next(update(Batch(*(t[:16] for t in sentences())), update.plan.at(0)))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(ValueError, match=r"2 ranks share .* plan .* 1 rank"):
        Updater(FULL, ddp(gpt()), next_token_loss, Plan(FULL, 64, 16, steps=1, mesh=mesh))


def test_what_does_not_fit_is_refused_on_every_rank():
    """Rows that nobody trains on, or that two ranks do."""
    ranks.run(misfits, 2)
