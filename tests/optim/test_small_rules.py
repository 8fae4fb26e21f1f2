"""Hyperball and the update floor: against slow twins, through checkpoints, and what they leave alone."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stretto.optim import reference
from stretto.optim.cautious import CautiousWeightDecay
from stretto.optim.hyperball import Hyperball
from stretto.optim.update_floor import UpdateFloor

SHAPES = [(4, 3), (5,), (2, 3, 2), ()]
INSIDE = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
}
AROUND = {"hyperball": Hyperball, "update_floor": UpdateFloor}


def _parameters(dtype=torch.float64):
    draws = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)) for shape in SHAPES
    ]


def _give_gradients(params, step):
    draws = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = p.detach() + torch.randn(p.shape, generator=draws, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("rule", AROUND)
@given(
    lrs=st.lists(st.sampled_from([0.0, 1e-3, 0.02, 0.5]), min_size=1, max_size=5),
    floor=st.sampled_from([1e-3, 0.35, 3.0]),
    zero=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_the_rules_equal_their_slow_twins(rule, inside, lrs, floor, zero):
    """Rates change live, a matrix may begin at zero; parameters with fewer than two dims are the other's own."""
    params = _parameters()
    if zero:
        nn.init.zeros_(params[0])
    slow = copy.deepcopy(params)
    plain = INSIDE[inside](slow)
    base = INSIDE[inside](params)
    fast = Hyperball(base) if rule == "hyperball" else UpdateFloor(base, floor)
    radii = [p.norm().item() for p in params]
    for step, lr in enumerate(lrs):
        _give_gradients(params, step)
        fast.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = lr
        fast.step()
        before = [p.detach().clone() for p in slow]
        for p, q in zip(slow, params):
            p.grad = q.grad.clone()
        plain.step()
        for p, start, radius in zip(slow, before, radii):
            if p.ndim > 1:
                taken = p.detach() - start
                p.data = (
                    reference.hyperball(start, taken, lr, radius)
                    if rule == "hyperball"
                    else reference.update_floor(start, taken, lr, floor)
                )
    for p, q in zip(params, slow):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_hyperball_keeps_the_first_norm_and_turns_by_the_rate(dtype, tolerance):
    """The gradient is at right angles to the weight, so each step turns by atan(lr)."""
    w = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype))
    radius = w.float().norm().item()
    optimizer = Hyperball(torch.optim.SGD([w], lr=0.05))
    for step in range(10):
        before = w.detach().float().flatten().clone()
        noise = torch.randn(256, generator=torch.Generator().manual_seed(1 + step))
        w.grad = (noise - before * (noise @ before) / (before @ before)).reshape(16, 16).to(dtype)
        optimizer.step()
        after = w.detach().float().flatten()
        assert after.norm().item() == pytest.approx(radius, rel=tolerance)
        tangent = (after / (after @ before) * (before @ before) - before).norm() / before.norm()
        assert tangent.item() == pytest.approx(0.05, rel=30 * tolerance)


def test_hyperball_by_hand():
    """W = (3, 4), R = 5; u along (1, 0), lr 0.2: (3, 4) - (1, 0) = (2, 4), times 5 / sqrt(20)."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    w.grad = torch.tensor([[7.0, 0.0]], dtype=torch.float64)
    Hyperball(torch.optim.SGD([w], lr=0.2)).step()
    expected = torch.tensor([[2.0, 4.0]], dtype=torch.float64) * 5 / 20**0.5
    torch.testing.assert_close(w.detach(), expected)


@pytest.mark.parametrize(("size", "expected"), [(1.0, 1.25), (10.0, 2.0), (0.0, 1.0)])
def test_update_floor_by_hand(size, expected):
    """W = (3, 4), lr 0.1, floor 0.5: a step is 0.25 long at least, unless it is 0; u = 1 is 0.1, u = 10 is 1."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    w.grad = torch.tensor([[-size, 0.0]], dtype=torch.float64)
    UpdateFloor(torch.optim.SGD([w], lr=0.1), 0.5).step()
    assert w[0, 0].item() == pytest.approx(2 + expected) and w[0, 1].item() == 4


@pytest.mark.parametrize("rule", AROUND)
@pytest.mark.parametrize("inside", INSIDE)
def test_three_steps_and_three_through_a_checkpoint_are_six_bit_for_bit(rule, inside):
    params = _parameters(torch.float32)
    whole = AROUND[rule](INSIDE[inside](params))
    for step in range(3):
        _give_gradients(params, step)
        whole.step()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AROUND[rule](INSIDE[inside](others))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        for optimizer, mine in ((whole, params), (resumed, others)):
            _give_gradients(mine, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others))


@pytest.mark.parametrize(("rule", "option"), [("hyperball", "hyperball"), ("update_floor", "update_floor")])
def test_a_group_that_opts_out_steps_as_the_optimizer_inside_does(rule, option):
    params = _parameters()
    twins = copy.deepcopy(params)
    base = INSIDE["adamw"]([{"params": params[:2], option: 0}, {"params": params[2:]}])
    fast = Hyperball(base) if rule == "hyperball" else UpdateFloor(base, 3.0)
    plain = INSIDE["adamw"](twins)
    fast.param_groups[0]["lr"] = fast.param_groups[1]["lr"] = plain.param_groups[0]["lr"] = 1e-3
    for mine, optimizer in ((params, fast), (twins, plain)):
        _give_gradients(mine, 0)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params[:2], twins[:2]))
    assert not torch.allclose(params[2], twins[2]) and torch.equal(params[3], twins[3])


def test_cautious_decay_around_the_floor_is_no_part_of_the_floored_step():
    """W = (3, 4), lr 0.1, floor 0.5: a step of 0.25 towards zero, then 0.1 * 0.2 * 3 of decay."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    w.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    CautiousWeightDecay(UpdateFloor(torch.optim.AdamW([w], lr=0.1, weight_decay=0.2), 0.5)).step()
    assert w[0, 0].item() == pytest.approx(3 - 0.25 - 0.1 * 0.2 * 3, abs=1e-6)


def test_a_parameter_without_a_gradient_stays():
    params = _parameters()
    before = [p.detach().clone() for p in params]
    for rule in AROUND.values():
        rule(INSIDE["adamw"](params)).step()
    assert all(torch.equal(p, q) for p, q in zip(params, before))


@pytest.mark.parametrize("rule", AROUND.values())
def test_there_must_be_a_matrix(rule):
    with pytest.raises(ValueError, match="two or more dimensions and found none in SGD"):
        rule(torch.optim.SGD([nn.Parameter(torch.ones(3))]))


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan")])
def test_the_floor_must_lie_above_zero(floor):
    with pytest.raises(ValueError, match=f"update_floor is {floor}"):
        UpdateFloor(torch.optim.SGD(_parameters()), floor)
