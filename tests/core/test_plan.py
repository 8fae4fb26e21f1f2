"""Plan: how long a run is, in which batches, in which order, and how it goes on."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from toys import Growth, Ramp

from stretto.core import Recipe, ScheduleMethod
from stretto.plan import Plan


class Numbers(TensorDataset):
    """0, 1, 2 …, so that an example tells its id."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.arange(count))


def ids(plan: Plan) -> list[int]:
    return [i for step in range(plan.steps) for i in plan.indices(plan.at(step)).tolist()]


@given(
    examples=st.integers(1, 40), batch=st.integers(1, 50), epochs=st.floats(0.1, 4), seed=st.integers(0, 5),
    start=st.sampled_from([None, 0.1, 0.5, 2.0]), slices=st.sampled_from([1, 2, 5]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_example_comes_once_an_epoch_and_the_budget_is_kept(
    examples, batch, epochs, seed, start, slices
):
    """Examples that are never seen, or seen twice, where batches straddle epochs or change size."""
    batch *= slices
    recipe = Recipe() if start is None else Recipe(Growth(start))
    plan = Plan(recipe, examples, batch, epochs=epochs, seed=seed, slices=slices)
    seen = ids(plan)
    assert len(seen) == plan.planned == sum(plan.sizes)
    assert plan.planned <= epochs * examples + 1e-6 or plan.steps == 1
    assert all(size % slices == 0 and size >= slices for size in plan.sizes)
    for begin in range(0, len(seen), examples):
        epoch = seen[begin : begin + examples]
        assert len(set(epoch)) == len(epoch)
    whole = len(seen) // examples
    assert all(seen.count(i) in (whole, whole + 1) for i in range(examples))


@given(
    steps=st.integers(1, 300), batch=st.integers(1, 64), start=st.floats(0.05, 3), over=st.floats(0.1, 1),
    slices=st.sampled_from([1, 2, 4]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_budget_in_steps_is_exact_also_where_batches_grow(steps, batch, start, over, slices):
    """A run that ends a step early, or a schedule whose end lies beyond the run."""
    plan = Plan(Recipe(Growth(start, over)), 100, batch * slices, steps=steps, slices=slices)
    assert plan.steps == steps == len(plan.sizes)
    assert all(size % slices == 0 for size in plan.sizes)
    wanted = [Growth(start, over).schedule(plan.at(step))["batch_size"] * plan.batch for step in range(steps)]
    # Each size is what the schedule asks for at its fraction, to rounding and to the length foreseen.
    slack = slices + abs(1 - start) * plan.batch * (0.02 / over + 3 / steps / over)
    assert all(abs(size - want) <= slack for size, want in zip(plan.sizes, wanted))


def test_a_growing_batch_ends_at_full_size_for_the_share_it_says():
    """A warm-up over half the steps where half the examples were meant."""
    plan = Plan(Recipe(Growth(0.25, 0.5)), 1000, 64, steps=100)
    assert plan.sizes[0] == 16 and plan.sizes[-1] == 64 and sorted(plan.sizes) == plan.sizes
    full = next(step for step, size in enumerate(plan.sizes) if size == 64)
    assert plan.at(full).fraction == pytest.approx(0.5, abs=0.02)


def test_a_schedule_in_epochs_paces_an_exact_number_of_steps():
    """A unit that depends on the number of examples, which depends on the schedule."""
    plan = Plan(Recipe(Growth(0.25, "2 epochs")), 128, 64, steps=20)
    assert plan.steps == 20
    full = next(step for step, size in enumerate(plan.sizes) if size == 64)
    assert plan.at(full).done == pytest.approx(256, abs=40)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"epochs": 2}, 8), ({"samples": 90}, 3), ({"tokens": 1000}, 4), ({"tokens": 49 * 25}, 4), ({"steps": 7}, 7),
     ({"samples": 3}, 1), ({"epochs": 0.75}, 3)],
)  # fmt: skip
def test_budgets_in_each_unit(budget, steps):
    """A budget that loses its last batch to rounding, or takes one too many."""
    plan = Plan(Recipe(), 100, 25, tokens_per_example=10 if budget.get("tokens") == 1000 else 12, **budget)
    assert plan.steps == steps


def test_a_budget_in_tokens_loses_nothing_to_rounding():
    """49 * (1 / 49) is below 1: a whole batch was lost."""
    for per_example in range(1, 400):
        assert Plan(Recipe(), 10, 1, tokens=3 * per_example, tokens_per_example=per_example).planned == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "one budget"), ({"steps": 3, "epochs": 1}, "one budget"), ({"steps": 0}, "above 0"),
     ({"epochs": float("nan")}, "above 0"), ({"steps": 0.5}, "1 or more"), ({"steps": 3, "slices": 3}, "slices"),
     ({"steps": 3, "slices": 0}, "slices"), ({"tokens": 100}, "tokens_per_example"),
     ({"steps": 3, "batch": 0}, "above 0")],
)  # fmt: skip
def test_bad_budgets_are_refused(arguments, message):
    """A run of no step, or of the length of another budget."""
    with pytest.raises(ValueError, match=message):
        Plan(Recipe(), **{"examples": 10, "batch": 4, **arguments})


