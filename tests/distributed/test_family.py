"""One process = DDP = FSDP2 = HSDP = TP = TP x FSDP, for every member of the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stretto.optim import SOAP, KLShampoo, Muon, NorMuon, OneSidedShampoo, Shampoo, SOAPMuon

FAMILY: dict[str, Callable[..., Shampoo]] = {
    "root": Shampoo,
    "eigen": lambda params, **options: Shampoo(params, direction="eigen", **options),
    "soap": SOAP,
    "kl": KLShampoo,
    "one_sided": OneSidedShampoo,
    "muon": Muon,
    "normuon": NorMuon,
    "soapmuon": SOAPMuon,
    "diagonal": lambda params, **options: Shampoo(params, direction="diagonal", **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"every": 3, "block": 8, "weight_decay": 0.1},
    "clipped": {"every": 2, "block": 6, "clip": 0.05, "momentum": 0.9, "merge": "matrix"},
    "split": {"every": 2, "block": 8, "split": 2, "decay": "l2", "weight_decay": 0.1},
}
STEPS = 10


class Net(nn.Module):
    """Shapes of every kind: even and uneven, shorter than the ranks, kernels, vectors, a table, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = {
            "wte": (40, 6), "square": (16, 16), "tall": (18, 5), "wide": (4, 22), "kernel": (6, 4, 3, 3),
            "bias": (7,), "short": (1, 9), "pair": (2, 3), "scale": (1,),
        }  # fmt: skip
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in Net().named_parameters()
    }


def spread(model: Net, parallel: str) -> Any:
    """Place the model's parameters; what a DDP run would give as its group, else None."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if parallel == "one":
        return None
    if parallel == "ddp":
        return dist.group.WORLD
    if parallel == "small groups":
        return dist.new_subgroups(ranks // 2)[0]
    if parallel == "fsdp":
        fully_shard(model)
    elif parallel == "hsdp":
        fully_shard(
            model, mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        )
    else:
        names = ("dp", "tp") if parallel == "tp+fsdp" else ("tp",)
        mesh = init_device_mesh(
            "cpu", (2, ranks // 2)[: len(names)] if len(names) > 1 else (ranks,), mesh_dim_names=names
        )
        plan = {"square": Shard(1), "tall": Shard(0), "wide": Shard(1), "wte": Shard(1), "kernel": Shard(0)}
        for name, p in list(model.named_parameters()):
            value = distribute_tensor(p.detach(), mesh["tp"], [plan.get(name, Replicate())])
            model.register_parameter(name, nn.Parameter(value))
        if parallel == "tp+fsdp":
            fully_shard(model, mesh=mesh["dp"])
    return None


def give(model: nn.Module, found: dict[str, Tensor], skip: Any = None) -> None:
    for name, p in model.named_parameters():
        grad = found[name]
        if isinstance(p, DTensor):
            local = placed(grad, p)
            grad = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        p.grad = None if skip is not None and skip(name) else grad


def placed(value: Tensor, p: DTensor) -> Tensor:
    """This rank's part, found without stretto."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    for dim, (start, size) in enumerate(zip(offset, shape)):
        value = value.narrow(dim, start if size else 0, size)
    return value.clone()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train(member: str, options: str, parallel: str, steps: int = STEPS) -> dict[str, Tensor]:
    model = Net()
    group = spread(model, parallel)
    params = [(name, p) for name, p in model.named_parameters() if options != "split" or p.shape[0] % 2 == 0]
    optimizer = FAMILY[member](params, lr=0.01, process_group=group, **OPTIONS[options])
    for step in range(steps):
        give(model, gradients(step))
        optimizer.step()
    return whole(model)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-6) -> None:
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error <= bound, f"{name} is {error:.2e} off"


@pytest.mark.parametrize(
    "parallel, ranks",
    [
        ("ddp", 2),
        ("ddp", 4),
        ("small groups", 4),
        ("fsdp", 1),
        ("fsdp", 2),
        ("fsdp", 4),
        ("hsdp", 4),
        ("tp", 2),
        ("tp+fsdp", 4),
    ],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_parallelism_steps_as_one_process(parallel: str, ranks: int, options: str) -> None:
    members = [member for member in FAMILY if options != "split" or member in ("root", "soap", "muon")]

    def everyone() -> list[dict[str, Tensor]]:
        return [train(member, options, parallel) for member in members]

    found = run(everyone, ranks)
    for number, member in enumerate(members):
        expected = train(member, options, "one")
        for theirs in found:
            assert_close(theirs[number], expected)
