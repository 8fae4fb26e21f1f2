"""Who owns what, of real models on many ranks, without any of them."""

from __future__ import annotations

import time

import pytest
import torch

from stretto.optim import Shampoo
from stretto.optim.layout import Layout
from stretto.optim.regions import arrange

Shapes = dict[str, tuple[int, ...]]
OPTIONS = Shampoo([torch.zeros(2, 2)], 0.1).defaults


def gpt2() -> Shapes:
    shapes: Shapes = {"wte": (50257, 768), "wpe": (1024, 768)}
    for n in range(12):
        shapes |= {f"h.{n}.qkv": (2304, 768), f"h.{n}.proj": (768, 768)}
        shapes |= {f"h.{n}.fc": (3072, 768), f"h.{n}.out": (768, 3072), f"h.{n}.norm": (768,)}
    return shapes


def llama() -> Shapes:
    shapes: Shapes = {"embed_tokens": (32000, 4096), "lm_head": (32000, 4096)}
    for n in range(32):
        shapes |= {f"layers.{n}.{name}": (4096, 4096) for name in ("q", "k", "v", "o")}
        shapes |= {f"layers.{n}.{name}": (11008, 4096) for name in ("gate", "up")}
        shapes |= {f"layers.{n}.down": (4096, 11008), f"layers.{n}.norm": (4096,)}
    return shapes


def resnet50() -> Shapes:
    shapes: Shapes = {"stem": (64, 3, 7, 7), "fc": (1000, 2048)}
    before = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for n in range(blocks):
            name = f"layer{stage}.{n}"
            shapes |= {f"{name}.1": (width, before, 1, 1), f"{name}.2": (width, width, 3, 3)}
            shapes[f"{name}.3"] = (4 * width, width, 1, 1)
            if n == 0:
                shapes[f"{name}.down"] = (4 * width, before, 1, 1)
            before = 4 * width
    return shapes


def lay_out(shapes: Shapes, ranks: int, *, sharded: bool) -> Layout:
    """On so many ranks, with Shampoo's own options."""
    regions = [
        region
        for index, (name, shape) in enumerate(shapes.items())
        for region in arrange(index, name, shape, 0, OPTIONS, by_name=True)
    ]
    turns = Layout(regions).phases(10, {0})
    alone = Layout(regions, dict(enumerate(shapes.values())), every=[10], turns=turns)
    return alone.on(shards=ranks) if sharded else alone.on(replicas=ranks)


@pytest.mark.parametrize("ranks", [8, 64, 1024])
@pytest.mark.parametrize("model", [gpt2, llama, resnet50])
@pytest.mark.parametrize("sharded", [False, True])
def test_no_rank_has_much_more_than_it_must(model, ranks: int, sharded: bool) -> None:
    """The heaviest rank against what no division of whole blocks can go below."""
    begun = time.perf_counter()
    layout = lay_out(model(), ranks, sharded=sharded)
    seconds = time.perf_counter() - begun
    costs = sorted((layout.work(r) for r in layout if r.dims for _ in range(r.count)), reverse=True)
    pair = costs[ranks - 1] + costs[ranks] if len(costs) > ranks else 0.0
    bound = max(sum(costs) / ranks, costs[0], pair)
    heaviest = max(layout.loads().values())
    print(
        f"{model.__name__} {ranks}: {len(costs)} blocks, {heaviest / bound:.3f} of the bound, {seconds:.2f} s"
    )
    assert heaviest <= 1.1 * bound
    assert seconds <= 2


def test_loads_of_a_cycle_average_to_the_mean() -> None:
    """Refreshes that are counted at no step, or at two."""
    layout = lay_out(gpt2(), 8, sharded=False)
    steps = [layout.loads(step) for step in range(10)]
    for rank, load in layout.loads().items():
        assert sum(one[rank] for one in steps) / 10 == pytest.approx(load)
