"""A GradScaler over ranks: an infinity that one of them sees makes all of them skip, as one process would."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from test_slices import gpt, sentences
from torch import Tensor

from stretto import shards
from stretto.core import Batch, Recipe
from stretto.methods import AdamW, GradientClipping
from stretto.models.gpt import next_token_loss
from stretto.plan import Plan
from stretto.train.parallel import Execution, parallelize
from stretto.update import Updater

STEPS = 8
BAD = 3  # the step whose gradients overflow in one place


def overflow(model: Any) -> None:
    """An infinity in the last entries of a block's matrix, wherever they lie."""
    weight = dict(model.named_parameters())["blocks.1.mlp.input.weight"]
    grad = shards.local(weight.grad)
    if dist.is_initialized() and shards.is_sharded(weight) and dist.get_rank() < dist.get_world_size() - 1:
        return
    grad[-1] = torch.inf


def run(parallel: Any, slices: int | None = None) -> tuple[Tensor, list[float]]:
    """Losses and scales of all steps."""
    inputs, targets = sentences()
    recipe = Recipe(AdamW(lr=1e-2), GradientClipping(0.1))
    execution = Execution(parallel, "float64", device="cpu")
    mesh = execution.mesh()
    model = parallelize(recipe.model(gpt()), execution, mesh)
    plan = Plan(recipe, len(inputs), 16, steps=STEPS, mesh=mesh, slices=slices)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    update = Updater(recipe, model, next_token_loss, plan, scaler=scaler)
    losses, scales = [], []
    for at in plan:
        index = plan.indices(at)
        for part in update(Batch(inputs[index], targets[index]), at):
            loss = update.loss(model(part.inputs), part.targets)
            loss.backward()
            losses.append(loss.detach())
            if at.step == BAD:
                overflow(update.model)
        scales.append(scaler.get_scale())
    found = torch.stack(losses)
    if plan.group is not None:
        dist.all_reduce(found, group=plan.group)
    return found / plan.ranks, scales


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_one_infinity_stops_all_ranks(parallel):
    """Ranks that skip each for itself, and go on with different weights and scales."""
    losses, scales = run("none", 1)
    assert scales == [1024, 1024, 2048, 1024, 1024, 1024, 2048, 2048]
    for found, theirs in ranks.run(run, 2, parallel):
        assert theirs == scales
        torch.testing.assert_close(found, losses, rtol=0, atol=1e-8)
