"""Optimizers around optimizers: against slow twins, through checkpoints, and with what may be inside and outside."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stretto import optim
from stretto.core import Batch, Recipe
from stretto.methods import (
    EMA,
    SGD,
    SWA,
    AdamW,
    CautiousWeightDecay,
    EMANesterov,
    Hyperball,
    Lookahead,
    Muon,
    PrimalAveraging,
    ScheduleFree,
    Shampoo,
    UpdateFloor,
    WarmupStableDecay,
)
from stretto.methods.sgd import DecoupledSGD
from stretto.models.gpt import GPT, next_token_loss
from stretto.optim import reference
from stretto.optim.cautious import decay_cautiously
from stretto.plan import Plan
from stretto.update import Updater

SHAPES = [(4, 3), (5,), (4, 3)]

BASES = {
    "sgd": lambda params: DecoupledSGD(params, lr=0.1, momentum=0.5, weight_decay=0.2),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.3, fused=True),
    "muon": lambda params: optim.Muon(params, lr=0.02, weight_decay=0.1),
    "soap": lambda params: optim.SOAP(params, lr=0.02, weight_decay=0.1, every=2),
}
WRAPPERS = {
    "schedule_free": optim.ScheduleFree,
    "primal_averaging": optim.PrimalAveraging,
    "ema_nesterov": lambda base: optim.EMANesterov(base, 0.6, 0.2),
    "lookahead": lambda base: optim.Lookahead(base, every=2),
    "cautious": optim.CautiousWeightDecay,
    "both": lambda base: optim.Lookahead(optim.CautiousWeightDecay(base), every=2),
}


def _parameters(dtype=torch.float64, shapes=SHAPES):
    draws = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=draws, dtype=torch.float64).to(dtype)) for s in shapes]


def _steps(optimizer, params, first, last, leave_out=()):
    """The gradient is of a bowl, with noise that belongs to the step."""
    for step in range(first, last):
        draws = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            noise = torch.randn(p.shape, generator=draws, dtype=torch.float64).to(p.dtype)
            p.grad = None if (step, i) in leave_out else p.detach() + noise
        optimizer.step()


def _bowl(lr, decay=0.0):
    """The step of decoupled SGD on the bowl, at step `n`, from anywhere."""

    def step(n, shape):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(100 + n), dtype=torch.float64)
        return lambda y: -lr * (y + noise + decay * y)

    return step


# -- against the slow twins


@given(
    interpolation=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    decay=st.sampled_from([0.0, 0.3]),
    rate=st.sampled_from([None, 0.1, 1.0]),
)
@settings(max_examples=20, deadline=None)
def test_averaging_equals_its_slow_twin(interpolation, decay, rate):
    """Decay is taken at y. Rates of Schedule-Free that rise: the square of each is a weight."""
    [p] = _parameters(shapes=[(4, 3)])
    z = x = p.detach().clone()
    base = DecoupledSGD([p], lr=0.1, weight_decay=decay)
    fast = (
        optim.ScheduleFree(base, interpolation)
        if rate is None
        else optim.PrimalAveraging(base, interpolation, averaging_rate=rate)
    )
    total = 0.0
    for n, lr in enumerate([0.02, 0.05, 0.1, 0.1]):
        fast.param_groups[0]["lr"] = lr
        _steps(fast, [p], n, n + 1)
        total += lr**2
        share = lr**2 / total if rate is None else rate
        z, x = reference.averaging(z, x, _bowl(lr, decay)(n, p.shape), interpolation, share)
        torch.testing.assert_close(p.detach(), (1 - interpolation) * z + interpolation * x)
        torch.testing.assert_close(fast.averages()[p], x)


def test_schedule_free_averages_sgd_uniformly_under_a_constant_rate():
    """By hand: z goes 1, 0.9, 0.8 under a gradient of 1 and a rate of 0.1, and x is 0.9, then 0.85."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = optim.ScheduleFree(torch.optim.SGD([p], lr=0.1), 0.5)
    expected = [(0.9, 0.9), (0.85, 0.825)]
    for x, y in expected:
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        assert optimizer.averages()[p].item() == pytest.approx(x)
        assert p.item() == pytest.approx(y)


