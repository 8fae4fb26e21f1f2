"""Stochastic depth and progressive layer drop: how many rows pass a block by, which, and what they are then."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from others import MODELS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from stretto.core import At, Batch, Recipe
from stretto.methods import AdamW, ALiBi, ProgressiveLayerDrop, RotaryPositions, StochasticDepth
from stretto.methods._rows import Residual, Sometimes, divide, dropped_rows, each_tensor, join, residuals
from stretto.methods.progressive_layer_drop import FallingDepth, keep_rate
from stretto.methods.stochastic_depth import skip_patterns
from stretto.models.gpt import GPT, next_token_loss
from stretto.models.resnet import ResNet
from stretto.models.roles import roles
from stretto.plan import Plan
from stretto.timed import Timed
from stretto.update import Updater


def _at(step=0, steps=10, seed=3):
    return At(step, steps, 0, done=8 * step, planned=8 * steps, seed=seed, batch=8)


def _advance(model, at=None, row=0):
    for module in model.modules():
        if isinstance(module, Timed):
            module.advance(at or _at(), row)


def _gpt(depth=4):
    torch.manual_seed(0)
    return GPT(vocabulary=20, length=8, width=16, depth=depth, heads=2)


def _tokens(n=8):
    return torch.randint(0, 20, (n, 8), generator=torch.Generator().manual_seed(1))


def _still(model):
    """Without draws of its own, and without company in batch norm, but training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


# -- how many


@pytest.mark.parametrize(
    "rows, begin, end, expected",
    [
        (10, 0.0, 0.1, 1),
        (4, 0.0, 0.1, 0),
        (4, 0.1, 0.3, 1),  # what was rounded off before is made up for
        (8, 0.25, 0.75, 4),
        (8, 0.0, 0.99, 7),
        (1, 0.0, 0.9, 0),  # one row at least runs
    ],
)
def test_dropped_rows(rows, begin, end, expected):
    assert dropped_rows(rows, begin, end) == expected


@given(st.integers(1, 64), st.lists(st.floats(0, 0.5), min_size=1, max_size=24))
def test_dropped_rows_add_up_over_depth(rows, rates):
    ends = list(itertools.accumulate(rates, initial=0.0))
    dropped = [dropped_rows(rows, a, b) for a, b in itertools.pairwise(ends)]
    assert all(0 <= d < rows or rows == 1 for d in dropped)
    assert all(abs(d - rows * rate) <= 1 + 1e-9 for d, rate in zip(dropped, rates))
    if rows > 2:
        assert abs(sum(dropped) - rows * sum(rates)) <= 0.5 + 1e-9


@pytest.mark.parametrize("linear, expected", [(True, [0.1, 0.2, 0.3, 0.4]), (False, [0.4] * 4)])
def test_rates_by_depth(linear, expected):
    blocks = residuals("StochasticDepth", _gpt(), linear)
    assert [0.4 * (block.end - block.begin) for block in blocks] == pytest.approx(expected)


def test_blocks_that_change_the_shape_always_run():
    blocks = residuals("StochasticDepth", ResNet(1, 3, (4, 8), blocks_per_stage=2), linear=True)
    assert [(block.number, block.scaled) for block in blocks] == [(1, "branch"), (2, "branch"), (4, "branch")]
    assert blocks[-1].end == pytest.approx(1 / 4 + 2 / 4 + 4 / 4)


# -- what they are


def _expected(x, plain, chance, block):
    """What a block gives where it runs with this chance, from what it gives plainly."""
    if block.scaled == "nothing":
        return plain
    scaled = x + (plain - x) / chance
    return scaled.relu() if block.scaled == "branch" else scaled


def test_a_relu_after_the_addition_is_that_of_the_scaled_branch():
    """So `_expected` may ask what a block with a ReLU gives plainly, though its branch is scaled inside."""
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(1000, generator=generator).relu(), torch.randn(1000, generator=generator)
    block = Residual(nn.Identity(), 1, 0.0, 1.0, "branch")
    torch.testing.assert_close(_expected(x, F.relu(x + branch), 0.8, block), F.relu(x + branch / 0.8))


