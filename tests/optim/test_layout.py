"""What lies where: the printed layout, its totals, names, and how parameters are merged and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stretto.optim.layout import Layout
from stretto.optim.regions import DIRECTIONS, arrange, merge, sides
from stretto.optim.shampoo import Shampoo

OPTIONS = {
    "block": 8, "direction": "root", "merge": "dims", "split": 1, "one_sided_above": 6.0, "full_matrix_up_to": 0,
}  # fmt: skip


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(40, 8),
            "conv": nn.Conv2d(6, 4, 3),
            "fc": nn.Linear(12, 20),
            "thin": nn.Linear(2, 16, bias=False),
            "head": nn.Linear(8, 10, bias=False),
        }
    )


def gradients(params: Any) -> None:
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype)


def test_the_printed_layout() -> None:
    """Blocks, direction, bytes and cost of each parameter; by hand for fc.bias, which keeps step, updates and
    two averages: 2 x 4 + 2 x 20 x 4 bytes."""
    optimizer = Shampoo(model().named_parameters(), 0.1, block=16)
    assert "\n" + str(optimizer.layout) + "\n" == GOLDEN


GOLDEN = """
parameter       shape  blocks           direction      state bytes                refresh n³
embed.weight    40x8   2 of 16x8 + 8x8  root (side 2)  4,136                      1.5e+03
conv.weight     4x6x9  4x6x9            root           2,808                      1e+03
conv.bias       4      entries          diagonal       40                         0
fc.weight       20x12  16x12 + 4x12     root           6,432                      7.6e+03
fc.bias         20     entries          diagonal       168                        0
thin.weight     16x2   16x2             root (side 2)  304                        8
head.weight     10x8   10x8             root (side 2)  1,168                      5.1e+02
912 parameters                                         15,056 (16.5 a parameter)  1.1e+04
"""


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("storage", [None, "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"betas": (0.0, 0.9)}, {"momentum": 0.9, "neuron_beta2": 0.9}, {"rounding": "compensated"}],
)
def test_the_totals_are_what_is_kept_after_a_step(
    direction: str, storage: str | None, options: dict[str, Any]
) -> None:
    """Before a step nothing is kept, and the layout tells already what will be; weights in two precisions."""
    built = model()
    built["fc"].bfloat16()
    optimizer = Shampoo(
        built.named_parameters(), 0.1, direction=direction, storage=storage, block=16, **options
    )
    told = str(optimizer.layout)
    assert optimizer.state_bytes() == 0
    gradients(built.parameters())
    optimizer.step()
    layout = optimizer.layout
    assert sum(layout.kept.values()) == optimizer.state_bytes()
    assert f"{optimizer.state_bytes():,} (" in str(layout).splitlines()[-1]
    assert str(layout) == told
    for index, p in enumerate(built.parameters()):
        kept = {id(value): value.numel() * value.element_size() for value in optimizer.state[p].values()}
        assert sum(kept.values()) == sum(layout.kept[r.index, r.part] for r in layout if r.index == index)


def test_names_come_from_the_model_or_are_numbers() -> None:
    built = model()
    named = Shampoo(built.named_parameters(), 0.1)
    assert [region.name for region in named.layout] == [name for name, _ in built.named_parameters()]
    numbered = Shampoo(built.parameters(), 0.1)
    assert [region.name for region in numbered.layout] == [f"parameter {i}" for i in range(7)]


@pytest.mark.parametrize(
    ("name", "is_table"),
    [
        ("embed.weight", True), ("token_embedding.weight", True), ("model.wte.weight", True),
        ("lm_head.weight", True), ("head.weight", True), ("emb", True), ("tok_embeddings.weight", True),
        ("heads.proj.weight", False), ("attn.q.weight", False), ("overhead.weight", False), ("remember", False),
    ],
)  # fmt: skip
def test_tables_are_known_by_name_where_there_are_names(name: str, is_table: bool) -> None:
    """They keep the shorter side alone, and the diagonal rule where matrices are spectral."""
    [region] = arrange(0, name, (8, 6), 0, OPTIONS, by_name=True)
    assert region.sides == ((1,) if is_table else (0, 1))
    [region] = arrange(0, name, (8, 6), 0, OPTIONS | {"direction": "spectral"}, by_name=True)
    assert region.direction == ("diagonal" if is_table else "spectral")
    [region] = arrange(0, name, (8, 6), 0, OPTIONS)
    assert region.sides == (0, 1)


@pytest.mark.parametrize(
    ("shape", "block", "how", "expected"),
    [
        ((16, 3, 3, 3), 9, "dims", (16, 3, 9)),
        ((16, 3, 3, 3), 27, "dims", (16, 27)),
        ((16, 3, 3, 3), 1024, "dims", (16, 27)),  # two are left
        ((16, 3, 3, 3), 1, "dims", (16, 3, 3, 3)),
        ((16, 3, 3, 3), 1, "matrix", (16, 27)),
        ((16, 3, 3, 3), 1024, "none", (16, 3, 3, 3)),
        ((16, 8, 1, 1), 1024, "dims", (16, 8)),
        ((1, 8, 1), 1024, "matrix", (8,)),
        ((1, 1), 1024, "dims", ()),
        ((), 1024, "none", ()),
        ((4, 2, 2, 2), 4, "dims", (4, 2, 4)),
    ],
)
def test_merging_by_hand(shape: Any, block: int, how: str, expected: Any) -> None:
    assert merge(shape, block, how) == expected


@pytest.mark.parametrize(
    ("shape", "direction", "expected"),
    [
        ((8, 6), "root", (0, 1)),
        ((36, 6), "soap", (0, 1)),
        ((37, 6), "soap", (1,)),
        ((6, 37), "kl", (0,)),
        ((8, 6, 4), "eigen", (0, 1, 2)),
        ((80, 6, 4), "eigen", (0, 1, 2)),
        ((8, 6), "one_sided", (1,)),
        ((8, 6, 9), "one_sided", (1,)),
        ((8, 6), "spectral", ()),
        ((8, 6), "diagonal", ()),
    ],
)
def test_sides_by_hand(shape: Any, direction: str, expected: Any) -> None:
    assert sides(shape, direction, 6.0) == expected


def test_a_matrix_is_cut_into_whole_blocks_and_what_is_left_over() -> None:
    regions = arrange(0, "w", (20, 11), 0, OPTIONS)
    found = [(region.start, region.grid, region.dims, region.part) for region in regions]
    assert found == [
        ((0, 0), (2, 1), (8, 8), 0),
        ((0, 8), (2, 1), (8, 3), 1),
        ((16, 0), (1, 1), (4, 8), 2),
        ((16, 8), (1, 1), (4, 3), 3),
    ]
    assert [region.cost for region in regions] == [1024, 512 + 27, 64 + 512, 64 + 27]


@pytest.mark.parametrize("full_matrix_up_to", [0, 5, 6])
def test_vectors_have_a_factor_up_to_a_length(full_matrix_up_to: int) -> None:
    for shape in ((6,), (1, 6), (6, 1, 1)):
        [region] = arrange(0, "b", shape, 0, OPTIONS | {"full_matrix_up_to": full_matrix_up_to})
        expected = ("root", (0,)) if full_matrix_up_to >= 6 else ("diagonal", ())
        assert (region.direction, region.sides) == expected


@given(
    costs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=12),
    every=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_turns_are_the_same_for_the_same_layout(costs: list[tuple[int, int]], every: int) -> None:
    """And lie in [0, every); a checkpoint has none of them."""
    regions = [
        region
        for index, (size, count) in enumerate(costs)
        for region in arrange(index, "w", (8 * count, size + 1), 0, OPTIONS)
    ]
    turns = Layout(regions).phases(every, {0})
    assert turns == Layout(list(regions)).phases(every, {0})
    assert all(0 <= turn < every for blocks in turns.values() for turn in blocks)
    assert Layout(regions).phases(every, {1}) == {}