def test_a_rate_of_zero_moves_no_average():
    [p] = _parameters(shapes=[(3,)])
    before = p.detach().clone()
    optimizer = optim.ScheduleFree(torch.optim.SGD([p], lr=0.0))
    _steps(optimizer, [p], 0, 2)
    assert torch.equal(p.detach(), before) and torch.equal(optimizer.averages()[p], before)


@given(extrapolation=st.sampled_from([0.0, 0.3, 0.9]), rate=st.sampled_from([0.1, 1.0]))
@settings(max_examples=10, deadline=None)
def test_ema_nesterov_equals_its_slow_twin(extrapolation, rate):
    """As the rate falls below its peak, so does the extrapolation."""
    [p] = _parameters(shapes=[(4, 3)])
    x, trend, ahead = p.detach().clone(), torch.zeros(4, 3, dtype=torch.float64), 0.0
    fast = optim.EMANesterov(DecoupledSGD([p], lr=0.1, weight_decay=0.2), extrapolation, rate)
    for n, lr in enumerate([0.05, 0.1, 0.1, 0.02]):
        fast.param_groups[0]["lr"] = lr
        _steps(fast, [p], n, n + 1)
        x, trend = reference.ema_nesterov(x, trend, _bowl(lr, 0.2)(n, p.shape), ahead, rate)
        ahead = extrapolation * lr / max(lr, 0.1 if n else 0.05)
        torch.testing.assert_close(p.detach(), x + ahead * trend)


@given(extrapolation=st.floats(0.05, 0.9), rate=st.floats(0.05, 1.0))
@settings(max_examples=15, deadline=None)
def test_ema_nesterov_and_primal_averaging_are_one_family(extrapolation, rate):
    """With constant coefficients they take the same gradients, from coefficients that can be converted."""
    points = []
    for make in (
        lambda p: optim.EMANesterov(torch.optim.SGD([p], lr=0.02), extrapolation, rate),
        lambda p: optim.PrimalAveraging(
            torch.optim.SGD([p], lr=0.02 / (1 - extrapolation)),
            interpolation=extrapolation,
            averaging_rate=rate * (1 - extrapolation),
        ),
    ):
        [p] = _parameters(shapes=[(4,)])
        optimizer = make(p)
        seen = []
        for n in range(5):
            _steps(optimizer, [p], n, n + 1)
            seen.append(p.detach().clone())
        points.append(torch.stack(seen))
    torch.testing.assert_close(*points)


def test_lookahead_equals_its_slow_twin():
    [p] = _parameters(shapes=[(4, 3)])
    slow, step = p.detach().clone(), _bowl(0.1, 0.2)
    fast = optim.Lookahead(DecoupledSGD([p], lr=0.1, weight_decay=0.2), every=3, lookahead=0.4)
    for round_ in range(2):
        _steps(fast, [p], 3 * round_, 3 * round_ + 3)
        slow = reference.lookahead(slow, [step(3 * round_ + k, p.shape) for k in range(3)], 0.4)
        torch.testing.assert_close(p.detach(), slow)


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_cautious_decay_equals_its_slow_twin(seed):
    draws = torch.Generator().manual_seed(seed)
    before = torch.randint(-3, 4, (50,), generator=draws).double()  # so that some weights and steps are 0
    after = before + torch.randint(-2, 3, (50,), generator=draws)
    expected = reference.cautious_decay(before, after, 0.1)
    decay_cautiously([after], [before], 0.1)
    torch.testing.assert_close(after, expected)


def test_cautious_decay_by_hand():
    """Weights 2, 2, -2, -2, 2 with steps that shrink, grow, shrink, grow and leave them; rate 0.1 * 0.5."""
    p = nn.Parameter(torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0]))
    optimizer = optim.CautiousWeightDecay(DecoupledSGD([p], lr=0.1, weight_decay=0.5))
    p.grad = torch.tensor([10.0, -10.0, -10.0, 10.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 3.0, -0.9, -3.0, 1.9]))
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_cautious_decay_comes_back_after_an_error_inside():
    p = nn.Parameter(torch.ones(2))
    base = DecoupledSGD([p], lr=0.1, weight_decay=0.5)
    base.register_step_pre_hook(lambda *_: 1 / 0)
    p.grad = torch.ones(2)
    with pytest.raises(ZeroDivisionError):
        optim.CautiousWeightDecay(base).step()
    assert base.param_groups[0]["weight_decay"] == 0.5