@pytest.mark.parametrize("scaled, expected", [("block", [5.0, -2.0]), ("nothing", [3.0, 0.0])])
def test_scaling_by_hand(scaled, expected):
    layer = Sometimes(Residual(nn.Identity(), 1, 0.0, 1.0, scaled))
    y, more = layer.with_chance(
        0.5, lambda x: (torch.tensor([3.0, 0.0]), "weights"), torch.tensor([1.0, 2.0])
    )
    assert y.tolist() == expected and more == ["weights"]


def test_a_branch_is_scaled_at_its_end_and_only_while_it_runs_by_chance():
    branch = nn.Identity()
    layer = Sometimes(Residual(nn.Identity(), 1, 0.0, 1.0, "branch", branch))
    x = torch.tensor([1.0, 2.0])
    y, _ = layer.with_chance(0.5, lambda x: F.relu(x - branch(x)), x)
    assert y.tolist() == [0.0, 0.0] and branch(x) is x
    with pytest.raises(ZeroDivisionError):
        layer.with_chance(0.5, lambda x: 1 / 0, x)
    assert layer.factor == 1.0


def test_the_mean_over_all_choices_of_rows_is_the_plain_block():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer, outcomes = Sometimes(Residual(nn.Identity(), 1, 0.0, 1.0, "block")), []
    for order in itertools.permutations(range(5)):
        rows, rest = torch.tensor(order[:3]), torch.tensor(order[3:])
        mine, passing = divide(x, rows, rest)
        y, _ = layer.with_chance(3 / 5, lambda x: x + torch.tanh(x), mine)
        outcomes.append(join(y, passing, rows, rest))
    torch.testing.assert_close(torch.stack(outcomes).mean(0), x + torch.tanh(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_divided_and_joined_in_the_memory_format(memory_format):
    x = torch.arange(4 * 2 * 3 * 3.0).view(4, 2, 3, 3).to(memory_format=memory_format)
    rows, rest = torch.tensor([2, 0]), torch.tensor([1, 3])
    kept, passing = divide(x, rows, rest)
    joined = join(-kept, passing, rows, rest)
    assert torch.equal(kept, x[[2, 0]]) and torch.equal(passing, x[[1, 3]])
    assert torch.equal(joined, x * torch.tensor([-1, 1, -1, 1]).view(4, 1, 1, 1))
    assert all(t.is_contiguous(memory_format=memory_format) for t in (kept, passing, joined))


def test_gradients_of_dividing_and_joining():
    rows, rest = torch.tensor([2, 0, 4]), torch.tensor([1, 3])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def through(x):
        kept, passing = divide(x, rows, rest)
        return join(kept.sin() * kept, passing, rows, rest)

    assert torch.autograd.gradcheck(through, x) and torch.autograd.gradgradcheck(through, x)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_rows_that_run_get_the_plain_block_and_the_others_pass(name):
    """With their own masks and positions, and with inputs that operations in place leave alone."""
    world = MODELS[name]
    model = Recipe(StochasticDepth(0.5)).model(_still(world.model(torch.float64)))
    blocks = {block.module: block for block in residuals("StochasticDepth", model, True)}
    given, seen = {}, []
    for module in blocks:
        module.register_forward_pre_hook(lambda m, args: given.update({m: args[0].clone()}))
        module.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    _advance(model)
    world.run(model, world.batch(slice(0, 6), torch.float64).inputs)
    total = 0
    for module, args, kwargs, out in list(seen):
        block, x = blocks[module], given[module]
        passed = (out == x).flatten(1).all(1)
        dropped = dropped_rows(6, 0.5 * block.begin, 0.5 * block.end)
        module.around["rows"].eval()
        plain = module.forward(x, *args[1:], **kwargs)
        assert passed.sum() == dropped
        expected = _expected(x, plain, (6 - dropped) / 6, block)
        torch.testing.assert_close(out[~passed], expected[~passed])
        total += dropped
    assert len(seen) == len(blocks) and total > 0


@pytest.mark.parametrize("positions", [RotaryPositions(), ALiBi()], ids=str)
def test_rows_keep_the_places_of_their_tokens(positions):
    """Hugging Face users may give each row its positions: those that run are to have their own."""
    world = MODELS["gpt2"]
    model = Recipe(positions, StochasticDepth(0.5)).model(_still(world.model(torch.float64)))
    last = roles(model).blocks[-1]
    calls = []
    last.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    _advance(model)
    inputs = world.batch(slice(0, 4)).inputs["input_ids"]
    own = torch.arange(16) // torch.arange(1, 5)[:, None]
    model(input_ids=inputs, position_ids=own)
    last.around["rows"].eval()
    [(_, args, kwargs, out)] = calls
    ran = (out != args[0]).flatten(1).any(1)
    x, plain = args[0], last.forward(*args, **kwargs)
    assert ran.sum() == 2
    torch.testing.assert_close(out[ran], (x + (plain - x) / 0.5)[ran])


# -- which


def _kept(model, at=None, row=0):
    """For each block, which rows ran."""
    ran, hooks = [], []
    for block in model.blocks:
        hook = block.register_forward_hook(
            lambda m, args, out: ran.append((out != args[0]).flatten(1).any(1))
        )
        hooks.append(hook)
    _advance(model, at, row)
    with torch.no_grad():
        model(_tokens())
    for hook in hooks:
        hook.remove()
    return torch.stack(ran)


def test_rows_are_drawn_for_each_layer_step_seed_and_micro_batch():
    model = Recipe(StochasticDepth(0.5, linear=False)).model(_gpt())
    here = _kept(model)
    assert torch.equal(here, _kept(model)) and here.sum(1).tolist() == [4, 4, 4, 4]
    assert len({tuple(row) for row in here.tolist()}) > 1
    for other in (_kept(model, _at(step=1)), _kept(model, _at(seed=4)), _kept(model, row=8)):
        assert other.sum(1).tolist() == [4, 4, 4, 4] and not torch.equal(here, other)


def test_all_rows_are_dropped_equally_often():
    model = Recipe(StochasticDepth(0.5, linear=False)).model(_gpt(depth=2))
    counts = sum(_kept(model, _at(step, 400)).sum(0) for step in range(200))
    assert (counts / 400 - 0.5).abs().max() < 0.11  # 4 standard deviations


def test_evaluation_is_plain():
    plain, model = _gpt().eval(), Recipe(StochasticDepth(0.5)).model(_gpt()).eval()
    _advance(model)
    assert torch.equal(plain(_tokens()), model(_tokens()))
    assert plain.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("n", [1, 2, 8])
def test_every_parameter_has_a_gradient_by_sample(n):
    """DDP waits for all of them."""
    model = Recipe(StochasticDepth(0.9)).model(_gpt())
    _advance(model)
    model(_tokens(n)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not StochasticDepth().leaves_unused and StochasticDepth(by="batch").leaves_unused


def test_half_precision_and_autocast():
    model = Recipe(StochasticDepth(0.5)).model(_gpt().bfloat16())
    _advance(model)
    assert model(_tokens()).dtype == torch.bfloat16
    model = Recipe(StochasticDepth(0.5)).model(ResNet(1, 3, (4, 8)))
    _advance(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 1, 6, 6)).float().sum().backward()


def test_blocks_that_checkpoint_themselves_find_their_places_again():
    """Recomputed in the backward pass, the rows that ran would have found the places of all."""
    tokens = MODELS["gpt2"].batch(slice(0, 4)).inputs["input_ids"]
    own = torch.arange(16) // torch.arange(1, 5)[:, None]
    gradients = []
    for checkpointed in (False, True):
        model = Recipe(RotaryPositions(), StochasticDepth(0.5)).model(_still(MODELS["gpt2"].model()))
        if checkpointed:
            model.activation_checkpointing_enable()
        _advance(model)
        logits = model(input_ids=tokens, position_ids=own).logits
        gradients.append(torch.autograd.grad(logits.square().mean(), list(model.parameters())))
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


def test_recomputed_blocks_draw_the_same_rows():
    plain, model = (Recipe(StochasticDepth(0.5)).model(_gpt()) for _ in range(2))
    for block in model.blocks:
        kept = block.forward
        block.forward = lambda *args, kept=kept, **kw: checkpoint(kept, *args, use_reentrant=False, **kw)
    for net in (plain, model):
        _advance(net)
        net(_tokens()).square().mean().backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_a_cache_in_training_is_refused():
    world = MODELS["gpt2"]
    model = Recipe(StochasticDepth(0.5)).model(world.model())
    _advance(model)
    inputs = world.batch(slice(0, 4)).inputs
    with pytest.raises(
        ValueError, match="cannot with a DynamicCache for all of them; train with use_cache=False"
    ):
        model(**inputs, use_cache=True)
    model.eval()(**inputs, use_cache=True)


class Context(NamedTuple):
    tokens: torch.Tensor
    window: int


def test_each_tensor_goes_through_what_blocks_are_given():
    one = torch.ones(1)
    given = ([one, None, 3, "a"], {"b": (one, True)}, Context(one, 5))
    doubled = each_tensor(lambda t: 2 * t, given)
    assert doubled == ([2 * one, None, 3, "a"], {"b": (2 * one, True)}, Context(2 * one, 5))
    assert isinstance(doubled[2], Context)


# -- by batch


@given(st.lists(st.floats(0, 0.9), min_size=1, max_size=24), st.integers(2, 6), st.integers(0, 9))
def test_patterns_have_the_wanted_rates(rates, count, seed):
    patterns = skip_patterns(rates, count, seed)
    assert len(patterns) == count and all(len(pattern) == len(rates) for pattern in patterns)
    sizes = [sum(pattern) for pattern in patterns]
    assert max(sizes) - min(sizes) <= 1
    for layer, rate in enumerate(rates):
        skips = sum(pattern[layer] for pattern in patterns)
        assert skips <= count - 1 and (abs(skips - count * rate) < 1 + 1e-9 or skips == count - 1)
    if max(rates) <= 1 - 1 / count:
        assert abs(sum(sizes) - count * sum(rates)) < 1 + 1e-6


def test_the_mean_over_seeds_is_the_wanted_rate():
    rates = [0.05, 0.1, 0.3]
    patterns = torch.tensor([skip_patterns(rates, 4, seed) for seed in range(600)]).float()
    assert (patterns.mean((0, 1)) - torch.tensor(rates)).abs().max() < 0.03


def _skipping(steps=40, depth=4, **fields):
    recipe = Recipe(StochasticDepth(0.6, by="batch", **fields), AdamW())
    model = recipe.model(_gpt(depth))
    return model, Updater(recipe, model, next_token_loss, Plan(recipe, 64, 8, steps=steps))


def test_skipped_layers_pass_the_stream_on_and_have_no_gradients():
    model, update = _skipping()
    patterns = set()
    for at in update.plan:
        for part in update(Batch(_tokens(), _tokens()), at):
            update.loss(model(part.inputs), part.targets).backward()
            patterns.add(tuple(block.mlp.input.weight.grad is None for block in model.blocks))
    pattern = model.blocks[0].around["rows"].pattern
    assert patterns == set(pattern.skips) and len(patterns) > 1
    assert not any(map(all, zip(*patterns)))


def test_layers_that_run_are_scaled_by_how_often_they_do():
    model = Recipe(StochasticDepth(0.6, by="batch")).model(_gpt().double())
    _advance(model)
    pattern = model.blocks[0].around["rows"].pattern
    x, tokens = torch.randn(8, 8, 16, dtype=torch.float64), _tokens()
    for layer, block in enumerate(model.blocks):
        rate = sum(skips[layer] for skips in pattern.skips) / 4
        out = block(x, tokens)
        if pattern.skips[pattern.number][layer]:
            assert torch.equal(out, x)
        else:
            plain = block.eval()(x, tokens)
            torch.testing.assert_close(out, x + (plain - x) / (1 - rate))


def test_a_run_has_as_many_graphs_as_patterns():
    torch.compiler.reset()
    model, update = _skipping(steps=16, depth=2, patterns=3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for at in update.plan:
        _advance(model, at)
        compiled(_tokens())
    assert counter.frame_count == 3


# -- progressive layer drop


def test_keep_rate_by_hand():
    assert keep_rate(0.0, 0.5, 100.0) == 1.0
    assert keep_rate(0.01, 0.5, 100.0) == pytest.approx(0.5 + 0.5 * math.exp(-1))
    assert keep_rate(1.0, 0.5, 100.0) == pytest.approx(0.5)


@given(st.floats(0.01, 0.99), st.floats(0.01, 1000))
def test_at_most_four_rates_that_rise_and_stay_near_the_curve(keep, gamma):
    depth, seen = FallingDepth(keep, gamma), []
    for step in range(50):
        depth.advance(_at(step, 50))
        seen.append(depth.drop)
        assert abs(depth.drop - (1 - keep_rate(step / 50, keep, gamma))) <= (1 - keep) / 6 + 1e-9
    assert seen == sorted(seen) and len(set(seen)) <= 4 and seen[0] == 0


def test_a_run_has_at_most_four_sets_of_shapes():
    torch.compiler.reset()
    model = Recipe(ProgressiveLayerDrop(gamma=3.0)).model(_gpt(depth=2))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    shapes, seen = [], set()
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda m, args, out: shapes.append(out.shape[0]))
    for step in range(12):
        _advance(model, _at(step, 12))
        shapes.clear()
        model(_tokens())
        seen.add(tuple(shapes))
        compiled(_tokens())
    assert seen == {(8, 8), (7, 7), (7, 5), (6, 4)}
    assert counter.frame_count == 4


def test_resumed_equals_uninterrupted_by_batch():
    def run(until, state=None):
        recipe = Recipe(StochasticDepth(0.6, by="batch"), AdamW())
        model = recipe.model(_gpt())
        update = Updater(recipe, model, next_token_loss, Plan(recipe, 64, 8, steps=8, seed=5))
        if state:
            update.load_state_dict(state)
            update.plan.resume(update.step)
        for at in update.plan:
            if at.step == until:
                break
            for part in update(Batch(_tokens(), _tokens()), at):
                update.loss(model(part.inputs), part.targets).backward()
        return update.state_dict()

    whole, rest = run(8), run(8, run(4))
    assert all(torch.equal(whole["model"][key], rest["model"][key]) for key in whole["model"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: StochasticDepth(drop=0.0),
        lambda: StochasticDepth(drop=1.0),
        lambda: StochasticDepth(by="layer"),
        lambda: StochasticDepth(patterns=1),
        lambda: ProgressiveLayerDrop(keep=1.0),
        lambda: ProgressiveLayerDrop(keep=0.0),
        lambda: ProgressiveLayerDrop(gamma=0.0),
    ],
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        wrong()


@pytest.mark.parametrize(
    "method", [StochasticDepth(), StochasticDepth(by="batch"), ProgressiveLayerDrop()], ids=str
)
def test_nets_without_such_blocks_are_refused(method):
    with pytest.raises(ValueError, match="looks for residual blocks that keep the shape"):
        Recipe(method).model(nn.Linear(3, 3))


def test_both_want_one_place():
    with pytest.raises(ValueError, match="both want model/depth"):
        Recipe(StochasticDepth(), ProgressiveLayerDrop())
