"""The fast optimizer against its slow twin, on random shapes and options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.optim.buckets import Bucket
from stretto.optim.reference import ShampooReference
from stretto.optim.shampoo import Shampoo

SIDED = ("root", "eigen", "one_sided", "kl", "soap")
OWN = {"root": "adam", "eigen": "adam", "one_sided": "adam", "diagonal": "adam"}  # what "auto" grafts


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fast(
    shapes: list[tuple[int, ...]], steps: int, lr: float = 0.1, **options: Any
) -> tuple[list[Tensor], Shampoo]:
    """Parameters of these shapes after so many steps on the gradients that `slow` takes too."""
    params = [torch.nn.Parameter(draw(shape, 1000 + i)) for i, shape in enumerate(shapes)]
    optimizer = Shampoo(params, lr, **{"root": "eigh", "one_sided_above": 1e9, **options})
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = draw(tuple(p.shape), 31 * t + i)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def slow(
    shape: tuple[int, ...], index: int, steps: int, phase: int, lr: float = 0.1, **options: Any
) -> Tensor:
    """The same for one parameter that is one block."""
    graft = options.get("graft", "auto")
    direction = options.get("direction", "root")
    options["graft"] = OWN.get(direction) if graft == "auto" else graft
    options.pop("merge", None)
    reference, weight = ShampooReference(phase=phase, **options), draw(shape, 1000 + index)
    for t in range(steps):
        weight = reference.step(weight, draw(shape, 31 * t + index), lr)
    return weight


def agree(shapes: list[tuple[int, ...]], steps: int, tolerance: float = 1e-8, **options: Any) -> None:
    found, optimizer = fast(shapes, steps, **options)
    phases = {region.index: optimizer._turns([region]) for region in optimizer.layout}
    for i, shape in enumerate(shapes):
        phase = phases[i][0] if phases[i] else 0
        expected = slow(shape, i, steps, phase, **options)
        torch.testing.assert_close(found[i], expected, rtol=tolerance, atol=tolerance)


shapes = st.lists(
    st.lists(st.integers(2, 6), min_size=2, max_size=3).map(tuple), min_size=1, max_size=4
)  # small, so that equal ones meet in a bucket
choices = st.fixed_dictionaries(
    {
        "direction": st.sampled_from((*SIDED, "spectral", "diagonal")),
        "betas": st.sampled_from([(0.9, 0.99), (0.0, 0.9), (0.8, 0.95)]),
        "every": st.integers(1, 4),
        "start": st.integers(1, 3),
        "stats_every": st.integers(1, 2),
        "ridge": st.sampled_from(["relative", "absolute"]),
        "ridge_eps": st.sampled_from([1e-2, 1e-1]),
        "eps": st.sampled_from([1e-3, 1e-8]),
        "trace_scaling": st.booleans(),
        "bias_correction": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decay": st.sampled_from(["decoupled", "l2", "corrected", "independent"]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "nesterov": st.booleans(),
        "clip": st.sampled_from([None, 0.3]),
        "then": st.sampled_from([None, None, "orthogonalize"]),
        "neuron_beta2": st.sampled_from([0.0, 0.9]),
        "scale": st.sampled_from(["match_rms", "original", None]),
        "merge": st.just("none"),
    }
).map(lambda o: o | {"start": 4, "stats_every": 1} if o["direction"] == "soap" else o)
# SOAP's basis of a null space is arbitrary: it is compared from where factors have full rank


@given(shapes=shapes, options=choices)
@settings(max_examples=120, deadline=None)
def test_the_fast_optimizer_equals_its_slow_twin(
    shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    agree(shapes, 9, **options)


@given(
    shapes=shapes,
    options=choices,
    graft=st.sampled_from(["sgd", "adagrad", "rmsprop", "adam", None]),
    graft_beta2=st.sampled_from([None, 0.8]),
)
@settings(max_examples=60, deadline=None)
def test_every_graft_equals_its_slow_twin(
    shapes: list[tuple[int, ...]], options: dict[str, Any], graft: str | None, graft_beta2: float | None
) -> None:
    options |= {"direction": "root", "graft": graft, "graft_beta2": graft_beta2}
    agree(shapes, 6, **options)


@pytest.mark.parametrize("direction", SIDED)
@pytest.mark.parametrize("beta3", [0.0, 0.81, 0.95])
def test_beta3(direction: str, beta3: float) -> None:
    agree([(4, 5), (4, 5), (3, 2)], 8, direction=direction, beta3=beta3, ridge_eps=1e-2)


@pytest.mark.parametrize("power", [0.5, 1 / 3, {2: (0.25, 0.4), 3: 0.2}])
@pytest.mark.parametrize("ridge", ["relative", "pinv"])
def test_powers_by_order_and_side(power: Any, ridge: str) -> None:
    agree([(4, 5), (3, 2, 4)], 8, power=power, ridge=ridge, every=2, start=6, merge="none", tolerance=1e-6)


@pytest.mark.parametrize("direction", ["root", "kl", "eigen"])
def test_sums_instead_of_averages(direction: str) -> None:
    agree([(4, 5), (4, 5)], 8, direction=direction, betas=(0.9, 1.0), every=3, ridge_eps=1e-2)


@pytest.mark.parametrize("direction", SIDED)
def test_sides_kept_as_halves_equal_whole_ones(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large symmetric matrices are kept as their lower half."""
    monkeypatch.setattr("stretto.optim.symmetric.WHOLE", 3)
    shapes = [(4, 5), (7, 3), (4, 5), (2, 5, 4)]
    agree(shapes, 9, direction=direction, ridge_eps=1e-2, start=4, every=2, merge="none")