def test_cautious_decay_without_decay_is_refused():
    with pytest.raises(ValueError, match="looks for groups with weight_decay above 0 and found none in SGD"):
        optim.CautiousWeightDecay(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


# -- as optimizers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_and_three_steps_through_a_checkpoint_equal_six(base, wrapper, dtype):
    """Bit for bit, from weights_only; averages of bfloat16 weights are float32, and stay so."""
    params = _parameters(dtype)
    whole = WRAPPERS[wrapper](BASES[base](params))
    _steps(whole, params, 0, 6)
    early = _parameters(dtype)
    first = WRAPPERS[wrapper](BASES[base](early))
    _steps(first, early, 0, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    late = [nn.Parameter(p.detach().clone()) for p in early]
    second = WRAPPERS[wrapper](BASES[base](late))
    second.load_state_dict(torch.load(file, weights_only=True))
    _steps(second, late, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(params, late))
    mine, other = whole.state_dict(), second.state_dict()
    assert mine["state"].keys() == other["state"].keys() and mine["param_groups"] == other["param_groups"]
    for index, kept in mine["state"].items():
        assert kept.keys() == other["state"][index].keys()
        assert all(torch.equal(kept[k], other["state"][index][k]) for k in kept)
        assert all(kept[k].dtype == torch.float32 for k in kept.keys() & {"z", "x", "trend", "slow"})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_of_the_optimizer_alone_can_be_gone_on_from(wrapper):
    params = _parameters()
    base = BASES["adamw"](params)
    _steps(base, params, 0, 2)
    optimizer = WRAPPERS[wrapper](BASES["adamw"](params))
    optimizer.load_state_dict(base.state_dict())
    _steps(optimizer, params, 2, 4)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_groups_are_the_ones_of_the_optimizer_inside(wrapper):
    """Schedules write into them, after loading a state too."""
    params = _parameters()
    base = BASES["sgd"](params[:2])
    optimizer = WRAPPERS[wrapper](base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = 0.5
        assert base.param_groups[0]["lr"] == 0.5
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.add_param_group({"params": params[2:], "lr": 0.25})
    assert [group["lr"] for group in base.param_groups] == [0.5, 0.25]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1)
    assert base.param_groups[0]["lr"] == pytest.approx(0.05)
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_parameters_without_gradient_stay(wrapper):
    """Frozen ones too; and one whose first gradient comes late begins then."""
    params = _parameters()
    params[1].requires_grad_(False)
    before = [p.detach().clone() for p in params]
    optimizer = WRAPPERS[wrapper](BASES["adamw"](params))
    never = {(step, 1) for step in range(4)}
    _steps(optimizer, params, 0, 1, never | {(0, 2)})
    assert torch.equal(params[1], before[1]) and torch.equal(params[2], before[2])
    assert not torch.equal(params[0], before[0])
    _steps(optimizer, params, 1, 4, never)
    assert torch.equal(params[1], before[1]) and not torch.equal(params[2], before[2])
    assert params[1] not in optimizer.state
    for p in params:
        p.grad = None
    optimizer.step()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_grad_scaler_that_finds_infinity_leaves_everything(wrapper):
    """The optimizer inside is fused and would skip by itself, while what is around it went on."""
    params = _parameters(torch.float32)
    optimizer = WRAPPERS[wrapper](BASES["adamw"](params))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, bad in enumerate([False, True, False]):
        weights = [p.detach().clone() for p in params]
        state = copy.deepcopy(optimizer.state_dict())
        loss = sum((p * p).sum() for p in params) * (float("inf") if bad else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(params, weights))
        assert same is bad, step
        if bad:
            after = optimizer.state_dict()
            assert after["param_groups"] == state["param_groups"]
            for index, kept in state["state"].items():
                assert all(torch.equal(kept[k], after["state"][index][k]) for k in kept)


def test_a_closure_gives_its_loss_and_its_gradients():
    [p] = _parameters(shapes=[(3,)])
    optimizer = optim.ScheduleFree(torch.optim.SGD([p], lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert torch.equal(optimizer.step(closure), (before * before).sum())
    torch.testing.assert_close(optimizer.averages()[p], 0.8 * before)


@pytest.mark.parametrize("wrapper", ["schedule_free", "primal_averaging"])
def test_evaluating_and_going_back_is_the_identity(wrapper):
    params = _parameters(torch.bfloat16)
    optimizer = WRAPPERS[wrapper](BASES["adamw"](params))
    _steps(optimizer, params, 0, 3)
    held = [p.detach().clone() for p in params]
    with pytest.raises(KeyError), optimizer.evaluating():
        averages = optimizer.averages()
        assert all(torch.equal(p.detach(), averages[p].bfloat16()) for p in params)
        raise KeyError
    assert all(torch.equal(a.detach(), b) for a, b in zip(params, held))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda base: optim.ScheduleFree(base, 1.5),
        lambda base: optim.PrimalAveraging(base, averaging_rate=0.0),
        lambda base: optim.EMANesterov(base, 1.0),
        lambda base: optim.EMANesterov(base, 0.5, 2.0),
        lambda base: optim.Lookahead(base, 0),
        lambda base: optim.Lookahead(base, 5, 0.0),
    ],
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match="must"):
        wrong(BASES["sgd"](_parameters()))


# -- in a recipe

TOKENS = torch.randint(0, 17, (24, 9), generator=torch.Generator().manual_seed(1))


def _train(recipe, steps=8, scaler=None):
    model = GPT(17, 8, 8, 1, 2)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.3)
    plan = Plan(recipe, 24, 4, steps=steps)
    update = Updater(recipe, model, next_token_loss, plan, scaler=scaler)
    lrs = []
    for at in plan:
        index = plan.indices(at)
        for part in update(Batch(TOKENS[index, :-1], TOKENS[index, 1:]), at):
            update.loss(model(part.inputs), part.targets).backward()
        lrs.append([group["lr"] for group in update.optimizer.param_groups])
    return update, lrs


@pytest.mark.parametrize("base", [SGD(momentum=0.0), AdamW(betas=(0.0, 0.95)), Muon()], ids=str)
def test_schedule_free_evaluates_with_its_average(base):
    update, lrs = _train(Recipe(base, ScheduleFree(), WarmupStableDecay(warmup=0.5, decay=0.0)))
    assert lrs[0][0] == pytest.approx(lrs[-1][0] / 8) and lrs[4] == lrs[-1]  # warm-up works
    y = {name: p.detach().clone() for name, p in update.model.named_parameters()}
    averages = update.optimizer.averages()
    with update.evaluating():
        for p in update.model.parameters():
            assert torch.equal(p, averages[p])
        assert not torch.equal(update.model.head.weight, y["head.weight"])
    assert all(torch.equal(p, y[name]) for name, p in update.model.named_parameters())


def test_before_the_first_step_the_weights_are_evaluated():
    recipe = Recipe(AdamW(), ScheduleFree())
    model = GPT(17, 8, 8, 1, 2)
    update = Updater(recipe, model, next_token_loss, Plan(recipe, 24, 4, steps=2))
    before = model.head.weight.detach().clone()
    with update.evaluating():
        assert torch.equal(model.head.weight, before)


def test_primal_averaging_takes_its_half_life_from_the_run():
    """Half of the average is of the last half-life: 4 of 8 steps."""
    update, _ = _train(Recipe(AdamW(), PrimalAveraging(half_life=0.5)))
    assert update.optimizer.param_groups[0]["averaging_rate"] == pytest.approx(1 - 0.5 ** (1 / 4))
    with update.evaluating():
        averages = update.optimizer.averages()
        assert torch.equal(update.model.head.weight, averages[update.model.head.weight])


def test_ema_nesterov_goes_ahead_only_in_the_middle():
    method = EMANesterov(0.4, half_life="2 steps", start=0.25, until=0.75)
    plan = Plan(Recipe(), 24, 4, steps=8)
    assert [method.schedule(plan.at(n))["extrapolation"] for n in range(8)] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert method.schedule(plan.at(0))["trend_rate"] == pytest.approx(1 - 0.5**0.5)
    update, _ = _train(Recipe(AdamW(), method, WarmupStableDecay()))
    assert all(group["ahead"] == 0 for group in update.optimizer.param_groups)


def test_lookaheads_part_falls_with_a_power_of_time():
    plan = Plan(Recipe(), 24, 4, steps=8)
    airbench = Lookahead(alpha=0.2, power=3.0)
    assert [airbench.schedule(plan.at(n))["lookahead"] for n in (0, 4)] == pytest.approx([1.0, 0.9])
    assert Lookahead(alpha=0.5).schedule(plan.at(0)) == {"lookahead": 0.5}


def test_caution_sits_inside():
    for outer in (ScheduleFree(), Lookahead(), EMANesterov(), PrimalAveraging()):
        update, _ = _train(Recipe(outer, AdamW(), CautiousWeightDecay()), steps=2)
        inner = update.optimizer.optimizer
        assert isinstance(inner, optim.CautiousWeightDecay)
        assert isinstance(inner.optimizer, torch.optim.AdamW)
        decays = {group["weight_decay"] for group in update.optimizer.param_groups}
        assert decays == {0.1, 0.0}  # vectors' factor still holds


def _norms(model):
    return {name: p.detach().double().norm() for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("base", [AdamW(), Muon(), Shampoo(every=2)], ids=str)
def test_hidden_matrices_stay_on_their_hyperball(base):
    """Through a whole schedule; embeddings and the head grow and shrink as they did."""
    begun, _ = _train(Recipe(base, Hyperball()), steps=1)
    ended, _ = _train(Recipe(base, Hyperball(), WarmupStableDecay()), steps=8)
    first, last = _norms(begun.model), _norms(ended.model)
    moved = {name for name in first if not torch.isclose(first[name], last[name], rtol=1e-5)}
    assert moved == {"tokens.weight", "positions.weight", "head.weight"}


def test_hyperball_stands_in_the_place_of_cautious_decay_inside_averages():
    with pytest.raises(ValueError, match="both want wrap/decay"):
        Recipe(Hyperball(), CautiousWeightDecay())
    update, _ = _train(Recipe(Hyperball(), AdamW(), EMANesterov()), steps=2)
    assert isinstance(update.optimizer.optimizer, optim.Hyperball)


def test_the_update_floor_holds_for_hidden_matrices():
    """A floor of 10 lr ||W|| is above all that Adam does here."""
    floored, _ = _train(Recipe(AdamW(lr=0.01), UpdateFloor(floor=10.0)), steps=1)
    plain, _ = _train(Recipe(AdamW(lr=0.01), UpdateFloor(floor=1e-9)), steps=1)
    begun, _ = _train(Recipe(AdamW(lr=0.0)), steps=1)
    norms = _norms(begun.model)
    before, after, adam = (dict(u.model.named_parameters()) for u in (begun, floored, plain))
    for name, norm in norms.items():
        if name in ("tokens.weight", "positions.weight", "head.weight"):
            assert torch.equal(after[name], adam[name])
        else:
            step = (after[name] - before[name]).detach().double().norm()
            torch.testing.assert_close(step, 0.1 * norm, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("method", [Hyperball(), UpdateFloor()], ids=str)
def test_what_holds_hidden_matrices_says_when_there_are_none(method):
    with pytest.raises(ValueError, match="looks for hidden matrices and found none in Linear; leave"):
        Recipe(method).groups(nn.Linear(2, 2))


def test_averages_exclude_each_other_by_their_phase():
    for inside in (ScheduleFree(), PrimalAveraging()):
        for other in (EMA(), SWA()):
            with pytest.raises(ValueError, match="both want average/average"):
                Recipe(inside, other)
    with pytest.raises(ValueError, match="both want wrap/wrap"):
        Recipe(Lookahead(), ScheduleFree())
    Recipe(EMANesterov(), EMA(start=0.8), CautiousWeightDecay())


def test_a_scaler_in_the_updater_steps_a_wrapper():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaled, _ = _train(Recipe(AdamW(), ScheduleFree()), steps=3, scaler=scaler)
    plain, _ = _train(Recipe(AdamW(), ScheduleFree()), steps=3)
    for a, b in zip(scaled.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ScheduleFree(interpolation=-0.1),
        lambda: PrimalAveraging(half_life=0.0),
        lambda: PrimalAveraging(interpolation=2.0),
        lambda: EMANesterov(extrapolation=1.0),
        lambda: EMANesterov(half_life="0 steps"),
        lambda: EMANesterov(start=0.7, until=0.7),
        lambda: Lookahead(every=0),
        lambda: Lookahead(alpha=0.0),
        lambda: Lookahead(power=-1.0),
        lambda: UpdateFloor(floor=0.0),
    ],
)
def test_methods_refuse_values_out_of_range(wrong):
    with pytest.raises(ValueError):
        wrong()
