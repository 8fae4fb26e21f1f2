"""What any implementation of the Shampoo family must have, numbered as in the list that it was built from."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stretto.optim import shampoo
from stretto.optim.layout import Layout
from stretto.optim.reference import ShampooReference, full_matrix_adagrad
from stretto.optim.regions import DIRECTIONS, SIDED, arrange
from stretto.optim.shampoo import Shampoo

Shape = tuple[int, ...]
KINDS: list[dict[str, Any]] = [
    *({"direction": direction} for direction in DIRECTIONS),
    {"direction": "soap", "then": "orthogonalize"},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))


def draw(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes: Sequence[Shape], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, 1000 + i, dtype)) for i, shape in enumerate(shapes)]


def give(params: Sequence[Tensor], seed: int) -> None:
    """Each parameter's gradient, the same for the same place and seed."""
    for i, p in enumerate(params):
        p.grad = draw(tuple(p.shape), 100 * (seed + 1) + i).to(p.dtype)


def equal(params: Sequence[Tensor], others: Sequence[Tensor], tolerance: float = 0.0) -> None:
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)


def taken(shape: Shape, gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """P of each step, for a parameter that is one block: what rate 1 subtracts from weights of 0."""
    p = nn.Parameter(torch.zeros(shape, dtype=gradients[0].dtype))
    optimizer = Shampoo([p], 1.0, **{"one_sided_above": 1e9, **options})
    steps = []
    for gradient in gradients:
        p.data.zero_()
        p.grad = gradient.clone()
        optimizer.step()
        steps.append(-p.detach().clone())
    return steps


# -- 1, 2: theory


@pytest.mark.parametrize("n", [2, 7, 20])
def test_1_a_vector_is_full_matrix_adagrad(n: int) -> None:
    gradients = [draw((n,), seed) for seed in range(20)]
    options = {"full_matrix_up_to": n, "ridge": "absolute", "ridge_eps": 1e-3, "graft": None}
    steps = taken((n,), gradients, betas=(0.0, 1.0), every=1, **options)
    for i, step in enumerate(steps):
        expected = full_matrix_adagrad(gradients[: i + 1], 1e-3)
        torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 5), (6, 3), (3, 7)])
@pytest.mark.parametrize("direction", ["root", "eigen", "one_sided"])
def test_2_without_memory_a_step_is_the_orthogonal_factor(shape: Shape, direction: str) -> None:
    """U Vᵀ of the gradient U S Vᵀ; one-sided, p = 1/2, too."""
    gradients = [draw(shape, seed) for seed in range(3)]
    options = {"ridge": "pinv", "graft": None, "root": "eigh"}
    steps = taken(shape, gradients, betas=(0.0, 0.0), every=1, direction=direction, **options)
    for step, gradient in zip(steps, gradients):
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        torch.testing.assert_close(step, u @ v, rtol=1e-8, atol=1e-8)


# -- 3: grafting


@pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize("direction", SIDED)
def test_3_a_grafted_step_has_the_grafting_methods_norm_in_each_block(direction: str, graft: str) -> None:
    """The method alone is direction="diagonal", which 5 holds against torch's; blocks and remainders, in float32."""
    if direction == "soap" and graft != "sgd":
        pytest.skip("soap takes no other")
    shapes = [(12, 10), (9, 3, 4), (8, 8)]
    params, alone = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    options: dict[str, Any] = {"graft": graft, "block": 5, "betas": (0.8, 0.9), "every": 2}
    optimizer = Shampoo(params, 1.0, direction=direction, **options)
    other = Shampoo(alone, 1.0, direction="diagonal", **options)
    for seed in range(7):
        for p in params + alone:
            p.data.zero_()
        give(params, seed)
        give(alone, seed)
        optimizer.step()
        other.step()
        for region in optimizer.layout:
            found, expected = (
                region.blocks(ps[region.index].detach()).reshape(region.count, -1).norm(dim=1)
                for ps in (params, alone)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    assert not torch.equal(params[0], alone[0])


# -- 4: rotations


@pytest.mark.parametrize(
    ("direction", "shape", "tolerance"),
    [
        ("root", (6, 4), 1e-10),
        ("root", (5, 5), 1e-10),
        ("eigen", (6, 4), 1e-10),
        ("one_sided", (6, 4), 1e-10),
        ("kl", (5, 5), 1e-10),
        ("spectral", (6, 4), 1e-10),
        ("soap", (5, 5), 1e-4),
    ],
)
@pytest.mark.parametrize("graft", [None, "sgd"])
def test_4_steps_turn_with_the_weights(
    direction: str, shape: Shape, tolerance: float, graft: str | None
) -> None:
    """Under W -> U W Vᵀ, where no rule goes by entries."""
    if direction == "spectral" and graft:
        pytest.skip("spectral steps have a length of their own")
    u, v = (torch.linalg.qr(draw((n, n), 7 + n))[0] for n in shape)
    gradients = [draw(shape, seed) for seed in range(12)]
    options: dict[str, Any] = {"direction": direction, "graft": graft, "every": 3, "ridge_eps": 1e-3}
    options |= {} if direction == "soap" else {"root": "eigh"}
    plain = taken(shape, gradients, **options)
    turned = taken(shape, [u @ g @ v.T for g in gradients], **options)
    for step, other in zip(plain, turned):
        torch.testing.assert_close(u @ step @ v.T, other, rtol=tolerance, atol=tolerance)


# -- 5: the grafting method alone

EPS = 1e-3
TORCHS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda params, decay: torch.optim.SGD(params, 0.1, weight_decay=decay),
    "adagrad": lambda params, decay: torch.optim.Adagrad(params, 0.1, weight_decay=decay, eps=EPS),
    "rmsprop": lambda params, decay: torch.optim.RMSprop(params, 0.1, 0.9, EPS, weight_decay=decay),
    "adam": lambda params, decay: torch.optim.Adam(params, 0.1, (0.0, 0.9), EPS, weight_decay=decay),
}
SHAPES: list[Shape] = [(5, 4), (2, 3, 2, 2), (3,), (), (1, 6)]


def follows(other: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any) -> None:
    """Weights equal those of another optimizer over 20 steps."""
    params, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer, reference = Shampoo(params, 0.1, eps=EPS, **options), other(theirs)
    for seed in range(20):
        give(params, seed)
        give(theirs, seed)
        optimizer.step()
        reference.step()
        equal(params, theirs, 1e-12)


@pytest.mark.parametrize("graft", TORCHS)
@pytest.mark.parametrize("direction", ["root", "eigen", "one_sided", "kl", "diagonal"])
def test_5_before_the_first_refresh_the_grafting_method_steps(direction: str, graft: str) -> None:
    options: dict[str, Any] = {"direction": direction, "graft": graft, "betas": (0.0, 0.9), "start": 100}
    follows(lambda params: TORCHS[graft](params, 0.1), **options, weight_decay=0.1, decay="l2")


@pytest.mark.parametrize("direction", ["root", "eigen", "one_sided", "kl", "soap", "diagonal"])
@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_5_adam_and_adamw(direction: str, decay: str) -> None:
    """With its momentum; SOAP in the identity basis without any graft."""
    theirs = {"decoupled": torch.optim.AdamW, "l2": torch.optim.Adam}[decay]
    options: dict[str, Any] = {"direction": direction, "graft": "auto" if direction == "soap" else "adam"}
    options |= {"betas": (0.8, 0.9), "start": 100, "weight_decay": 0.2, "decay": decay}
    follows(lambda params: theirs(params, 0.1, (0.8, 0.9), EPS, weight_decay=0.2), **options)


@pytest.mark.parametrize("nesterov", [False, True])
def test_5_momentum_after_preconditioning_is_that_of_sgd(nesterov: bool) -> None:
    options: dict[str, Any] = {"direction": "diagonal", "graft": "sgd", "betas": (0.0, 0.9)}
    follows(
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=nesterov),
        momentum=0.9,
        nesterov=nesterov,
        **options,
    )


# -- 6: blocks


