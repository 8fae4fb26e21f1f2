"""Optimizers: against torch's, and against slow twins on random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from others import MODELS
from torch import nn

from stretto import optim
from stretto.core import Recipe
from stretto.methods import SGD, SOAP, AdamW, Lion, Muon, Shampoo
from stretto.methods.sgd import DecoupledSGD
from stretto.models.gpt import GPT
from stretto.models.resnet import ResNet
from stretto.optim import reference
from stretto.optim.directions import balance_rows
from stretto.optim.roots import orthogonalize


def _draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _parameters(shapes, dtype=torch.float64):
    return [nn.Parameter(_draw(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def _give_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = _draw(*p.shape, seed=1000 * step + i, dtype=p.dtype)


# -- orthogonal factors


@given(m=st.integers(1, 9), n=st.integers(1, 9), b=st.integers(1, 3), iterations=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_orthogonalize_equals_its_slow_twin(m, n, b, iterations):
    stack = _draw(b, m, n, seed=m * 100 + n * 10 + b)
    expected = torch.stack([reference.orthogonalize(matrix, iterations) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack, iterations), expected, rtol=1e-9, atol=1e-9)


@given(m=st.integers(1, 9), n=st.integers(1, 9), iterations=st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_polar_express_equals_its_slow_twin(m, n, iterations):
    stack = _draw(2, m, n, seed=m * 100 + n * 10)
    expected = torch.stack([reference.orthogonalize(matrix, iterations, "polar") for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack, iterations, "polar"), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_polar_express_converges_where_jordans_polynomial_oscillates(dtype):
    """Singular values from 1e-2 to 1: within 1 % after 8 iterations, though only about 1 with Jordan's."""
    u, _, vh = torch.linalg.svd(_draw(16, 24), full_matrices=False)
    matrix = (u * torch.logspace(-2, 0, 16, dtype=torch.float64)) @ vh
    polar, jordan = (
        torch.linalg.svdvals(orthogonalize(matrix[None].to(dtype), 8, kind)[0].double())
        for kind in ("polar", "jordan")
    )
    assert (polar - 1).abs().max() < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert (jordan - 1).abs().max() > 0.1
    if dtype == torch.float64:
        five = torch.linalg.svdvals(orthogonalize(matrix[None], 5, "polar")[0])
        assert five.min() > 0.85 and five.max() < 1.15


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_singular_values_end_near_one_in_the_same_bases(shape):
    matrix = _draw(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor = u.T @ orthogonalize(matrix[None], 6)[0] @ vh.T
    assert (factor - torch.diag(factor.diagonal())).abs().max() < 1e-6
    assert factor.diagonal().min() > 0.6 and factor.diagonal().max() < 1.3
    assert s.max() / s.min() > 1.5


def test_a_zero_matrix_stays_zero():
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


# -- Muon

shape = st.one_of(
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(2, 4), st.integers(1, 4), st.just(3), st.just(3)),
)


@given(
    shapes=st.lists(shape, min_size=1, max_size=4),
    twice=st.booleans(),
    decay=st.sampled_from([0.0, 0.3]),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
)
@settings(max_examples=30, deadline=None)
def test_the_spectral_half_equals_its_slow_twin(shapes, twice, decay, momentum):
    shapes = shapes * 2 if twice else shapes  # equal shapes are stacked
    params = _parameters(shapes)
    slow = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    fast = optim.Muon(params, 0.1, (momentum, 0.95), weight_decay=decay)
    for step in range(3):
        _give_gradients(params, step)
        fast.step()
        slow = [
            reference.muon(weight, p.grad, average, 0.1, momentum, 5, decay)
            for p, (weight, average) in zip(params, slow)
        ]
    for p, (weight, _) in zip(params, slow):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("twice", [False, True])
