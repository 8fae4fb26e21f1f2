"""Bad input to the Shampoo family over ranks: the same error on every rank, and no hang."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_family import FAMILY, Net, give, gradients, spread, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from stretto.optim import Shampoo
from stretto.optim.exchange import local


def refused(ranks: int, *calls: Callable[[], Any]) -> list[str]:
    """The text of the ValueError that each call raises, the same on every rank."""
    found = run(lambda: [text(call) for call in calls], ranks)
    assert all(theirs == found[0] for theirs in found), found
    return found[0]


def text(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def step(model: nn.Module, group: Any = None, **options: Any) -> Shampoo:
    """One step of a model whose gradients are its weights."""
    optimizer = Shampoo(model.named_parameters(), lr=0.01, process_group=group, **options)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    return optimizer


class Odd(nn.Module):
    """Two matrices and a vector; the last rank has something else."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        odd = odd if last() else ""
        dtype = torch.float32 if odd == "dtype" else torch.float64
        self.first = nn.Parameter(torch.ones(8, 6 if odd == "shape" else 4, dtype=dtype))
        self.second = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
        if odd != "number":
            self.third = nn.Parameter(torch.ones(5, dtype=torch.float64))
        if odd == "frozen":
            self.second.requires_grad_(False)


def odd(parallel: str, how: str) -> None:
    model = Odd(how)
    group = spread(model, parallel)
    step(model, group, block=4 if how == "options" and last() else 8)


WRONG = {
    "shape": "rank 1 has first of shape (8, 6), torch.float64, cut along {cuts} where rank 0 has first of shape (8, 4)",
    "dtype": "rank 1 has first of shape (8, 4), torch.float32, cut along {cuts} where rank 0 has first of shape (8, 4)",
    "number": "rank 1 has 2 parameters and rank 0 has 3",
    "frozen": "rank 1 has second of shape (6, 4), torch.float64, cut along {cuts}, frozen where rank 0 has second of",
    "options": "rank 1 has block=4 in group 0 where rank 0 has block=8 in group 0",
}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_that_sees_another_model_is_named_on_every_rank(parallel: str) -> None:
    """Pieces of other sizes than expected, which hang or end in gloo's own words."""
    for found, wrong in zip(refused(2, *(partial(odd, parallel, how) for how in WRONG)), WRONG.values()):
        assert found.startswith(wrong.format(cuts=[] if parallel == "ddp" else [0]))
        assert found.endswith("every rank must be given the same model and the same options")


# -- too late


def added_too_late() -> None:
    model = Net()
    group = spread(model, "ddp")
    optimizer = step(model, group)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})


def shared_too_late() -> None:
    step(Net()).share(dist.group.WORLD)


def test_what_comes_after_the_layout_is_refused() -> None:
    added, shared = refused(2, added_too_late, shared_too_late)
    assert added.startswith("a parameter group was added after the ranks settled who owns which blocks; give")
    assert shared.startswith("share() was called after the first step; who owns which blocks is settled then")


# -- placements


def falling_mesh() -> None:
    mesh = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("replicate", "shard"))
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=mesh)
    step(model)


def test_a_mesh_that_does_not_rise_is_refused_on_the_ranks_that_do_rise_too() -> None:
    """Ranks 0 and 1 wait for 2 and 3, which have raised."""
    expected = "the mesh [[0, 1], [3, 2]] has ranks that do not rise along its dims; sort them"
    assert refused(4, falling_mesh) == [expected]


def rounds_by_chance(parallel: str) -> None:
    model = Net().bfloat16()
    group = spread(model, parallel)
    step(model, group, rounding="stochastic")


def test_replicas_do_not_round_by_chance() -> None:
    for found in refused(4, partial(rounds_by_chance, "ddp"), partial(rounds_by_chance, "hsdp")):
        assert found.startswith("rounding is 'stochastic' and wte is the same on several ranks, which would")
    run(rounds_by_chance, 2, "fsdp")


def cut_where_merged(ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    kernel = nn.Parameter(distribute_tensor(torch.ones(6, 4, 3, 3), mesh, [Shard(2)]))
    kernel.grad = kernel.detach().clone()
    Shampoo([("kernel", kernel)], lr=0.01).step()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_cut_within_merged_dims_is_refused_on_ranks_with_an_empty_shard_too(ranks: int) -> None:
    """The fourth of four ranks has none of three rows, and nothing that it could find wrong."""
    (found,) = refused(ranks, partial(cut_where_merged, ranks))
    assert found.startswith(
        "kernel of shape (6, 4, 3, 3) is sharded along a dimension that Shampoo merges with"
    )
    assert found.endswith("give its group merge='none'")


# -- gradients and refreshes


def not_finite(parallel: str, steps: list[bool]) -> tuple[dict[str, Tensor], int]:
    """The last rank has a gradient that is not finite, in some steps."""
    model = Net()
    group = spread(model, parallel)
    optimizer = FAMILY["soap"](model.named_parameters(), lr=0.01, every=2, process_group=group)
    for number, is_bad in enumerate(steps):
        give(model, gradients(number))
        if is_bad and (last() if dist.is_initialized() else True):
            local(model.square.grad).fill_(torch.inf)
        optimizer.step()
    return whole(model), optimizer.skipped


@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 2), ("fsdp", 2), ("tp+fsdp", 4)])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(parallel: str, ranks: int) -> None:
    """Counters that differ, and a rank that raises while the others wait for it."""
    steps = [False, True, False, True, True, False]
    expected, skipped = not_finite("one", steps)
    assert skipped == 3
    for weights, theirs in run(not_finite, ranks, parallel, steps):
        assert theirs == skipped
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)
    (found,) = refused(ranks, partial(not_finite, parallel, [False, True, True, True]))
    assert found.startswith("3 steps in a row had a gradient that is not finite, last in square;")


def unrefreshed(root: str) -> None:
    """The factor of one block cannot be inverted, on the rank that owns it."""
    model = nn.ParameterDict({name: torch.ones(6, 4, dtype=torch.float64) for name in ("a", "b")})
    optimizer = Shampoo(
        model.named_parameters(), lr=0.01, every=2, root=root, process_group=dist.group.WORLD, max_skips=2
    )
    for number in range(8):
        for i, p in enumerate(model.values()):
            p.grad = torch.randn(
                6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9 * number + i)
            )
        optimizer.step()
        factor = optimizer.state[model["b"]]["factor0"]
        if len(factor):
            factor.fill_(torch.nan)


def test_refreshes_that_fail_on_the_owner_alone_stop_every_rank() -> None:
    """An owner that raises while the others wait for its steps; eigenvalues of nothing taken for those of zeros."""
    for found in refused(2, *(partial(unrefreshed, root) for root in ("eigh", "newton", "qr"))):
        assert re.match(r"the factors of b could not be refreshed \d times in a row; raise ridge_eps", found)
