"""Updater: the order of a step, its exactness, leaving it early, evaluating, saving and going on."""

import copy
import dataclasses
import functools
import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import (
    Ascend,
    Average,
    Bound,
    Double,
    FromSample,
    Growth,
    Halve,
    Hardest,
    Mirror,
    Noise,
    Penalty,
    Plain,
    Ramp,
    Rates,
    Times,
    Widen,
    Zero,
    examples,
    make,
    mlp,
    same,
    train,
    weights,
)

from stretto.core import At, Batch, BatchMethod, Mixed, Phase, Recipe, StartMethod
from stretto.plan import Plan
from stretto.update import Updater, per_example, unwrap

DOUBLE = torch.float64


def gradients(update: Updater, batch: Batch, at: At) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step, without stepping."""
    total = 0.0
    parts = update.passes(batch, at)
    for part in parts:
        loss = update.loss(update.wrapped(part.inputs), part.targets)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in update.model.named_parameters() if p.grad is not None}
    update.skip()
    return total, found


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-14)


# -- exactness


@given(
    ignored=st.lists(st.integers(0, 7), max_size=6), others=st.lists(st.integers(0, 7), max_size=6),
    mixed=st.booleans(), microbatch=st.sampled_from([None, 1, 3, 4, 8]), slices=st.sampled_from([1, 2, 4]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_micro_batches_and_slices_give_the_exact_mean(ignored, others, mixed, microbatch, slices):
    """Means of means: 1.798 against the exact 1.809 with ignored tokens; mixed targets weighted twice."""
    x, y = examples(8, DOUBLE)
    y[ignored] = -100
    second = (y.clamp(min=0) + 1) % 3
    second[others] = -100
    share = torch.linspace(0.1, 0.9, 8, dtype=DOUBLE)
    reference = mlp(DOUBLE)
    counts = [(y != -100).to(DOUBLE), (second != -100).to(DOUBLE)]
    each = [F.cross_entropy(reference(x), target, reduction="none") for target in (y, second)]
    parts = [share * counts[0], (1 - share) * counts[1]] if mixed else [counts[0]]
    expected = sum(w * v for w, v in zip(parts, each)).sum() / sum(w.sum() for w in parts).clamp(min=1e-12)  # type: ignore[union-attr]
    expected.backward()

    recipe = Recipe(Plain())
    update = make(recipe, mlp(DOUBLE), slices=slices, microbatch=microbatch)
    batch = Batch(x, Mixed(y, second, share) if mixed else y)
    total, found = gradients(update, batch, update.plan.at(0))
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert_close(found, {name: p.grad for name, p in reference.named_parameters()})  # type: ignore[misc]


@given(
    microbatch=st.integers(1, 8),
    slices=st.sampled_from([1, 2, 4]),
    ignored=st.sets(st.integers(0, 7), max_size=7),
)
@settings(max_examples=40, deadline=None)
def test_weights_of_all_parts_sum_to_one(microbatch, slices, ignored):
    """A learning rate that depends on how the batch is cut."""
    x, y = examples(8)
    y[list(ignored)] = -100
    update = make(Recipe(Plain()), microbatch=microbatch, slices=slices, loss=lambda o, t: torch.ones(len(o)))
    with torch.no_grad():
        total = sum(
            update.loss(part.inputs, part.targets) for part in update.passes(Batch(x, y), update.plan.at(0))
        )
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda o, t: F.cross_entropy(o, t, reduction="none")])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_batch_in_which_nothing_counts_has_no_mean(microbatch, loss):
    """A loss of 0 that looks like success, or one that depends on how the batch is cut."""
    x, y = examples(8)
    update = make(Recipe(Plain()), loss=loss, microbatch=microbatch)
    total, _ = gradients(update, Batch(x, y * 0 - 100), update.plan.at(0))
    assert total != total


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (F.cross_entropy, lambda y: y),
        (F.cross_entropy, lambda y: F.one_hot(y, 3).double()),
        (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2), lambda y: y),
        (functools.partial(F.cross_entropy, ignore_index=1), lambda y: y),
        (F.binary_cross_entropy_with_logits, lambda y: F.one_hot(y, 3).double()),
        (F.mse_loss, lambda y: F.one_hot(y, 3).double()),
        (lambda o, t: F.cross_entropy(o, t), lambda y: y),
        (lambda o, t: F.cross_entropy(o, t), lambda y: y.masked_fill(y == 1, -100)),
    ],
    ids=["ce", "dense", "module", "partial", "bce", "mse", "scalar", "scalar-ignored"],
)
def test_losses_are_taken_as_they_are(loss, targets, microbatch):
    """A torch loss that must be rewritten, or whose mean differs from torch's own."""
    x, y = examples(8, DOUBLE)
    reference = mlp(DOUBLE)
    expected = loss(reference(x), targets(y))
    expected.backward()
    update = make(Recipe(Plain()), mlp(DOUBLE), loss=loss, microbatch=microbatch)
    total, found = gradients(update, Batch(x, targets(y)), update.plan.at(0))
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert_close(found, {name: p.grad for name, p in reference.named_parameters()})  # type: ignore[misc]


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        functools.partial(F.cross_entropy, label_smoothing=0.1),
    ],
)
def test_a_plain_recipe_equals_the_loop_by_hand_bit_for_bit(loss):
    """A baseline that is not what its user ran before."""
    x, y = examples()
    model, plain = mlp(norm=True), mlp(norm=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    update = make(Recipe(Plain()), model, loss=loss)
    for at in Plan(Recipe(), 24, 8, steps=3):
        index = update.plan.indices(at)
        loss(plain(x[index]), y[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
    train(update, (x, y))
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("module", [False, True])
def test_class_weights_weigh_examples_alike_however_the_batch_is_cut(module):
    """Torch divides by the weights of the classes met, so that means of micro-batches differ."""
    x, y = examples(8, DOUBLE)
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    loss: Any = nn.CrossEntropyLoss(weight) if module else functools.partial(F.cross_entropy, weight=weight)
    expected = F.cross_entropy(mlp(DOUBLE)(x), y, weight, reduction="none").mean().item()
    for microbatch in (None, 3):
        update = make(Recipe(Plain()), mlp(DOUBLE), loss=loss, microbatch=microbatch)
        total, _ = gradients(update, Batch(x, y), update.plan.at(0))
        assert total == pytest.approx(expected, rel=1e-12)


def test_tokens_count_alike_over_the_whole_batch():
    """Short sequences whose tokens weigh more than those of long ones."""
    x = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y = torch.randint(0, 3, (4, 5), generator=torch.Generator().manual_seed(0))
    y[0, 1:], y[1, 2:] = -100, -100

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    expected = F.cross_entropy(mlp(DOUBLE, norm=False)(x).flatten(0, 1), y.flatten()).item()
    for microbatch in (None, 1, 3):
        update = make(Recipe(Plain()), mlp(DOUBLE), loss=loss, batch=4, microbatch=microbatch)
        assert gradients(update, Batch(x, y), update.plan.at(0))[0] == pytest.approx(expected, rel=1e-12)


def test_a_penalty_and_a_target_method_meet_ignored_and_mixed_targets_exactly():
    """A penalty paid for examples that do not count, or not scaled with the rest."""
    x, y = examples(8, DOUBLE)
    y[3] = -100
    share = torch.full((8,), 0.25, dtype=DOUBLE)
    second = y.roll(1)
    outputs = mlp(DOUBLE)(x)
    w = share * (y != -100) + (1 - share) * (second != -100)
    ce = share * F.cross_entropy(outputs, y, reduction="none")
    ce = ce + (1 - share) * F.cross_entropy(outputs, second, reduction="none")
    expected = ((2 * ce + w * 0.1 * outputs.square().mean(-1)).sum() / w.sum()).item()
    update = make(Recipe(Plain(), Penalty(), Double()), mlp(DOUBLE), microbatch=3)
    total, _ = gradients(update, Batch(x, Mixed(y, second, share)), update.plan.at(0))
    assert total == pytest.approx(expected, rel=1e-12)


def test_valid_says_what_counts_of_any_kind_of_target():
    """Padded targets that are floats, trained on because they are not -100."""
    x, y = examples(8, DOUBLE)
    values = y.double()
    values[2] = -1.0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum(1) - targets).square()

    kept = [0, 1, 3, 4, 5, 6, 7]
    reference = mlp(DOUBLE)
    expected = loss(reference(x[kept]), values[kept]).mean()
    expected.backward()
    for microbatch in (None, 3):
        update = make(Recipe(Plain()), mlp(DOUBLE), loss=loss, valid=lambda t: t >= 0, microbatch=microbatch)
        total, found = gradients(update, Batch(x, values), update.plan.at(0))
        assert total == pytest.approx(expected.item(), rel=1e-12)
        assert_close(found, {name: p.grad for name, p in reference.named_parameters()})  # type: ignore[misc]


@pytest.mark.parametrize("ignored", [False, True])
def test_valid_of_another_shape_than_the_loss_is_refused(ignored):
    """Weights that broadcast over values they do not belong to, or an error for some batches only."""
    x, y = examples(8)
    update = make(Recipe(Plain()), valid=lambda t: torch.full((8, 2), not ignored))
    at = update.plan.at(0)
    with pytest.raises(ValueError, match=r"shape \(8,\).*shape \(8, 2\).*valid="):
        for part in update.passes(Batch(x, y), at):
            update.loss(update.model(part.inputs), part.targets)
    with pytest.raises(ValueError, match="call it in"):
        update.loss(x, y)


@pytest.mark.parametrize("extra", [Double(), Penalty(), Hardest(), None])
def test_a_scalar_loss_is_refused_when_a_method_needs_more(extra):
    """Label smoothing or selection that works on the mean in silence."""
    x, y = examples(8)
    recipe = Recipe(Plain(), extra) if extra else Recipe(Plain())
    update = make(recipe, loss=lambda o, t: F.cross_entropy(o, t) if not isinstance(t, Mixed) else o.sum())
    targets = y if extra else Mixed(y, y, torch.full((8,), 0.5))
    name = type(extra).__name__ if extra in (Double(), Penalty()) else "selecting" if extra else "mixing"
    with pytest.raises(ValueError, match=rf"{name}.* needs per-example losses, and this loss gives a scalar"):
        for part in update.passes(Batch(x, targets), update.plan.at(0)):
            update.loss(update.model(part.inputs), part.targets)


def test_rows_and_draws_are_the_same_however_the_batch_is_cut():
    """Augmentation that changes with the size of a micro-batch."""
    x, y = examples(8)
    seen = []
    for microbatch in (None, 2, 4, 8):
        update = make(Recipe(Plain(), Noise()), microbatch=microbatch)
        batches = list(update.passes(Batch(x, y), update.plan.at(0)))
        seen.append([torch.cat([getattr(b, f) for b in batches]) for f in ("inputs", "rows", "index")])
        assert len(batches) == (1 if microbatch is None else 8 // microbatch)
    for inputs, rows, index in seen:
        assert torch.equal(inputs, seen[0][0]) and torch.equal(rows, torch.arange(8))
        assert torch.equal(index, update.plan.indices(update.plan.at(0)))


def test_a_batch_that_is_not_the_plans_is_refused():
    """A loader with a batch size of its own, whose last batch is short."""
    x, y = examples(5)
    update = make(Recipe(Plain()))
    with pytest.raises(ValueError, match=r"takes 8 examples and was given 5; .*plan\.batches"):
        list(update(Batch(x, y), update.plan.at(0)))


# -- passes


@pytest.mark.parametrize("microbatch", [None, 3])
def test_two_passes_take_the_second_gradient_and_count_statistics_once(microbatch):
    """SAM that steps by both gradients, updates batch norm twice, or leaves the weights moved."""
    x, y = examples(8, DOUBLE)
    plain, twice = mlp(DOUBLE, norm=microbatch is None), mlp(DOUBLE, norm=microbatch is None)
    before = weights(plain)
    F.cross_entropy(plain(x), y).backward()
    statistics = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(p.grad, alpha=0.1)  # type: ignore[arg-type]
            p.grad = None
    F.cross_entropy(plain(x), y).backward()

    update = make(Recipe(Plain(), Ascend()), twice, microbatch=microbatch)
    rounds = []
    for part in update.passes(Batch(x, y), update.plan.at(0)):
        rounds.append(update.round)
        update.loss(twice(part.inputs), part.targets).backward()
    assert rounds == ([0, 1] if microbatch is None else [0, 0, 0, 1, 1, 1])
    assert_close(
        {name: p.grad for name, p in twice.named_parameters()},  # type: ignore[misc]
        {name: p.grad for name, p in plain.named_parameters()},  # type: ignore[misc]
    )
    after = weights(twice)
    assert all(torch.equal(after[name], before[name]) for name, _ in twice.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in statistics.items())
    update.finish(update.plan.at(0))
    assert update.step == 1 and not torch.equal(twice[0].weight, before["0.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("leave_at", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["break", "raise", "close", "backward-failed"])
def test_leaving_early_leaves_no_trace(leave_at, how):
    """A skipped step with half its gradients, moved weights or statistics, or a stolen random state."""
    x, y = examples(8)
    recipe = Recipe(Plain(), Ascend(), Average(), Halve())
    model = mlp(norm=True, dropout=0.2)
    update = make(recipe, model, microbatch=4)
    train(update, examples(), 1)
    before, state, kept = weights(model), torch.get_rng_state(), copy.deepcopy(update.state)
    at = update.plan.at(1)

    def step() -> None:
        for number, part in enumerate(update(Batch(x, y), at)):
            loss = update.loss(model(part.inputs), part.targets)
            if number == leave_at and how == "raise":
                raise KeyboardInterrupt
            if number == leave_at and how == "backward-failed":
                loss.sum(5)
            loss.backward()
            if number == leave_at and how == "break":
                break

    if how == "close":
        parts = update(Batch(x, y), at)
        for _ in range(leave_at + 1):
            part = next(parts)
            update.loss(model(part.inputs), part.targets).backward()
        parts.close()  # type: ignore[attr-defined]
    elif how == "break":
        step()
    else:
        with pytest.raises((KeyboardInterrupt, IndexError)):
            step()
    gc.collect()
    assert same(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert update.step == 1 and same(update.state["average"], kept["average"])


def test_after_leaving_early_the_same_step_or_the_next_may_be_taken():
    """A loop that breaks out of one bad batch and can never go on."""
    x, y = examples()
    runs = []
    for leaves in (False, True):
        update = make(Recipe(Plain(), Ramp()), mlp(norm=True))
        train(update, (x, y), 1)
        if leaves:
            for _ in update(Batch(x[:8], y[:8]), update.plan.at(1)):
                break
        train(update, (x, y), 1)  # the same step again
        runs.append(weights(update.model))
    assert same(*runs)

    update = make(Recipe(Plain()))
    for at in update.plan:
        for part in update(Batch(x[:8], y[:8]), at):
            if at.step == 1:
                break
            update.loss(update.model(part.inputs), part.targets).backward()
    assert update.step == 3


def test_steps_out_of_order_and_open_steps_are_refused():
    """A resumed run whose schedule starts anew; a step begun within another."""
    x, y = examples(8)
    update = make(Recipe(Plain()))
    with pytest.raises(ValueError, match=r"at step 0 and the plan at 1.*plan\.resume"):
        next(iter(update(Batch(x, y), update.plan.at(1))))
    parts = update(Batch(x, y), update.plan.at(0))
    next(parts)
    with pytest.raises(ValueError, match="still open"):
        next(iter(update(Batch(x, y), update.plan.at(0))))
    parts.close()  # type: ignore[attr-defined]
    for part in update.passes(Batch(x, y), update.plan.at(0)):
        update.loss(update.model(part.inputs), part.targets).backward()
    with pytest.raises(ValueError, match="finish"):
        next(iter(update(Batch(x, y), update.plan.at(1))))


def test_a_skipped_step_drops_gradients_and_statistics_and_time_goes_on():
    """A batch of NaNs that leaves batch norm broken after its step was skipped."""
    x, y = examples(8)
    model = mlp(norm=True)
    update = make(Recipe(Plain()), model)
    before = weights(model)
    for part in update.passes(Batch(x * torch.nan, y), update.plan.at(0)):
        update.loss(model(part.inputs), part.targets).backward()
    update.skip()
    assert same(weights(model), before) and update.step == 1
    train(update, examples(), 1)
    assert model[1].running_mean.isfinite().all()  # type: ignore[union-attr, operator]


def test_gradients_from_before_the_run_do_not_enter_it():
    """A look at the gradients before training, silently part of the first step."""
    x, y = examples()
    clean, stained = make(Recipe(Plain())), make(Recipe(Plain()))
    F.cross_entropy(stained.model(x), y).backward()
    train(clean, (x, y), 1), train(stained, (x, y), 1)
    assert same(weights(clean.model), weights(stained.model))


def test_parameters_of_the_loss_are_trained_by_their_own_gradient_only():
    """Gradients of a learned temperature that add up over the run, since the model does not hold it."""
    x, y = examples()
    temperature = nn.Parameter(torch.ones(()))
    model = mlp()
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * temperature, targets, reduction="none")

    update = make(Recipe(), model, loss, optimizer=optimizer)
    train(update, (x, y), 1)
    assert temperature.grad is None and temperature.item() != 1.0


# -- order, selection, slices


def test_methods_after_the_gradients_run_in_order():
    """Averages of weights that the projection has not reached yet."""
    update = make(Recipe(Plain(lr=5.0), Bound(), Average(), Halve()))
    train(update, examples(), 1)
    assert max(p.abs().max() for p in update.model.parameters()) <= 0.2
    assert all(torch.equal(update.state["average"][n], p) for n, p in update.model.named_parameters())
    assert update.state["halve"]["count"] == 1


@pytest.mark.parametrize("slices", [1, 2])
def test_selection_acts_on_each_slice_and_moves_no_statistics(slices):
    """Scoring passes that update batch norm; a selection that differs between one process and two."""
    x, y = examples(8, DOUBLE)
    model = mlp(DOUBLE, norm=True)
    before = weights(model)
    update = make(Recipe(Plain(), Hardest()), model, slices=slices)
    batches = list(update.passes(Batch(x, y), update.plan.at(0)))
    assert same(weights(model), before) and model.training
    kept = torch.cat([b.rows for b in batches])  # type: ignore[misc]
    width = 8 // slices
    for number in range(slices):
        piece = slice(number * width, (number + 1) * width)
        values = F.cross_entropy(copy.deepcopy(model)(x[piece]), y[piece], reduction="none")
        expected = values.topk(width // 2).indices + number * width
        assert torch.equal(kept[number * width // 2 : (number + 1) * width // 2], expected)


def test_timed_layers_know_step_slice_and_first_row_of_each_pass():
    """Layers that draw the same for each micro-batch, or live one step in the past."""
    model = nn.Sequential(nn.Linear(4, 3), Times())
    update = make(Recipe(Plain(), Ascend()), model, slices=2, microbatch=2, steps=2)
    train(update, examples())
    noted: Any = model[1].noted
    rows = [(0, 0), (0, 2), (1, 4), (1, 6)]
    assert noted == [(step, *row) for step in range(2) for _ in range(2) for row in rows]
    assert model[1].clock.fraction.item() == 0.5  # type: ignore[union-attr, operator]  # itself Timed


def test_timed_layers_know_the_time_when_examples_are_scored():
    """Scores of this step's examples by the last step's layers."""
    model = nn.Sequential(nn.Linear(4, 3), Times())
    update = make(Recipe(Plain(), Hardest()), model, steps=2)
    train(update, examples())
    assert [step for step, _, _ in model[1].noted] == [0, 0, 1, 1]  # type: ignore[union-attr, operator]


def test_dropout_belongs_to_its_micro_batch_and_the_callers_draws_to_the_caller():
    """A resumed run with other masks; training that changes what the caller draws."""
    x, y = examples()
    model = mlp(dropout=0.5)

    def functional(inputs: Tensor) -> Tensor:
        return F.dropout(model(inputs), 0.5)

    runs = []
    for seed in (0, 1):
        update = make(Recipe(Plain()), mlp(dropout=0.5), microbatch=4)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(update, (x, y))
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(weights(update.model))
    assert same(*runs)
    update = make(Recipe(Plain()), model, microbatch=4)
    masks = [functional(torch.ones(4, 4)) for _ in update.passes(Batch(x[:8], y[:8]), update.plan.at(0))]
    assert not torch.equal(*masks)


def test_both_passes_of_a_step_drop_the_same():
    """SAM whose second gradient belongs to another network."""
    x, y = examples(8)
    update = make(Recipe(Plain(), Ascend()), mlp(dropout=0.5))
    masks = []
    for part in update.passes(Batch(x, y), update.plan.at(0)):
        masks.append(F.dropout(torch.ones(50), 0.5))
        update.loss(update.model(part.inputs), part.targets).backward()
    assert torch.equal(*masks)


# -- the optimizer, its schedule and groups


def test_a_recipe_needs_one_optimizer():
    """A run that never steps, or steps twice."""
    with pytest.raises(ValueError, match="no optimizer"):
        make(Recipe())
    model = mlp()
    with pytest.raises(ValueError, match="Plain of the recipe and optimizer= both"):
        make(Recipe(Plain()), model, optimizer=torch.optim.SGD(model.parameters(), 0.1))


def test_the_users_optimizer_follows_the_recipes_schedule():
    """A schedule that multiplies what it multiplied before."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    update = make(Recipe(Ramp()), model, optimizer=optimizer, steps=4)
    rates = []
    for _ in range(4):
        train(update, examples(), 1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5 * (1 - (i + 0.5) / 4) for i in range(4)])
    again = make(Recipe(Ramp()), model, optimizer=optimizer, steps=4)  # as a cell that is run again
    train(again, examples(), 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[0])


def test_bases_may_be_changed_during_the_run_and_are_kept():
    """A rate lowered by hand that the schedule, or a resumed run, forgets."""
    update = make(Recipe(Plain(), Ramp()), steps=4)
    train(update, examples(), 1)
    update.optimizer.param_groups[0]["base"]["lr"] = 1.0
    train(update, examples(), 1)
    assert update.optimizer.param_groups[0]["lr"] == pytest.approx(1 - 1.5 / 4)
    resumed = make(Recipe(Plain(), Ramp()), steps=4)
    resumed.load_state_dict(update.state_dict())
    train(resumed, examples(), 1)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(1 - 2.5 / 4)


def test_a_rate_without_schedule_is_the_users():
    """A scheduler of the host overwritten at each step."""
    update = make(Recipe(Plain(), Rates()), steps=2)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.1, 0.05]
    update.optimizer.param_groups[0]["lr"] = 0.7
    train(update, examples(), 1)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.7, 0.05]


def test_a_rate_that_compiled_code_reads_is_changed_in_place():
    """A compiled step that keeps the first rate, or compiles anew for each."""
    model = mlp()
    rate = torch.tensor(0.5)
    update = make(Recipe(Ramp()), model, optimizer=torch.optim.AdamW(model.parameters(), lr=rate), steps=4)
    mine = update.optimizer.param_groups[0]["lr"]
    train(update, examples(), 2)
    assert update.optimizer.param_groups[0]["lr"] is mine and mine.item() == pytest.approx(
        0.5 * (1 - 1.5 / 4)
    )


def test_factors_reach_the_users_optimizer_or_are_refused():
    """Rates of the recipe that the user's optimizer never heard of."""
    model, recipe = mlp(), Recipe(Rates(), Ramp())
    with pytest.raises(ValueError, match=r"rates of their own \(Rates\).*recipe\.groups\(model\)"):
        make(recipe, model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    neutral = Recipe(Rates(bias=1.0), Ramp())
    make(neutral, model, optimizer=torch.optim.SGD(model.parameters(), 0.1))  # all factors are 1
    update = make(recipe, model, optimizer=torch.optim.SGD(recipe.groups(model), 0.1), steps=2)
    train(update, examples(), 1)
    assert [g["lr"] for g in update.optimizer.param_groups] == pytest.approx([0.1 * 0.75, 0.1 * 0.5 * 0.75])


def test_a_schedule_of_what_the_optimizer_lacks_is_refused():
    """A momentum schedule that an Adam ignores."""

    @dataclass(frozen=True)
    class Momentum(Ramp):
        paces = ("momentun",)

        def schedule(self, at: At) -> dict[str, float]:
            return {"momentun": 1.0}

    @dataclass(frozen=True)
    class Liar(Ramp):
        def schedule(self, at: At) -> dict[str, float]:
            return {"weight_decay": 1.0}

    with pytest.raises(ValueError, match=r"scales 'momentun', and SGD has no such.*did you mean momentum"):
        make(Recipe(Plain(), Momentum()))
    with pytest.raises(TypeError, match="Liar paces lr by its class, and gives weight_decay"):
        make(Recipe(Plain(), Liar()))
    with pytest.raises(ValueError, match="paces batch sizes by nothing, and the recipe by growth"):
        Updater(Recipe(Plain(), Growth()), mlp(), F.cross_entropy, Plan(Recipe(Plain()), 24, 8, steps=3))


def test_tied_frozen_and_unused_parameters():
    """A tied weight stepped twice; a frozen or unused one that gets a step, a decay, or an error."""
    model = mlp()
    model.add_module("unused", nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    tied = nn.Linear(4, 8)
    tied.weight = model[0].weight  # type: ignore[assignment]
    both = nn.ModuleDict({"main": model, "tied": tied})

    def forward(inputs: Tensor) -> Tensor:
        return model[2](model[1](model[0](inputs) + tied(inputs)))

    before = weights(both)
    update = make(Recipe(Plain(), Rates(), Average(), Halve()), both, forward=lambda m, i: forward(i))
    reference = copy.deepcopy(before)
    x, y = examples()
    for part in update(Batch(x[:8], y[:8]), update.plan.at(0)):
        update.loss(forward(part.inputs), part.targets).backward()
        expected = reference["main.0.weight"] - 0.05 * model[0].weight.grad  # type: ignore[operator]
    after = weights(both)
    torch.testing.assert_close(after["main.0.weight"], expected)
    assert torch.equal(after["main.0.weight"], after["tied.weight"])
    for name in ("main.0.bias", "main.unused.weight", "main.unused.bias"):
        assert torch.equal(after[name], before[name])
    with update.evaluating() as predict:
        predict(x)
    assert same(weights(both), after)


# -- start


def test_start_runs_once_at_step_0_on_the_first_slice_untransformed():
    """A start that sees augmented inputs, or the whole batch where two ranks saw a half each."""
    x, y = examples()
    seen = []

    @dataclass(frozen=True)
    class Look(FromSample):
        def start(self, model, weights, sample):
            seen.append(sample.clone())
            return super().start(model, weights, sample)

    update = make(Recipe(Plain(), Look(), Noise()), slices=2)
    index = update.plan.indices(update.plan.at(0))[:4]
    for _ in update(Batch(x[update.plan.indices(update.plan.at(0))], y[:8]), update.plan.at(0)):
        assert torch.equal(update.model[0].bias, torch.full((8,), x[index].mean().item()))  # type: ignore[index]
        break
    train(update, (x, y))
    assert len(seen) == 1 and torch.equal(seen[0], x[index])


def test_start_never_runs_after_a_resume_unless_it_had_not_run():
    """Trained weights initialised again; a checkpoint taken before the first step that never starts."""
    recipe = Recipe(Plain(), Zero())
    update = make(recipe)
    fresh = make(recipe)
    fresh.load_state_dict(update.state_dict())
    train(fresh, examples()), train(update, examples())
    assert same(weights(fresh.model), weights(update.model))
    resumed = make(recipe, steps=5)
    resumed.load_state_dict(update.state_dict())
    before = resumed.model[2].bias.clone()  # type: ignore[index]
    x, y = examples(8)
    for _ in resumed(Batch(x, y), resumed.plan.at(3)):
        assert torch.equal(resumed.model[2].bias, before) and before.abs().sum() > 0  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("3.bias", torch.zeros(3), "Sequential has none"), ("2.bias", torch.zeros(2), r"\(2,\).* has \(3,\)"),
     (None, None, "found no parameters to fill")],
)  # fmt: skip
def test_a_start_that_fits_nothing_is_refused(name, value, message):
    """Initial values lost because a name or a shape was another."""

    @dataclass(frozen=True)
    class Wrong(StartMethod):
        phases = (Phase.FIT,)

        def start(self, model, weights, sample):
            return [(name, value)] if name else []

    with pytest.raises(ValueError, match=message):
        train(make(Recipe(Plain(), Wrong())), examples())


def test_pretrained_weights_are_kept_and_only_inserted_layers_filled():
    """Pretrained weights overwritten by an initialisation."""
    with pytest.raises(ValueError, match=r"Zero sets initial values.*recipe - Zero"):
        make(Recipe(Plain(), Zero()), pretrained=True)
    recipe = Recipe(Plain(lr=0.0), Widen(), FromSample())
    update = make(recipe, pretrained=True)
    before = weights(update.model)
    train(update, examples(), 1)
    after = weights(update.model)
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["extra.bias"]
    with pytest.raises(ValueError, match="found no layers that were inserted to fill"):
        train(make(Recipe(Plain(), FromSample()), pretrained=True), examples())


def test_a_model_that_skipped_surgery_or_had_another_is_refused():
    """A race between equal models, one of them called by a method's name."""
    with pytest.raises(
        ValueError, match=r"by widen, and this model was changed by nothing; call recipe\.model"
    ):
        make(Recipe(Plain(), Widen()), mlp())
    with pytest.raises(ValueError, match="by widen:size=5, and this model was changed by widen;"):
        make(Recipe(Plain(), Widen(size=5)), Recipe(Widen()).model(mlp()))
    copied = copy.deepcopy(Recipe(Widen()).model(mlp()))
    train(make(Recipe(Plain(), Widen()), copied), examples())


# -- evaluating


def test_evaluating_uses_averages_and_puts_everything_back():
    """Training that goes on from the averaged weights, in eval mode, with other statistics."""
    data = examples()
    model = mlp(norm=True, dropout=0.5)
    model[2].eval()  # of the user's own choosing
    update = make(Recipe(Plain(), Average(), Mirror()), model)
    train(update, data, 2)
    before, modes = weights(model), [module.training for module in model.modules()]
    calibration = [(data[0][:12], data[1][:12]), (data[0][12:], data[1][12:])]
    with update.evaluating(calibration) as predict:
        assert not torch.is_grad_enabled() and not any(module.training for module in model.modules())
        assert torch.equal(model[0].weight, update.state["average"]["0.weight"])  # type: ignore[arg-type]
        hidden = [model[0](inputs) for inputs, _ in calibration]
        torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
        expected = (model(data[0]) + model(-data[0])) / 2
        assert torch.equal(predict(data[0]), expected)
    assert torch.is_grad_enabled()
    assert same(weights(model), before) and [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("where", ["body", "calibration", "averaged", "empty"])
def test_an_exception_while_evaluating_puts_everything_back(where):
    """Ctrl-C during an evaluation that leaves averaged weights in the model."""

    @dataclass(frozen=True)
    class Fails(Average):
        def averaged(self, model, optimizer, at, state):
            if where == "averaged":
                raise KeyboardInterrupt
            return super().averaged(model, optimizer, at, state)

    def calibration():
        yield examples(8)[0]
        if where == "calibration":
            raise KeyboardInterrupt

    model = mlp(norm=True)
    update = make(Recipe(Plain(), Fails()), model)
    train(update, examples(), 2)
    before = weights(model)
    with (
        pytest.raises(ValueError if where == "empty" else KeyboardInterrupt),
        update.evaluating(() if where == "empty" else calibration()),
    ):
        raise KeyboardInterrupt
    assert same(weights(model), before) and model.training and model[1].training
    assert model[1].momentum == 0.1 and torch.is_grad_enabled()


def test_evaluating_asks_for_no_batches_without_averages_or_batch_norm():
    """An evaluation that loads 32 batches for nothing."""

    def forbidden():
        raise AssertionError("read")
        yield

    for recipe, norm in ((Recipe(Plain()), True), (Recipe(Plain(), Average()), False)):
        update = make(recipe, mlp(norm=norm))
        train(update, examples(), 1)
        with update.evaluating(forbidden()) as predict:
            predict(examples()[0])
    update = make(Recipe(Plain(), Average()), mlp(norm=True))
    with update.evaluating(forbidden()) as predict:  # nothing averaged yet
        predict(examples()[0])


def test_frozen_batch_norm_keeps_its_statistics():
    """Fine-tuning with frozen statistics, re-estimated at each evaluation."""
    model = mlp(norm=True)
    update = make(Recipe(Plain(), Average()), model)
    model[1].eval()
    train(update, examples(), 1)
    with update.evaluating([]):
        assert model[1].running_mean.abs().sum() == 0  # type: ignore[union-attr, operator]
    model.eval()  # all of it: a habit before evaluating, nothing is frozen
    with update.evaluating([examples()[0]]):
        assert model[1].running_mean.abs().sum() > 0  # type: ignore[union-attr, operator]


class Output:
    """As Hugging Face gives them."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class TakesDicts(nn.Module):
    """Named inputs, `.logits` out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: Tensor) -> Output:
        return Output(self.norm(self.linear(x)) * scale[:, None])


def test_dict_inputs_and_logits_go_through_every_part_of_a_step():
    """A method or a cut that works on single tensors only."""
    x, y = examples()
    inputs = {"x": x, "scale": torch.ones(24)}
    model = TakesDicts()
    update = make(Recipe(Plain(), Hardest(), Average()), model, slices=2, microbatch=1)
    at = update.plan.at(0)
    index = update.plan.indices(at)
    batch = Batch({name: value[index] for name, value in inputs.items()}, y[index])
    for part in update(batch, at):
        assert len(part) == 1 and part.inputs["scale"].shape == (1,)
        model.norm.eval()
        update.loss(model(**part.inputs).logits, part.targets).backward()
    model.norm.train()
    with update.evaluating([inputs, (inputs, y)]) as predict:
        assert predict(inputs).shape == (24, 3)


# -- saving and going on


FULL = Recipe(Plain(), Ramp(), Rates(), Ascend(), Noise(), Halve(), Average(), Penalty(), Zero("0.bias"))


@pytest.mark.parametrize("leave", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(leave, tmp_path):
    """Averages, masks, rates or random state lost between two sittings."""
    data = examples()

    def fresh() -> Updater:
        return make(FULL, mlp(norm=True, dropout=0.3), steps=4, slices=2, microbatch=2)

    whole, first, second = fresh(), fresh(), fresh()
    train(whole, data)
    train(first, data, leave)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for p in second.model.parameters():
            p.fill_(7.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.plan.resume(second.step)
    torch.rand(5)
    train(second, data)
    assert same(weights(second.model), weights(whole.model))
    assert same(second.state["average"], whole.state["average"])
    assert second.state["halve"]["count"] == whole.state["halve"]["count"] == 4


def test_states_of_two_runs_are_not_shared():
    """An average that two runs move, because one was started from the other's state."""
    data = examples()
    model = mlp()
    adam = functools.partial(torch.optim.AdamW, lr=0.1)
    a = make(Recipe(Average()), model, optimizer=adam(model.parameters()), steps=4)
    other = mlp()
    b = make(Recipe(Average()), other, optimizer=adam(other.parameters()), steps=4)
    train(a, data, 2)
    b.load_state_dict(a.state_dict())
    kept = copy.deepcopy(a.state_dict())
    train(b, data, 2)
    assert same(a.state["average"], kept["state"]["average"])
    assert same(a.optimizer.state_dict()["state"][0], kept["optimizer"]["state"][0])
    train(a, data, 2)
    assert same(weights(a.model), weights(b.model))


def test_the_state_of_another_run_is_refused():
    """A checkpoint of another recipe, loaded with what fits."""
    update = make(Recipe(Plain(), Rates()))
    state = update.state_dict()
    with pytest.raises(ValueError, match="run with recipe"):
        make(Recipe(Plain())).load_state_dict(state)
    with pytest.raises(ValueError, match="slices 1, and this run has slices 2"):
        make(Recipe(Plain(), Rates()), slices=2).load_state_dict(state)
    renamed = nn.Sequential(*[nn.Linear(4, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 3)])
    with pytest.raises(ValueError, match="other parameters"):
        make(Recipe(Plain(), Rates()), renamed).load_state_dict(state)


def test_two_runs_interleaved_equal_each_alone():
    """A race whose contestants draw from one stream."""
    data = examples()
    recipes = [FULL, Recipe(Plain(), Noise(), Double())]

    def fresh(recipe: Recipe, seed: int) -> Updater:
        return make(recipe, mlp(norm=True, dropout=0.3), steps=4, seed=seed)

    alone = [fresh(recipe, seed) for seed, recipe in enumerate(recipes)]
    for update in alone:
        train(update, data)
    together = [fresh(recipe, seed) for seed, recipe in enumerate(recipes)]
    for _ in range(4):
        for update in together:
            train(update, data, 1)
    for a, b in zip(alone, together):
        assert same(weights(a.model), weights(b.model))


# -- mixed precision, compiled and wrapped models


def test_a_grad_scaler_scales_gradients_and_leaves_the_printed_loss():
    """A loss printed 65536 times too large; a step with gradients still scaled."""
    data = examples()
    plain, scaled = make(Recipe(Plain(), Halve())), make(
        Recipe(Plain(), Halve()), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)
    )  # fmt: skip
    assert train(plain, data) == train(scaled, data)  # bit-equal: the scale is a power of 2
    assert same(weights(plain.model), weights(scaled.model))
    state = scaled.state_dict()
    fresh = make(Recipe(Plain(), Halve()), scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    fresh.load_state_dict(state)
    assert fresh.scaler.get_scale() == 1024.0


def test_a_grad_scaler_skips_a_step_whose_gradients_overflow():
    """Weights that become infinite in half precision."""
    x, y = examples(8)
    update = make(Recipe(Plain()), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    before = weights(update.model)
    for part in update(Batch(x, y), update.plan.at(0)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = update.model(part.inputs)
        assert outputs.dtype == torch.bfloat16
        loss = update.loss(outputs, part.targets)
        assert loss.dtype == torch.float32
        (loss * torch.inf).backward()
    assert same(weights(update.model), before) and update.step == 1
    assert update.scaler.get_scale() == 512.0


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_has_the_names_it_was_built_with(inner):
    """Checkpoints with `_orig_mod.` in their keys; methods that do not find their layers."""
    data = examples()
    torch._dynamo.reset()
    plain, model = mlp(norm=True, dropout=0.3), mlp(norm=True, dropout=0.3)
    wrapped: Any = model
    if inner:
        model[0] = torch.compile(model[0], backend="aot_eager")  # type: ignore[call-overload]
        assert "0._orig_mod.weight" in model.state_dict()
    else:
        wrapped = torch.compile(model, backend="aot_eager")
    recipe = Recipe(Plain(), Average(), Halve(), Zero("0.bias"))
    reference, update = make(recipe, plain), make(recipe, wrapped)
    train(reference, data), train(update, data)
    ours, expected = update.state_dict(), reference.state_dict()
    assert list(ours["model"]) == list(expected["model"])
    assert same(ours["state"]["average"], expected["state"]["average"])
    assert same(ours["model"], expected["model"])
    fresh = make(recipe, mlp(norm=True, dropout=0.3))
    fresh.load_state_dict(ours)
    assert same(fresh.model.state_dict(), ours["model"])
    before = weights(wrapped)
    with update.evaluating([data[0]]) as predict, reference.evaluating([data[0]]) as expect:
        torch.testing.assert_close(predict(data[0]), expect(data[0]))
        assert not any(module.training for module in wrapped.modules())
    assert same(weights(wrapped), before) and all(module.training for module in wrapped.modules())


def test_unwrapping_leaves_a_plain_model_itself():
    """Methods that change a copy of the model."""
    model = mlp()
    assert unwrap(model) is model
    assert unwrap(torch.compile(model, backend="eager")) is model
    outer = nn.Sequential(torch.compile(model, backend="eager"), nn.Linear(3, 3))
    plain = unwrap(outer)
    assert plain is not outer and plain[0] is model and plain[1] is outer[1]  # type: ignore[index]
    assert [name for name, _ in plain.named_parameters()][:2] == ["0.0.weight", "0.0.bias"]
    assert isinstance(outer[0], torch._dynamo.OptimizedModule)  # the user's own is as it was


def test_losses_are_asked_for_one_value_an_example():
    """A user's loss module changed for good."""
    module = nn.CrossEntropyLoss()
    assert per_example(module).reduction == "none" and module.reduction == "mean"  # type: ignore[attr-defined]

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs

    assert per_example(own) is own


def test_a_batch_method_may_drop_rows_and_change_the_number_of_examples():
    """Sequences reshaped into more of them, whose weights no longer sum to one."""

    @dataclass(frozen=True)
    class Split(BatchMethod):
        phases = (Phase.SIZE,)

        def batch(self, batch: Batch, at: At) -> Batch:
            return Batch(batch.inputs.repeat(3, 1), batch.targets.repeat(3))

    x, y = examples(8, DOUBLE)
    expected = F.cross_entropy(mlp(DOUBLE)(x), y).item()
    for slices, microbatch in ((1, None), (2, 5)):
        update = make(Recipe(Plain(), Split()), mlp(DOUBLE), slices=slices, microbatch=microbatch)
        total, _ = gradients(update, Batch(x, y), update.plan.at(0))
        assert total == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("targets", ["classes", "mixed"])
def test_nothing_in_a_step_waits_for_the_device(targets):
    """A host that stands still each step until the accelerator has caught up: meta tensors have no values to show."""
    x, y = examples(8)
    model = mlp(norm=True).to("meta")
    recipe = Recipe(
        Plain(), Ramp(), Rates(), Ascend(), Hardest(), Noise(), Bound(), Average(), Penalty(), Zero("0.bias")
    )
    update = make(recipe, model, microbatch=3, slices=2)
    for step in range(2):
        batch = Batch(x, y if targets == "classes" else Mixed(y, y.roll(1), torch.rand(8)))
        for part in update(batch, update.plan.at(step)):
            assert {t.device.type for t in (part.inputs, part.rows, part.index)} == {"meta"}  # type: ignore[union-attr]
            update.loss(model(part.inputs), part.targets).backward()
    with update.evaluating([x]) as predict:
        predict(x.to("meta"))


def test_a_microbatch_below_one_is_refused():
    """An endless loop of empty parts."""
    with pytest.raises(ValueError, match="microbatch is 0"):
        make(Recipe(Plain()), microbatch=0)


def test_time_that_methods_see_is_frozen():
    """A method that moves the run's clock."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(Recipe(Plain())).plan.at(0).step = 3  # type: ignore[misc]
