"""Going on from a checkpoint, a copy or a pickle, bit for bit; and checkpoints that are of another layout."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stretto.optim import Hyperball, Lookahead, ScheduleFree
from stretto.optim.regions import DIRECTIONS
from stretto.optim.shampoo import Shampoo

SHAPES = [(10, 7), (4, 4), (3, 5), (7,), (3, 2, 3, 3), ()]  # whole blocks and remainders of blocks of 4
KINDS: dict[str, dict[str, Any]] = {
    **{direction: {"direction": direction} for direction in DIRECTIONS},
    "soapmuon": {"direction": "soap", "then": "orthogonalize"},
    "normuon": {"direction": "spectral", "neuron_beta2": 0.9},
    "sums": {"betas": (0.9, 1.0), "graft": "adagrad"},
    "velocity": {"direction": "kl", "momentum": 0.9, "graft": "rmsprop"},
    "full matrix": {"full_matrix_up_to": 7, "graft": None},
    "bfloat16": {"storage": "bfloat16", "products": "bfloat16"},
    "soap in bfloat16": {"direction": "soap", "storage": "bfloat16"},
    "orthogonal iteration": {"root": "qr"},
}
WRAPPERS: dict[str, Callable[[Optimizer], Optimizer]] = {
    "lookahead": lambda optimizer: Lookahead(optimizer, every=2),
    "schedule-free": ScheduleFree,
    "hyperball": Hyperball,
}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for shape in SHAPES]


def shampoo(params: Sequence[Tensor], **options: Any) -> Shampoo:
    return Shampoo(params, 0.05, **{"block": 4, "every": 2, "weight_decay": 0.1, **options})


def step(params: Sequence[Tensor], optimizer: Optimizer, steps: Sequence[int]) -> None:
    """Steps on gradients that follow the weights, with noise."""
    for number in steps:
        draws = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = p.detach() + torch.randn(p.shape, generator=draws).to(p.dtype)
        optimizer.step()


def equal(params: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def copies(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("carry", [copies, through_a_file])
def test_3_and_3_steps_through_a_checkpoint_equal_6(
    kind: str, carry: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Into a fresh optimizer, whose rate, betas and decay then are the checkpoint's."""
    options = {"every": 2, **KINDS[kind]}
    whole = parameters()
    optimizer = shampoo(whole, **options)
    step(whole, optimizer, range(6))

    first = parameters()
    optimizer = shampoo(first, **options)
    step(first, optimizer, range(3))
    saved = carry(optimizer.state_dict())
    second = [nn.Parameter(p.detach().clone()) for p in first]
    fresh = shampoo(second, **{**options, "betas": (0.5, 0.6), "weight_decay": 0.0})
    fresh.load_state_dict(saved)
    step(second, fresh, range(3, 6))
    equal(second, whole)


def test_the_interval_of_a_checkpoint_gives_the_turns() -> None:
    """Stacks made in loading had the turns of the interval before it."""
    params = parameters()
    optimizer = shampoo(params, every=2)
    step(params, optimizer, range(3))
    fresh = shampoo(params, every=50)
    fresh.load_state_dict(copies(optimizer.state_dict()))
    assert fresh.param_groups[0]["every"] == 2
    assert [bucket.phases for bucket in fresh.buckets] == [bucket.phases for bucket in optimizer.buckets]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_missed_steps_go_on_too(kind: str) -> None:
    """To rounding alone: after loading they may share a stack with others, or have one that they shared."""
    options = {"ridge_eps": 1e-2, **KINDS[kind]}

    def steps(params: Sequence[Tensor], optimizer: Optimizer, numbers: Sequence[int]) -> None:
        for number in numbers:
            draws = torch.Generator().manual_seed(number)
            for i, p in enumerate(params):
                gradient = p.detach() + torch.randn(p.shape, generator=draws)
                p.grad = None if (number + i) % 7 == 3 else gradient
            optimizer.step()

    whole, part = parameters(), parameters()
    steps(whole, shampoo(whole, **options), range(6))
    optimizer = shampoo(part, **options)
    steps(part, optimizer, range(3))
    fresh = shampoo(part, **options)
    fresh.load_state_dict(copies(optimizer.state_dict()))
    steps(part, fresh, range(3, 6))
    for p, q in zip(part, whole):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_weights_in_bfloat16_go_on(rounding: str) -> None:
    whole, part = parameters(torch.bfloat16), parameters(torch.bfloat16)
    step(whole, shampoo(whole, rounding=rounding), range(6))
    optimizer = shampoo(part, rounding=rounding)
    step(part, optimizer, range(3))
    fresh = shampoo(part, rounding=rounding)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    step(part, fresh, range(3, 6))
    equal(part, whole)


def test_a_checkpoint_replaces_what_an_optimizer_has() -> None:
    """One that has stepped; and one from before any step sets it back to the beginning."""
    params = parameters()
    optimizer = shampoo(params)
    begin = copies(optimizer.state_dict())
    start = [p.detach().clone() for p in params]
    step(params, optimizer, range(3))
    saved = copies(optimizer.state_dict())
    middle = [p.detach().clone() for p in params]
    found = []
    for state, weights, steps in ((saved, middle, range(3, 6)), (begin, start, range(6))):
        for p, value in zip(params, weights):
            p.data.copy_(value)
        optimizer.load_state_dict(state)
        step(params, optimizer, steps)
        found.append([p.detach().clone() for p in params])
    equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_pickle_go_on_alike(kind: str) -> None:
    """With the parameters that they hold; they share nothing with the first."""
    params = parameters()
    optimizer = shampoo(params, **KINDS[kind])
    step(params, optimizer, range(3))
    others = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    step(params, optimizer, range(3, 6))
    for theirs, other in others:
        assert other.param_groups[0]["params"][0] is theirs[0]
        step(theirs, other, range(3, 6))
        equal(theirs, params)