def test_seeds_and_epochs_are_ordered_differently_and_each_the_same_again():
    """An order that depends on what was drawn before."""
    plan = Plan(Recipe(), 50, 10, epochs=2)
    seen = ids(plan)
    assert seen[:50] != seen[50:]
    assert ids(Plan(Recipe(), 50, 10, epochs=2)) == seen
    assert ids(Plan(Recipe(), 50, 10, epochs=2, seed=1)) != seen
    assert plan.indices(plan.at(2)).tolist() == seen[20:30]  # also back again
    assert ids(Plan(Recipe(), 50, 25, epochs=2)) == seen  # whatever the batch size


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_resumed_mid_run_gives_what_the_uninterrupted_one_gives(workers):
    """A resumed run that begins its epoch anew."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    plan = Plan(Recipe(Growth()), 30, 8, epochs=2)
    loader: DataLoader = DataLoader(Numbers(30), batch_sampler=plan.batches(), **options)
    whole = [(at, batch.tolist()) for at, (batch,) in zip(plan, loader)]
    assert len(whole) == plan.steps == plan.step and len(plan) == 0
    assert [batch for _, batch in whole] == [plan.indices(at).tolist() for at, _ in whole]

    plan.resume(3)
    assert len(plan) == len(loader) == plan.steps - 3
    assert [(at, batch.tolist()) for at, (batch,) in zip(plan, loader)] == whole[3:]  # the same loader again
    fresh = Plan(Recipe(Growth()), 30, 8, epochs=2)
    fresh.resume(5)
    later: DataLoader = DataLoader(Numbers(30), batch_sampler=fresh.batches(), **options)
    assert [(at, batch.tolist()) for at, (batch,) in zip(fresh, later)] == whole[5:]


def test_resuming_outside_the_run_is_refused():
    """A checkpoint of a longer run that resumes at its end in silence."""
    plan = Plan(Recipe(), 30, 10, steps=4)
    plan.resume(4)
    assert list(plan) == []
    for step in (-1, 5):
        with pytest.raises(ValueError, match="4 steps"):
            plan.resume(step)


class Watched(Numbers):
    """Counts what is read."""

    read = 0

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        self.read += 1
        return super().__getitem__(i)


def test_calibration_reads_lazily_from_a_loader_of_its_own():
    """A training loader whose workers a second iteration reset; data read though nothing needs it."""
    data = Watched(64)
    plan = Plan(Recipe(), 64, 4, epochs=8)
    loader: DataLoader = DataLoader(data, batch_sampler=plan.batches())
    pairs = zip(plan, loader)
    first = [next(pairs)[1][0].tolist() for _ in range(3)]
    calibration = plan.calibration(data)
    assert calibration is not loader and data.read == 12
    state = torch.get_rng_state()
    batches = [batch for (batch,) in calibration]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(batches) == 32 and data.read == 12 + 32 * 4
    assert plan.step == 2
    rest = [batch.tolist() for _, (batch,) in pairs]
    assert first + rest == [plan.indices(plan.at(step)).tolist() for step in range(plan.steps)]


def test_calibration_near_the_end_and_in_short_runs_takes_what_there_is():
    """Fewer batches than asked for because the run is almost over."""
    plan = Plan(Recipe(), 64, 4, epochs=8)
    plan.resume(plan.steps)
    assert len(list(plan.calibration(Numbers(64)))) == 32
    assert len(list(plan.calibration(Numbers(64), batches=5))) == 5
    short = Plan(Recipe(), 64, 4, steps=3)
    assert len(list(short.calibration(Numbers(64), collate_fn=torch.utils.data.default_collate))) == 3


def test_the_end_of_a_plan_is_a_time_too():
    """Evaluating after the last step."""
    plan = Plan(Recipe(Ramp()), 30, 10, steps=4)
    assert plan.at(4).fraction == 1.0 and plan.at(4).batch == 0 and plan.at(4).epoch == 1


def test_epochs_count_examples_where_batches_straddle():
    """An epoch number that changes in the middle of the batch before."""
    plan = Plan(Recipe(), 10, 4, epochs=2)
    assert [(at.epoch, at.done) for at in plan] == [(0, 0), (0, 4), (0, 8), (1, 12), (1, 16)]


def test_schedules_see_what_the_run_will_see_while_the_plan_is_laid():
    """Batch sizes laid with tokens unknown, or at a fraction of 1."""
    seen = []

    class Spy(Growth):
        def schedule(self, at):
            seen.append(at)
            return super().schedule(at)

    plan = Plan(Recipe(Spy(over="100 tokens")), 30, 10, epochs=2, seed=3, tokens_per_example=5)
    assert isinstance(Spy(), ScheduleMethod)
    assert all(at.fraction < 1 and at.seed == 3 and at.tokens_per_example == 5 for at in seen)
    assert plan.at(1).tokens_per_example == 5
    assert list(itertools.accumulate(plan.sizes)) == plan.ends
