"""First values on several ranks: those of one process, on every shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stretto import shards
from stretto.core import Batch, Phase, Recipe, StartMethod
from stretto.methods import AdamW, DiracInit, PatchWhitening, ZeroInitResidual
from stretto.models.resnet import ResNet
from stretto.plan import Plan
from stretto.update import Updater, unwrap

RECIPE = Recipe(AdamW(), PatchWhitening(), DiracInit(), ZeroInitResidual())
Wrapped = tuple[nn.Module, DeviceMesh | None]


def net() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(3, 4, widths=(4, 6)).double()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (8,), generator=generator)


def alone(model: Any) -> Wrapped:
    return model, None


def ddp(model: Any) -> Wrapped:
    return DistributedDataParallel(model), None


def fsdp(model: Any) -> Wrapped:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model), None


def tensor_parallel(model: Any) -> Wrapped:
    """Matrices cut along their second side, kernels too, vectors replicated: as DTensors, which is all that counts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            placement = Shard(1) if p.ndim > 1 else Replicate()
            t = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
            setattr(module, name, nn.Parameter(t, p.requires_grad))
    return model, mesh


def started(wrap: Callable[[Any], Wrapped], recipe: Recipe = RECIPE, **more: Any) -> dict[str, Tensor]:
    """Full weights after the start, of ranks that were given different rows."""
    model, mesh = wrap(recipe.model(net()))
    images, classes = batch()
    plan = Plan(recipe, 8, 8, steps=1, mesh=mesh, **more)
    update = Updater(recipe, model, F.cross_entropy, plan)
    at = plan.at(0)
    index = plan.indices(at)
    for _ in update(Batch(images[index], classes[index]), at):
        break  # nothing is left of the step but the start
    return {name: shards.whole(p.detach()).clone() for name, p in unwrap(model).named_parameters()}


@pytest.mark.parametrize(
    ("wrap", "count", "slices"),
    [(ddp, 2, 2), (fsdp, 2, 2), (fsdp, 4, 4), (tensor_parallel, 2, 1)],
)
def test_the_start_is_that_of_one_process(wrap, count, slices):
    """Whitening of each rank's own rows; zeros in place of ones, where a shard is taken for the whole."""
    expected = started(alone, slices=slices)
    before = dict(RECIPE.model(net()).named_parameters())
    changed = [name for name, value in expected.items() if not torch.equal(value, before[name])]
    assert {"stem.whitening.weight", "blocks.0.conv1.weight", "blocks.1.norm2.weight"} <= set(changed)
    for found in ranks.run(started, count, wrap):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@dataclass(frozen=True)
class OwnValues(StartMethod):
    """What each rank finds for itself."""

    phases = (Phase.FIT,)

    def start(self, model: nn.Module, weights: Any, sample: Any) -> Any:
        assert set(weights) == {name for name, _ in model.named_parameters()}
        value = weights["head.weight"]
        assert not isinstance(value, DTensor) and value.shape == (4, 6)
        yield "head.weight", torch.full_like(value, 1.0 + dist.get_rank()).T.contiguous().T


@pytest.mark.parametrize("wrap", [ddp, fsdp, tensor_parallel])
def test_rank_0_decides(wrap):
    """Ranks that begin with different weights, because their machines round differently."""
    for found in ranks.run(started, 2, wrap, Recipe(AdamW(), OwnValues())):
        assert torch.equal(found["head.weight"], torch.ones(4, 6, dtype=torch.float64))


SEEN: list[Tensor] = []  # by this process


@dataclass(frozen=True)
class Look(StartMethod):
    """Notes the sample that it is given."""

    phases = (Phase.FIT,)

    def start(self, model: nn.Module, weights: Any, sample: Any) -> Any:
        SEEN.append(sample["image"])
        yield "head.bias", weights["head.bias"]


def sample_seen() -> list[Tensor]:
    recipe = Recipe(AdamW(), Look())
    plan = Plan(recipe, 8, 8, steps=1)
    update = Updater(recipe, net(), F.cross_entropy, plan)
    own = torch.full((4, 2 + dist.get_rank()), 3.0 + dist.get_rank(), dtype=torch.float64)
    for _ in update(Batch({"image": own}, torch.zeros(4, dtype=torch.int64)), plan.at(0)):
        break
    return SEEN


def test_all_ranks_see_the_sample_of_rank_0_also_where_theirs_is_longer():
    """A sample of each rank's own rows; a broadcast into a tensor of another shape."""
    for [seen] in ranks.run(sample_seen, 2):
        assert torch.equal(seen, torch.full((4, 2), 3.0, dtype=torch.float64))