@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    block=st.integers(1, 12),
    merge=st.sampled_from(["dims", "matrix", "none"]),
    split=st.integers(1, 4),
    direction=st.sampled_from(DIRECTIONS),
)
@settings(max_examples=300, deadline=None)
def test_6_blocks_tile_a_tensor_exactly_once(
    shape: Shape, block: int, merge: str, split: int, direction: str
) -> None:
    assume(split == 1 or (len(shape) > 0 and shape[0] % split == 0))
    options = {"block": block, "merge": merge, "split": split, "direction": direction}
    regions = arrange(0, "w", shape, 0, options | {"one_sided_above": 6.0, "full_matrix_up_to": 3})
    places = torch.arange(prod(shape)).reshape(shape)
    found = torch.cat([region.blocks(places).flatten() for region in regions])
    assert sorted(found.tolist()) == list(range(prod(shape)))
    for region in regions:
        assert region.blocks(places).numel() == region.numel
        if region.direction in SIDED and region.dims != (prod(shape),):
            assert max(region.dims) <= block
        if len(region.dims) > 1 and split > 1:
            whole = places.reshape(split, -1)  # no block has entries of two parts
            rows = [
                {entry // whole.shape[1] for entry in b.flatten().tolist()}
                for b in region.blocks(places).reshape(-1, *region.dims)
            ]
            assert all(len(parts) == 1 for parts in rows)


def run(
    params: list[nn.Parameter],
    steps: int,
    prepare: Callable[[list[nn.Parameter]], None] | None = None,
    **options: Any,
) -> list[nn.Parameter]:
    """The parameters after so many steps; gradients may be prepared before each."""
    optimizer = Shampoo(params, 0.1, **options)
    for seed in range(steps):
        give(params, seed)
        if prepare:
            prepare(params)
        optimizer.step()
    return params


@kinds
def test_6_a_block_as_large_as_the_dims_is_no_block(kind: dict[str, Any]) -> None:
    shapes = [(7, 6), (4, 3, 7), (5,)]
    options = {"every": 2, "merge": "none", **kind}
    equal(run(parameters(shapes), 6, block=7, **options), run(parameters(shapes), 6, block=10**6, **options))


@kinds
def test_6_channels_last_is_contiguous_bit_for_bit(kind: dict[str, Any]) -> None:
    """Merged dims of such a weight are a copy: steps written there were lost."""
    shapes = [(8, 4, 3, 3), (6, 8, 2, 2), (6, 8, 1, 1)]

    def reorder(params: list[nn.Parameter]) -> None:
        for p in params:
            assert p.grad is not None
            p.grad = p.grad.to(memory_format=torch.channels_last)

    for block in (5, 1024):
        plain = parameters(shapes, torch.float32)
        reordered = [nn.Parameter(p.detach().clone(memory_format=torch.channels_last)) for p in plain]
        options = {"block": block, "every": 2, **kind}
        equal(run(reordered, 6, reorder, **options), run(plain, 6, **options))
        assert reordered[0].is_contiguous(memory_format=torch.channels_last)


@kinds
def test_6_a_split_projection_steps_as_separate_parameters(kind: dict[str, Any]) -> None:
    """split = 3 x heads, for a fused QKV; the shorter side is that of a part."""
    heads, size, width = 2, 4, 6
    fused = parameters([(3 * heads * size, width)])
    parts = [nn.Parameter(part.clone()) for part in fused[0].detach().split(size)]
    options = {"every": 4, "one_sided_above": 1e9, **kind}
    one, many = Shampoo(fused, 0.1, split=3 * heads, **options), Shampoo(parts, 0.1, **options)
    for seed in range(9):
        give(fused, seed)
        assert fused[0].grad is not None
        for part, grad in zip(parts, fused[0].grad.split(size)):
            part.grad = grad.clone()
        one.step()
        many.step()
    equal(fused, [torch.cat([part.detach() for part in parts])], 1e-12)


# -- 8: staggering


def roots_of(optimizer: Shampoo) -> list[Tensor]:
    """Of each block, its roots or bases."""
    return [
        torch.cat([kept[block].double().flatten() for name, kept in sorted(bucket.kept.items())
                   if name.startswith(("root", "basis"))])
        for bucket in optimizer.buckets if bucket.rule.sides
        for block in range(bucket.size)
    ]  # fmt: skip


@pytest.mark.parametrize("direction", SIDED)
@pytest.mark.parametrize(("every", "start"), [(1, 1), (3, 1), (4, 3), (10, 1)])
def test_8_each_block_is_refreshed_exactly_once_in_every_steps(
    direction: str, every: int, start: int
) -> None:
    """And never more than every - 1 steps stale, counted from what is kept of each block."""
    params = parameters([(9, 8), (8, 8), (4, 4), (4,)])
    optimizer = Shampoo(params, 0.1, direction=direction, every=every, start=start, block=4)
    changed: list[list[int]] = []
    before: list[Tensor] | None = None
    for seed in range(start + 3 * every):
        give(params, seed)
        optimizer.step()
        now = roots_of(optimizer)
        if before is not None:
            changed.append([int(not torch.equal(a, b)) for a, b in zip(now, before)])
        before = now
    counts = torch.tensor(changed)  # (steps, blocks), from the second step
    assert counts.shape[1] > 10
    assert not counts[: max(start - 2, 0)].any() or direction == "kl"
    for first in range(start, len(counts) - every + 1):
        assert (counts[first : first + every].sum(dim=0) == 1).all()


@given(
    shapes=st.lists(st.lists(st.integers(2, 40), min_size=2, max_size=3).map(tuple), min_size=1, max_size=8),
    every=st.integers(1, 12),
    block=st.sampled_from([4, 16, 64]),
)
@settings(max_examples=100, deadline=None)
def test_8_all_steps_refresh_about_the_same(shapes: list[Shape], every: int, block: int) -> None:
    """The worst step costs at most the mean and the costliest block."""
    optimizer = Shampoo([nn.Parameter(torch.empty(shape)) for shape in shapes], 0.1, block=block, every=every)
    layout = Layout(optimizer.layout.regions)
    loads = [0] * every
    for (index, part), turns in layout.phases(every, {0}).items():
        [region] = [r for r in layout if (r.index, r.part) == (index, part)]
        assert len(turns) == region.count
        for turn in turns:
            loads[turn] += region.cost
    assert max(loads) <= sum(loads) / every + max(region.cost for region in layout)


def test_8_a_new_interval_gives_new_turns() -> None:
    """`every` is read at each step."""
    params = parameters([(8, 8), (8, 4)])
    optimizer = Shampoo(params, 0.1, block=4, every=10)
    for seed in range(4):
        give(params, seed)
        optimizer.step()
    optimizer.param_groups[0]["every"] = 2
    give(params, 4)
    optimizer.step()
    turns = [turn for bucket in optimizer.buckets for turn in bucket.phases]
    assert sorted(turns) == [0, 0, 0, 1, 1, 1]


# -- 11: gradients that are not finite


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of gradients on a device, where the host does not know which steps were skipped."""
    source = textwrap.dedent(inspect.getsource(Shampoo._judge))
    assert source.count('device.type == "cpu"') == 1
    names = dict(vars(shampoo))
    exec(source.replace('device.type == "cpu"', "False"), names)
    monkeypatch.setattr(Shampoo, "_judge", names["_judge"])


def snapshot(params: list[nn.Parameter], optimizer: Shampoo) -> list[Tensor]:
    """Weights and all that is kept, copied."""
    state = optimizer.state_dict()["state"]
    return [p.detach().clone() for p in params] + [
        state[index][name].clone() for index in sorted(state) for name in sorted(state[index])
    ]


def spoil(p: Tensor, bad: float) -> None:
    """One entry of the gradient is not finite."""
    assert p.grad is not None
    p.grad.view(-1)[-1] = bad


NAMES = ["first", "second", "bias"]


def named(**options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = parameters([(6, 5), (4, 6), (5,)], torch.float32)
    return params, Shampoo(list(zip(NAMES, params)), 0.1, weight_decay=0.1, block=4, **options)


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_device", [False, True])
def test_11_a_bad_gradient_changes_nothing(
    kind: dict[str, Any], bad: float, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, though a refresh was due; the good steps are those of a run without it."""
    if on_device:
        as_on_a_device(monkeypatch)
    options: dict[str, Any] = {"every": 1, "max_skips": 3, "momentum": 0.5, **kind}
    params, optimizer = named(**options)
    others, reference = named(**options)
    for seed in range(6):
        for ps, o in ((params, optimizer), (others, reference)):
            give(ps, seed)
            o.step()
        before = snapshot(params, optimizer)
        for skip in range(2):
            give(params, seed)
            spoil(params[skip], bad)
            optimizer.step()
            equal(before, snapshot(params, optimizer))
            assert optimizer.skipped == 2 * seed + skip + 1
    equal(params, others, 1e-5 if on_device else 0.0)


@kinds
@pytest.mark.parametrize("on_device", [False, True])
def test_11_a_bad_first_gradient_changes_nothing(
    kind: dict[str, Any], on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no step was taken yet, averages have no weights to be divided by."""
    if on_device:
        as_on_a_device(monkeypatch)
    options: dict[str, Any] = {"every": 1, **kind}
    params, optimizer = named(**options)
    others, reference = named(**options)
    before = [p.detach().clone() for p in params]
    give(params, 0)
    spoil(params[1], float("nan"))
    optimizer.step()
    equal(params, before)
    for seed in range(3):
        for ps, o in ((params, optimizer), (others, reference)):
            give(ps, seed)
            o.step()
    equal(params, others, 1e-5 if on_device else 0.0)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("max_skips", [1, 3])
def test_11_the_last_of_too_many_in_a_row_raises(
    max_skips: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naming the parameter; a good step between begins anew; on a device at most `every` steps late."""
    if on_device:
        as_on_a_device(monkeypatch)
    every = 4
    params, optimizer = named(every=every, max_skips=max_skips)

    def step(seed: int, *, good: bool) -> None:
        give(params, seed)
        if not good:
            spoil(params[1], float("nan"))
        optimizer.step()

    step(9, good=True)
    for seed in range(3):
        for _ in range(max_skips - 1):
            step(seed, good=False)
        step(seed, good=True)
    assert optimizer.skipped == 3 * (max_skips - 1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=rf"{max_skips} steps in a row .* second; the weights"):
        for late in range(max_skips + every):
            step(late, good=False)
    assert late + 1 <= max_skips + (every if on_device else 0)
    equal(params, before)


# -- 12: what may change while it steps


@kinds
def test_12_a_parameter_without_gradient_now_and_then_steps_as_if_alone(kind: dict[str, Any]) -> None:
    """Beside others of its shape, which go on; refreshed at each step, so that turns are the same."""
    options: dict[str, Any] = {"every": 1, "ridge_eps": 1e-2, "momentum": 0.5, "weight_decay": 0.1, **kind}
    options |= {"root": "eigh"}
    shapes = [(5, 5), (5, 5), (3,)]
    params, alone = parameters(shapes), parameters(shapes)
    together = Shampoo(params, 0.1, **options)
    each = [Shampoo([p], 0.1, **options) for p in alone]
    for seed in range(10):
        give(params, seed)
        give(alone, seed)
        for i, p in enumerate(params):
            if (seed + i) % 3 == 1 and seed:
                p.grad = None
            else:
                each[i].step()
        together.step()
    equal(params, alone, 1e-8)


def test_12_steps_without_any_gradient_do_nothing() -> None:
    params = parameters([(4, 4)])
    optimizer = Shampoo(params, 0.1)
    optimizer.step()
    assert optimizer.param_groups[0]["calls"] == 0
    equal(params, parameters([(4, 4)]))


@kinds
@pytest.mark.parametrize("how", ["frozen", "added"])
def test_12_a_parameter_that_comes_later_steps_as_if_alone(kind: dict[str, Any], how: str) -> None:
    """Frozen at first, or in a group added after steps; those before it do not notice."""
    options: dict[str, Any] = {"every": 1, "ridge_eps": 1e-2, **kind}
    shapes = [(5, 5), (5, 5), (3,)]
    params, alone = parameters(shapes), parameters(shapes)
    first, second = Shampoo(alone[:1], 0.1, **options), Shampoo(alone[1:], 0.1, **options)
    for p in params[1:]:
        p.requires_grad_(False)
    optimizer = Shampoo(params if how == "frozen" else params[:1], 0.1, **options)
    for seed in range(9):
        if seed == 4:
            for p in params[1:]:
                p.requires_grad_(True)
            if how == "added":
                optimizer.add_param_group({"params": params[1:]})
        give(alone, seed)
        for p, q in zip(params, alone):
            p.grad = q.grad if p.requires_grad else None
        optimizer.step()
        first.step()
        if seed >= 4:
            second.step()
    equal(params, alone, 1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_12_rates_betas_eps_and_decay_change_live(direction: str) -> None:
    """Against the slow twin, given the same changes."""
    [p] = parameters([(5, 5)])
    options: dict[str, Any] = {"direction": direction, "ridge_eps": 1e-2, "start": 3, "every": 2}
    optimizer = Shampoo([p], 0.1, root="eigh", **options)
    graft = "adam" if direction in ("root", "eigen", "one_sided", "diagonal") else None
    reference, weight = ShampooReference(graft=graft, **options), p.detach().clone()
    [group] = optimizer.param_groups
    changes: dict[int, dict[str, Any]] = {
        2: {"betas": (0.7, 0.95)}, 4: {"eps": 1e-2}, 5: {"weight_decay": 0.3}, 6: {"ridge_eps": 0.1},
        7: {"betas": (0.95, 0.9), "eps": 1e-4}, 9: {"every": 3},
    }  # fmt: skip
    for seed in range(14):
        for name, value in changes.get(seed, {}).items():
            group[name] = value
            setattr(reference, name, value)
        lr = group["lr"] = 0.1 / (1 + seed % 3)
        give([p], seed)
        assert p.grad is not None
        optimizer.step()
        weight = reference.step(weight, p.grad, lr)
        torch.testing.assert_close(p.detach(), weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_12_a_momentum_may_begin_later(direction: str) -> None:
    """Beta1 from 0 to 0.9: the steps stay finite, of a usual size, and are carried on through gradients of 0."""
    params = parameters([(5, 5), (4,)])
    optimizer = Shampoo(params, 0.1, (0.0, 0.9), direction=direction, every=2, ridge_eps=1e-2)
    for seed in range(20):
        if seed == 5:
            optimizer.param_groups[0]["betas"] = (0.9, 0.9)
        before = [p.detach().clone() for p in params]
        give(params, seed)
        if seed == 19:
            for p in params:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        sizes = [(p.detach() - b).square().mean().sqrt() / 0.1 for p, b in zip(params, before)]
        assert all(0.01 < size < 10 for size in sizes)
    assert all("momentum" in optimizer.state[p] for p in params)


@kinds
def test_12_weights_in_bfloat16_have_a_state_in_float32(kind: dict[str, Any]) -> None:
    """A step is the float32 one, rounded once."""
    shapes = [(6, 5), (3, 2, 2), (4,)]
    low = parameters(shapes, torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in low]
    optimizer, reference = Shampoo(low, 0.1, every=2, **kind), Shampoo(exact, 0.1, every=2, **kind)
    for seed in range(5):
        give(low, seed)
        for p, q in zip(low, exact):
            assert p.grad is not None
            q.data.copy_(p.detach())
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        equal(low, [q.detach().bfloat16() for q in exact])
    kept = [value for p in low for value in optimizer.state[p].values() if value.is_floating_point()]
    assert {value.dtype for value in kept} == {torch.float32}


def test_12_stochastic_rounding_keeps_the_mean() -> None:
    """Of 20 steps of 1e-4 from 1.0, where neighbours are 2^-7 and 2^-8 away, over 65536 entries."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(65536, dtype=torch.bfloat16))
    optimizer = Shampoo([weight], 1e-4, graft="sgd", betas=(0.0, 0.9), rounding="stochastic")
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    deviation = (20 * 1e-4 * 2**-8 / 65536) ** 0.5
    assert abs(weight.detach().double().mean().item() - (1 - 20 * 1e-4)) < 5 * deviation


@pytest.mark.parametrize("shape", [(8, 8), (64,)])
def test_12_compensated_rounding_keeps_steps_that_nearest_loses(shape: Shape) -> None:
    """100 steps of about 1e-4 from 1.0."""
    found: dict[str, float] = {}
    for rounding in ("nearest", "compensated"):
        weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = Shampoo(
            [weight], 1e-4, betas=(0.0, 0.9), graft="adam", direction="diagonal", rounding=rounding
        )
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found[rounding] = weight.detach().double().mean().item()
    assert found["nearest"] == 1.0
    assert found["compensated"] == pytest.approx(0.99, abs=2**-9)


def test_12_a_bias_in_a_spectral_group_steps_by_adam() -> None:
    layer = nn.Linear(5, 3)
    bias = nn.Parameter(layer.bias.detach().clone())
    optimizer = Shampoo(layer.parameters(), 0.1, (0.9, 0.95), direction="spectral")
    reference = torch.optim.Adam([bias], 0.1, (0.9, 0.95))
    before = layer.weight.detach().clone()
    for seed in range(5):
        give([layer.weight, layer.bias], seed)
        assert layer.bias.grad is not None
        bias.grad = layer.bias.grad.clone()
        optimizer.step()
        reference.step()
    equal([layer.bias], [bias], 1e-6)
    assert not torch.equal(layer.weight, before)


@kinds
@pytest.mark.parametrize("decay", ["decoupled", "corrected"])
def test_12_a_rate_as_a_tensor_is_the_same_as_a_number(kind: dict[str, Any], decay: str) -> None:
    """Both scheduled by torch."""
    found = []
    for lr in (0.125, torch.tensor(0.125, dtype=torch.float64)):
        params = parameters([(5, 4), (4,)])
        optimizer = Shampoo(params, lr, every=2, weight_decay=0.1, decay=decay, **kind)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for seed in range(6):
            give(params, seed)
            optimizer.step()
            schedule.step()
        found.append(params)
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
    equal(*found, 1e-12)


@kinds
def test_12_a_plain_loop_learns(kind: dict[str, Any]) -> None:
    """A model, a closure, a schedule of torch's; no warning, and the loss falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = torch.randn(32, 6), torch.randn(32, 3)
    optimizer = Shampoo(model.named_parameters(), 0.03, every=3, **kind)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    losses = []
    for _ in range(30):
        losses.append(closure().item())
        optimizer.step(closure)
        schedule.step()
    assert losses[-1] < 0.8 * losses[0]


# -- 13: torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's imports
@pytest.mark.parametrize("direction", ["root", "soap", "kl", "spectral"])
def test_13_compiled_steps_equal_eager_ones_and_compile_once(direction: str) -> None:
    """At 1e-5 over 12 steps; the rate changes, nothing is compiled again after two cycles.

    No dims are merged, so that factors have full rank at the first refresh: SOAP's basis of a null space is arbitrary.
    """
    every, start = 3, 2
    options: dict[str, Any] = {"direction": direction, "ridge_eps": 1e-2, "merge": "none"}
    shapes = [(6, 6), (6, 6), (5, 5, 5), (4,)]
    found = []
    for is_compiled in (False, True):
        torch.compiler.reset()
        params = parameters(shapes, torch.float32)
        optimizer = Shampoo(params, 0.01, every=every, start=start, compile=is_compiled, **options)
        for seed in range(12):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + seed)
            give(params, seed)
            is_warm = is_compiled and seed >= start + 2 * every
            with torch.compiler.set_stance("fail_on_recompile") if is_warm else nullcontext():
                optimizer.step()
        found.append(params)
    equal(*found, 1e-5)
