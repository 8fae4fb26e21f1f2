"""Shards of every kind of mesh, against the tensor that they were cut from."""

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from stretto import shards

R, S0, S1 = Replicate(), Shard(0), Shard(1)
MESHES = [
    ((2,), (S0,)),
    ((2,), (S1,)),
    ((2,), (R,)),
    ((4,), (S0,)),
    ((4,), (S1,)),
    ((2, 2), (R, S0)),
    ((2, 2), (S0, S1)),
    ((2, 2), (S0, S0)),
    ((2, 2), (R, R)),
    ((2, 2), (_StridedShard(0, split_factor=2), S0)),
    ((2, 2), (_StridedShard(1, split_factor=2), S1)),
]
SHAPES = [(8, 4), (5, 3), (7, 5), (1, 6), (3, 1)]  # even, uneven, and with ranks that hold nothing


def values(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut_and_back(shape, placements):
    mesh = init_device_mesh("cpu", shape)
    found = []
    for size in SHAPES:
        full = values(size)
        t = distribute_tensor(full, mesh, placements, src_data_rank=None)
        empty = torch.zeros_like(t)
        held = shards.local(empty)
        shards.write(empty, full)
        assert held.data_ptr() == shards.local(empty).data_ptr()
        found.append([
            torch.equal(shards.local(empty), t.to_local()),
            torch.equal(shards.whole(empty), full),
            float(shards.norm([t]) - full.norm()),
        ])  # fmt: skip
    return found


@pytest.mark.parametrize(("mesh", "placements"), MESHES, ids=str)
def test_what_is_written_is_what_torch_cuts(mesh, placements):
    """A shard of other rows than torch's; a norm that counts replicas twice, or a double cut in another order."""
    for found in ranks.run(cut_and_back, torch.Size(mesh).numel(), mesh, placements):
        for size, (written, gathered, distance) in zip(SHAPES, found):
            assert written and gathered and abs(distance) < 1e-12, size


def joint():
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = [values((5, 3), seed) for seed in range(6)]
    layouts = [
        (line, (S0,)),
        (square, (S0, R)),
        (square, (S0, S1)),
        (square, (R, S1)),
        (square, (R, R)),
        None,
    ]
    tensors = [
        value if layout is None else distribute_tensor(value, *layout, src_data_rank=None)
        for value, layout in zip(full, layouts)
    ]
    everything = torch.cat([value.flatten() for value in full]).norm()
    found = shards.norm(tensors)
    assert not isinstance(found, DTensor) and found.shape == ()
    half = shards.norm([t.bfloat16() for t in tensors])
    return float(found - everything), half.dtype, shards.norm(tensors[:2], torch.float64).dtype


def test_a_joint_norm_counts_each_entry_once_whatever_the_meshes():
    """Clipping by a norm in which replicas, or ranks, count twice."""
    for distance, half, asked in ranks.run(joint, 4):
        assert abs(distance) < 1e-12 and (half, asked) == (torch.float32, torch.float64)


def tensor_parallel_then_fsdp(width):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 3)).double()
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    strided = 0
    for name, p in model.named_parameters():
        value = torch.randn_like(full[name])
        expected = shards.local(distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None))
        assert torch.equal(shards.whole(p), full[name])
        kept = shards.local(p)
        shards.write(p, value)
        assert torch.equal(kept, expected) and torch.equal(shards.whole(p), value)
        strided += any(isinstance(placement, _StridedShard) for placement in p.placements)
        full[name] = value
    everything = torch.cat([value.flatten() for value in full.values()]).norm()
    return strided, float(shards.norm(model.parameters()) - everything)


@pytest.mark.parametrize("width", [8, 6, 4])
def test_fsdp_over_tensor_parallel_layers(width):
    """Rows that both meshes cut: the shards are not neighbours."""
    for strided, distance in ranks.run(tensor_parallel_then_fsdp, 4, width):
        assert strided and abs(distance) < 1e-12


def test_plain_tensors_are_themselves():
    """A single process that pays for what only ranks need."""
    t = values((3, 2))
    assert shards.local(t) is t and shards.whole(t) is t and shards.part(t, t) is t
    shards.write(t, torch.ones(3, 2))
    assert torch.equal(t, torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(
        shards.norm([t, 2 * t]), torch.linalg.vector_norm(torch.stack([t.norm(), 2 * t.norm()]))
    )