def test_a_copy_has_the_names_counts_and_groups_of_the_first() -> None:
    params = parameters()
    names = [f"layer{i}" for i in range(len(params))]
    groups = [
        {"params": list(zip(names, params))[:3], "direction": "soap"},
        {"params": list(zip(names, params))[3:], "every": 3},
    ]
    optimizer = Shampoo(groups, 0.05, block=4)
    step(params, optimizer, range(4))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert str(other.layout) == str(optimizer.layout)
        assert [group["calls"] for group in other.param_groups] == [4, 4]
        assert other.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["root", "soap", "kl", "spectral"])
def test_inside_a_wrapper_too(wrapper: str, kind: str) -> None:
    wrap, options = WRAPPERS[wrapper], KINDS[kind]
    whole, part = parameters(), parameters()
    step(whole, wrap(shampoo(whole, **options)), range(6))
    optimizer = wrap(shampoo(part, **options))
    step(part, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    fresh = wrap(shampoo(part, **options))
    fresh.load_state_dict(saved)
    step(part, fresh, range(3, 6))
    equal(part, whole)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_copy_of_a_wrapper_goes_on_alike(wrapper: str) -> None:
    """A copy of Lookahead had no `every`."""
    params = parameters()
    optimizer = WRAPPERS[wrapper](shampoo(params))
    step(params, optimizer, range(3))
    others = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    step(params, optimizer, range(3, 6))
    for theirs, other in others:
        step(theirs, other, range(3, 6))
        equal(theirs, params)


def test_the_state_is_plain_tensors_under_plain_keys() -> None:
    """For each parameter by its index; what blocks of several sizes keep has the number of the part."""
    params = parameters()
    optimizer = shampoo(params)
    step(params, optimizer, [0])
    saved = optimizer.state_dict()
    for index, kept in saved["state"].items():
        assert isinstance(index, int)
        assert all(isinstance(name, str) and type(value) is Tensor for name, value in kept.items())
    assert saved["state"][1].keys() == {
        "step", "updates", "factor0", "factor1", "root0", "root1", "refreshed", "failures", "momentum", "square",
    }  # fmt: skip
    assert saved["state"][0].keys() >= {"root0", "root0.1", "root0.2", "root0.3"}


# -- checkpoints of another layout


def refused(saved: dict[str, Any], params: list[nn.Parameter], optimizer: Shampoo, message: str) -> None:
    """The checkpoint is refused with what differs, and the optimizer goes on as if it had never been."""
    twins, twin = copy.deepcopy((params, optimizer))
    before = copies(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert repr(after["param_groups"]) == repr(before["param_groups"])
    for index, kept in before["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in kept.items())
    step(params, optimizer, range(3, 6))
    step(twins, twin, range(3, 6))
    equal(params, twins)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "checkpoint has block=5 in group 0, this optimizer 4"),
        ({"direction": "soap"}, "checkpoint has direction='soap' in group 0, this optimizer 'root'"),
        ({"storage": "bfloat16"}, "checkpoint has storage='bfloat16' in group 0, this optimizer None"),
        ({"graft": "sgd"}, "checkpoint has graft='sgd' in group 0, this optimizer 'auto'"),
        ({"merge": "none"}, "checkpoint has merge='none' in group 0, this optimizer 'dims'"),
        ({"root": "qr"}, "checkpoint has root='qr' in group 0, this optimizer 'auto'"),
        ({"one_sided_above": 1.0}, "checkpoint has one_sided_above=1.0 in group 0, this optimizer 6.0"),
        ({"full_matrix_up_to": 7}, "checkpoint has full_matrix_up_to=7 in group 0, this optimizer 0"),
        ({"rounding": "compensated"}, "rounding='compensated' in group 0, this optimizer 'nearest'"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(options: dict[str, Any], message: str) -> None:
    params, others = parameters(), parameters()
    optimizer, other = shampoo(params), shampoo(others, **options)
    step(params, optimizer, range(3))
    step(others, other, range(3))
    refused(other.state_dict(), params, optimizer, message)


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    params, others = parameters(), parameters()
    optimizer = shampoo(params)
    other = shampoo([{"params": others[:2]}, {"params": others[2:]}])
    step(params, optimizer, range(3))
    step(others, other, range(3))
    refused(other.state_dict(), params, optimizer, r"groups of \[2, 4\] parameters, this optimizer of \[6\]")


def test_a_checkpoint_of_other_shapes_is_refused() -> None:
    """Found at the last parameter, when all before it fitted."""
    params, others = parameters(), parameters()
    others[-2] = nn.Parameter(torch.ones(3, 2, 3, 2))
    optimizer, other = shampoo(params), shampoo(others)
    step(params, optimizer, range(3))
    step(others, other, range(3))
    message = r"of parameter 4 should have shape \(.*\), and the checkpoint has .*; it is of another layout"
    refused(other.state_dict(), params, optimizer, message)


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    params, others = parameters(), parameters()
    optimizer, other = shampoo(params), torch.optim.AdamW(others, 0.1)
    step(params, optimizer, range(3))
    step(others, other, range(3))
    refused(
        other.state_dict(), params, optimizer, "should have shape .* checkpoint has none; it is of another"
    )


def test_options_that_the_state_depends_on_stay_as_they_are() -> None:
    params = parameters()
    optimizer = shampoo(params)
    step(params, optimizer, range(2))
    optimizer.param_groups[0]["block"] = 8
    with pytest.raises(ValueError, match="block was changed from 4 to 8; it is fixed once a group is added"):
        step(params, optimizer, [2])