@given(shapes=shapes, options=choices)
@settings(max_examples=60, deadline=None)
def test_numbers_as_tensors_give_the_same_steps(
    shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    """What a device does, where the host does not know which steps were skipped."""
    plain, _ = fast(shapes, 8, **options)
    masked, optimizer = fast(shapes, 0, **options)
    params = [torch.nn.Parameter(p) for p in masked]
    optimizer = Shampoo(params, 0.1, **{"root": "eigh", "one_sided_above": 1e9, **options})
    optimizer.compiled = True  # numbers become tensors; the kernels stay as they are
    for t in range(8):
        for i, p in enumerate(params):
            p.grad = draw(tuple(p.shape), 31 * t + i)
        optimizer.step()
    for p, q in zip(params, plain):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)
    assert all(math.isfinite(float(p.detach().sum())) for p in params)


@pytest.mark.parametrize("direction", (*SIDED, "spectral"))
@pytest.mark.parametrize("option", ["products", "storage"])
def test_bfloat16_products_and_storage_give_about_the_same_steps(
    direction: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves too; where a CPU has no units for bfloat16 the products would otherwise stay as they are."""
    monkeypatch.setattr("stretto.optim.symmetric.WHOLE", 3)
    monkeypatch.setattr("stretto.optim.buckets.has_bfloat16", lambda device: True)
    shapes, options = (
        [(4, 5), (4, 5), (7, 6)],
        {"direction": direction, "ridge_eps": 0.1, "every": 2, "start": 4},
    )
    start, _ = fast(shapes, 0)
    expected, exact = fast(shapes, 8, **options)
    found, optimizer = fast(shapes, 8, **{option: "bfloat16"}, **options)
    for before, p, q in zip(start, found, expected):
        off = (p - q).norm() / (q - before).norm()
        assert off < 0.1
        assert off > 0 or (option == "storage" and direction == "spectral")
    smaller = optimizer.state_bytes() < exact.state_bytes()
    assert smaller == (option == "storage" and direction != "spectral")


@pytest.mark.parametrize("decay", ["decoupled", "independent", "corrected"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 1.0), (0.0, 0.95)])
def test_the_diagonal_rule_by_torchs_kernel_is_the_rule_by_stacks(
    decay: str, betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of large tables took two thirds of a Muon step; the kernel takes what is Adam's and nothing else."""
    options: dict[str, Any] = {"direction": "diagonal", "decay": decay, "weight_decay": 0.1, "betas": betas}
    shapes, taken = [(7, 3), (5,), ()], []
    step = Bucket._adam
    monkeypatch.setattr("stretto.optim.buckets.LARGE", 1)
    monkeypatch.setattr(Bucket, "_adam", lambda bucket: (taken.append(bucket), step(bucket)))
    found, optimizer = fast(shapes, 5, **options)
    assert bool(taken) == (betas == (0.9, 0.95))
    monkeypatch.setattr(Bucket, "_is_adam", lambda bucket: False)
    expected, by_stacks = fast(shapes, 5, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(optimizer.state_dict()["state"].values(), by_stacks.state_dict()["state"].values()):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