def test_normuon_equals_its_slow_twin(twice):
    shapes = [(4, 6), (5, 2, 3, 3)] * (1 + twice)
    params = _parameters(shapes)
    slow = [(p.detach().clone(), torch.zeros_like(p), torch.zeros(len(p), dtype=p.dtype)) for p in params]
    fast = optim.Muon(params, lr=0.1, weight_decay=0.2, coefficients="polar", neuron_beta2=0.9)
    for step in range(3):
        _give_gradients(params, step)
        fast.step()
        for i, (p, (weight, average, squares)) in enumerate(zip(params, slow)):
            average = 0.95 * average + 0.05 * p.grad
            ahead = 0.95 * average + 0.05 * p.grad
            factor = reference.orthogonalize(ahead.reshape(len(ahead), -1), 5, "polar")
            factor, squares = reference.normalize_neurons(factor, squares, 0.9)
            slow[i] = (0.98 * weight - 0.1 * 0.2 * factor.reshape(p.shape), average, squares)
    for p, (weight, _, _) in zip(params, slow):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-8, atol=1e-8)


def test_rows_end_at_one_size_and_the_step_at_its_own():
    """By hand, at first: squares are 0.1 of each row's, so all rows have the same size; root mean square 1."""
    stack = torch.tensor([[[3.0, 3.0], [1.0, -1.0]]], dtype=torch.float64)
    squares = torch.zeros(1, 2, dtype=torch.float64)
    scaled = balance_rows(stack, squares, 0.1)
    torch.testing.assert_close(scaled[0], torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    torch.testing.assert_close(squares[0], torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert not balance_rows(torch.zeros(2, 3, 4), torch.zeros(2, 3), 0.1).any()


def test_unknown_coefficients_are_refused():
    for make in (
        lambda: optim.Muon(_parameters([(2, 2)]), 0.1, coefficients="polr"),
        lambda: Muon(coefficients="x"),
    ):
        with pytest.raises(ValueError, match=r"coefficients is .*; it must be"):
            make()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_other_half_is_adamw(decay):
    ours, theirs = (_parameters([(5,), (4, 3), ()], torch.float32) for _ in range(2))
    mine = optim.Muon(ours, 3e-3, (0.9, 0.95), weight_decay=decay, direction="diagonal")
    torchs = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    for step in range(5):
        for params, optimizer in ((ours, mine), (theirs, torchs)):
            _give_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adamw_equals_its_slow_twin():
    params = _parameters([(5,), (4, 3)])
    slow = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    method = AdamW(lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    fast = method.optimizer(nn.Linear(1, 1), [{"params": params}])
    for step in range(1, 5):
        _give_gradients(params, step)
        fast.step()
        slow = [
            reference.adamw(weight, p.grad, average, square, step, 0.01, (0.8, 0.9), 1e-8, 0.2)
            for p, (weight, average, square) in zip(params, slow)
        ]
    for p, (weight, _, _) in zip(params, slow):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-9, atol=1e-12)


def test_a_muon_step_is_about_as_long_as_adamws():
    """Root mean square 0.2 lr, whatever the shape, so that learning rates carry over."""
    for size in ((64, 64), (32, 128), (128, 32)):
        [p] = _parameters([size])
        before = p.detach().clone()
        _give_gradients([p], 0)
        optim.Muon([p], lr=1.0).step()
        assert (p.detach() - before).square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_parameters_without_gradient_stay():
    params = _parameters([(3, 3), (3, 3)])
    params[0].grad = _draw(3, 3)
    before = params[1].detach().clone()
    optimizer = optim.Muon(params, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(params[1].detach(), before) and params[1] not in optimizer.state


def test_which_parameters_muon_takes():
    recipe = Recipe(Muon(lr=0.03, adam_lr=0.001))
    model = GPT(vocabulary=20, length=8, width=8, depth=1, heads=2)
    groups = Muon(lr=0.03, adam_lr=0.001).optimizer(model, recipe.groups(model)).param_groups
    rule = {
        name: (group["direction"], group["lr"], group["factors"])
        for group in groups
        for name in group["names"]
    }
    assert rule["blocks.0.attention.query.weight"] == ("spectral", 0.03, {})
    assert rule["blocks.0.mlp.output.weight"] == ("spectral", 0.03, {})
    assert rule["tokens.weight"] == rule["head.weight"] == ("diagonal", 0.001, {})
    assert (
        rule["norm.weight"] == rule["blocks.0.mlp.input.bias"] == ("diagonal", 0.001, {"weight_decay": 0.0})
    )
    assert len(rule) == len(list(model.parameters()))


def test_convolutions_are_matrices_and_the_head_is_not():
    model, recipe = ResNet(1, 3, (4, 8)), Recipe(Muon())
    groups = Muon().optimizer(model, recipe.groups(model)).param_groups
    spectral = {name for group in groups if group["direction"] == "spectral" for name in group["names"]}
    assert "blocks.0.conv1.weight" in spectral and "head.weight" not in spectral


def test_muon_without_hidden_matrices_is_refused():
    with pytest.raises(ValueError, match="looks for hidden matrices"):
        Muon().optimizer(nn.Linear(2, 2), Recipe(Muon()).groups(nn.Linear(2, 2)))


# -- Shampoo and SOAP


def _regions(method, model):
    """The first region of each parameter, by name."""
    optimizer = method.optimizer(model, Recipe(method).groups(model))
    return {region.name: region for region in reversed(list(optimizer.layout))}


@pytest.mark.parametrize("method", [Shampoo(), SOAP()], ids=str)
def test_matrices_have_two_sides_tables_one_and_vectors_none(method):
    found = _regions(method, GPT(vocabulary=20, length=8, width=12, depth=1, heads=2))
    assert found["blocks.0.mlp.output.weight"].sides == (0, 1)
    assert found["tokens.weight"].sides == found["head.weight"].sides == (1,)
    assert found["positions.weight"].sides == (0,)
    assert found["norm.weight"].direction == found["blocks.0.mlp.input.bias"].direction == "diagonal"
    assert len(found) == len(list(GPT(20, 8, 12, 1, 2).parameters()))


@pytest.mark.parametrize("method", [Shampoo(tables="diagonal"), SOAP(tables="diagonal")], ids=str)
def test_tables_may_step_by_adam(method):
    found = _regions(method, GPT(vocabulary=20, length=8, width=12, depth=1, heads=2))
    tables = {name for name, region in found.items() if region.direction == "diagonal" and "norm" not in name}
    assert {"tokens.weight", "positions.weight", "head.weight"} <= tables
    assert found["blocks.0.mlp.output.weight"].sides == (0, 1)


@pytest.mark.parametrize("method", [Shampoo(), Shampoo(direction="one_sided"), SOAP()], ids=str)
def test_a_fused_projection_is_cut_by_its_heads(method):
    """timm's (3 heads size, D), 2 heads of 8: six parts. GPT-2 has its own as (D, 3 heads size), left whole."""
    found = _regions(method, MODELS["timm_vit"].model())
    assert (found["blocks.0.attn.qkv.weight"].dims, found["blocks.0.attn.qkv.weight"].count) == ((8, 16), 6)
    assert found["blocks.0.attn.qkv.bias"].direction == "diagonal"
    assert found["blocks.0.attn.proj.weight"].count == 1
    found = _regions(method, MODELS["gpt2"].model())
    assert found["transformer.h.0.attn.c_attn.weight"].dims == (16, 48)


def test_a_power_is_that_of_hidden_matrices():
    """Where one side is left it would be far from 1/2, which fits one side whatever two sides have."""
    model = GPT(vocabulary=20, length=8, width=12, depth=1, heads=2)
    method = Shampoo(power=1 / 3, direction="kl")
    groups = method.optimizer(model, Recipe(method).groups(model)).param_groups
    assert {(g["direction"], g["power"]) for g in groups} == {("one_sided", None), ("kl", 1 / 3)}


def test_soap_before_muon_is_for_hidden_matrices():
    model, method = GPT(vocabulary=20, length=8, width=12, depth=1, heads=2), SOAP(then="orthogonalize")
    groups = method.optimizer(model, Recipe(method).groups(model)).param_groups
    then = {name: group["then"] for group in groups for name in group["names"]}
    assert then["blocks.0.mlp.output.weight"] == "orthogonalize"
    assert then["head.weight"] is None and then["tokens.weight"] is None


def test_before_the_first_refresh_shampoo_is_adamw():
    steps = []
    for method in (Shampoo(lr=0.01, betas=(0.9, 0.95), start=100), AdamW(lr=0.01)):
        model = MODELS["text"].model(torch.float64)
        optimizer = method.optimizer(model, Recipe(method).groups(model))
        for group in optimizer.param_groups:
            group["weight_decay"] *= group["factors"].get("weight_decay", 1.0)
        for step in range(3):
            _give_gradients(model.parameters(), step)
            optimizer.step()
        steps.append(list(model.parameters()))
    for a, b in zip(*steps):
        torch.testing.assert_close(a, b)


# -- SGD


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgds_decay_is_outside_the_gradient(nesterov):
    params = _parameters([(4, 3), (5,)])
    slow = [(p.detach().clone(), None) for p in params]
    fast = DecoupledSGD(params, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    for step in range(4):
        _give_gradients(params, step)
        fast.step()
        for i, (p, (weight, buffer)) in enumerate(zip(params, slow)):
            buffer = p.grad if buffer is None else 0.9 * buffer + p.grad
            move = p.grad + 0.9 * buffer if nesterov else buffer
            slow[i] = ((1 - 0.1 * 0.2) * weight - 0.1 * move, buffer)
    for p, (weight, _) in zip(params, slow):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-10, atol=1e-12)
    assert fast.param_groups[0]["weight_decay"] == 0.2


def test_sgd_steps_where_a_group_has_no_gradient():
    """A frozen branch, or a step without any gradient, once made an empty list of tensors."""
    [p, q] = _parameters([(2, 2), (2, 2)])
    optimizer = DecoupledSGD([{"params": [p]}, {"params": [q]}], lr=0.1, weight_decay=0.1)
    q.grad = _draw(2, 2)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)


# -- Lion


def test_lion_equals_its_slow_twin():
    params = _parameters([(5,), (4, 3)])
    slow = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    method = Lion(lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    fast = method.optimizer(nn.Linear(1, 1), [{"params": params}])
    for step in range(4):
        _give_gradients(params, step)
        fast.step()
        slow = [
            reference.lion(weight, p.grad, average, 0.01, (0.8, 0.9), 0.2)
            for p, (weight, average) in zip(params, slow)
        ]
    for p, (weight, average) in zip(params, slow):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fast.state[p]["average"], average)


def test_lion_passes_over_what_has_no_gradient():
    params = _parameters([(3,), (3,)])
    params[0].grad = torch.ones(3, dtype=torch.float64)
    before = params[1].detach().clone()
    optimizer = optim.Lion(params, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(params[1].detach(), before) and params[1] not in optimizer.state


# -- decay groups


@pytest.mark.parametrize("method", [AdamW(), SGD(), Muon(), Shampoo(), SOAP(), Lion()], ids=str)
def test_vectors_norms_and_biases_do_not_decay(method):
    recipe, model = Recipe(method), GPT(vocabulary=20, length=8, width=8, depth=1, heads=2)
    decayed = {n for group in recipe.groups(model) if not group["factors"] for n in group["names"]}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: AdamW(lr=-1.0),
        lambda: AdamW(betas=(0.9, 1.0)),
        lambda: SGD(momentum=-0.1),
        lambda: SGD(weight_decay=-1.0),
        lambda: Muon(adam_lr=-1.0),
        lambda: Muon(iterations=0),
        lambda: Muon(momentum=1.0),
        lambda: Muon(neuron_beta2=1.0),
        lambda: Shampoo(ridge_eps=-1.0),
        lambda: Shampoo(betas=(1.0, 0.9)),
        lambda: Shampoo(betas=(0.9, 1.1)),
        lambda: Shampoo(power=0.0),
        lambda: Shampoo(start=0),
        lambda: Shampoo(direction="soap"),
        lambda: Shampoo(graft="adm"),
        lambda: Shampoo(storage="float16"),
        lambda: SOAP(betas=(0.9, 1.0)),
        lambda: SOAP(every=0),
        lambda: SOAP(block=0),
        lambda: SOAP(then="polar"),
        lambda: SOAP(tables="two_sided"),
        lambda: Lion(lr=-1.0),
        lambda: Lion(betas=(0.9, 1.0)),
    ],
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"must|cannot"):
        wrong()
