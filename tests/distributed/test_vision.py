"""Every method that can be used with our ResNet: two ranks equal one process that acts as two slices."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_slices import Case, alone, assert_same, curve, ddp, fsdp, pictures
from torch import Tensor, nn

from stretto import methods
from stretto.core import Recipe
from stretto.methods import EMA, AdamW
from stretto.models.resnet import ResNet
from stretto.train.parallel import Execution, parallelize

RECIPES = [
    "adamw, blur_pool:min_channels=4, squeeze_excite:min_channels=8:latent=2, weight_standardization, ema",
    "adamw, ghost_batch_norm:size=4, cutmix, label_smoothing, swa:start=0.3",
    "adamw, ghost_batch_norm:size=3, progressive_resizing, alternating_flip, fix_res:scale=1.5",
    "adamw, channels_last, stochastic_depth:drop=0.4, rand_augment, cutout",
    "adamw, patch_whitening, mixup, colout, type_rates:batch_norm_bias=4, warmup_stable_decay",
    "adamw, factorize:min_size=4:share=0.5, aug_mix, binary_cross_entropy, gradient_clipping:norm=0.1",
    "adamw, stochastic_depth:drop=0.4:by=batch, progressive_resizing:by=crop, test_time_augmentation",
    "adamw, progressive_layer_drop, sam:every=2, zero_init_residual",
    "adamw, layer_freezing:start=0.3, dirac_init, selective_backprop:start=0.2, z_loss",
    "adamw, either:first=mixup:second=cutmix, batch_size_warmup, adaptive_gradient_clipping, logit_soft_cap",
    "sgd, bfloat16, lookahead:every=2", "muon, hyperball, mixup", "shampoo, schedule_free", "soap", "lion",
]  # fmt: skip


def resnet() -> nn.Module:
    """Two stages, each with a block that keeps its shape."""
    torch.manual_seed(0)
    return ResNet(3, 4, widths=(4, 8), blocks_per_stage=2).double()


IMAGES = functools.partial(Case, net=resnet, data=pictures, loss=F.cross_entropy)


@functools.cache
def curves(parallel: Any, slices: int | None = None) -> list[Any]:
    """Of each recipe, or what it raised."""
    execution = Execution(parallel, device="cpu")
    spread = functools.partial(parallelize, execution=execution, mesh=execution.mesh())
    found: list[Any] = []
    for text in RECIPES:
        try:
            recipe = methods.parse(text)
            unused = any(method.leaves_unused for method in recipe.methods)
            wrap = functools.partial(spread, leaves_unused=unused)
            found.append(curve(IMAGES(recipe, steps=5), wrap, slices))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_equal_two_slices(parallel):
    """Sizes, patterns and draws that each rank finds for itself."""
    expected = curves("none", 2)
    wrong = Counter[str]()
    for found in ranks.run(curves, 2, parallel, seconds=200):
        for text, mine, theirs in zip(RECIPES, found, expected):
            try:
                assert not isinstance(theirs, str), theirs
                assert not isinstance(mine, str), mine
                assert_same(mine, theirs)
            except AssertionError as error:
                wrong[f"{text}: {error}"] += 1
    assert not wrong, "\n".join(wrong)


# -- batch norm over all ranks


class SumOverRanks(torch.autograd.Function):
    """A sum whose gradient is one too."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        dist.all_reduce(total := mine.clone())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.apply(gradient)


class Joint(nn.BatchNorm2d):
    """What torch's SyncBatchNorm computes, which knows GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean, square = SumOverRanks.apply(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])) / count
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        mean, scale, bias = (
            t[:, None, None] for t in (mean, self.weight * (var + self.eps).rsqrt(), self.bias)
        )
        return (x - mean) * scale + bias


def with_joint_norms(wrap: Any, model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = Joint
    return wrap(model)


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_norms_over_all_ranks_are_those_of_a_single_slice(wrap):
    """Statistics of slices where all rows were meant; those of all ranks averaged or re-estimated wrongly."""
    case = IMAGES(Recipe(AdamW(lr=1e-2), EMA()), steps=10)
    expected = curve(case, alone, 1)
    for found in ranks.run(curve, 2, case, functools.partial(with_joint_norms, wrap)):
        assert_same(found, expected)
