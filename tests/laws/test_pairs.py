"""Laws of composition: order of listing, conflicts, and methods that share a phase."""

import json
import pickle
import re

import pytest
import torch
from worlds import (
    ALLOWED,
    NAMES,
    PAIRS,
    REFUSED,
    conflict,
    example,
    recipe_of,
    scramble_weights,
    worlds_of,
)

from stretto import methods
from stretto.core import (
    SLOTS,
    At,
    Batch,
    BatchMethod,
    FactorsMethod,
    ModelMethod,
    Phase,
    Recipe,
    ScheduleMethod,
    StartMethod,
    stable_hash,
    stream,
)

EXCLUSIVE = [  # what must not go together, whatever else the catalogue holds
    {"adamw", "sgd", "muon", "shampoo", "soap", "lion"},
    {"cosine", "warmup_stable_decay", "linear_to_zero", "power_cool"},
    {"schedule_free", "primal_averaging", "ema_nesterov", "lookahead"},
    {"cautious_weight_decay", "hyperball"},
    {"hyperball", "update_floor"},
    {"schedule_free", "primal_averaging", "ema", "swa"},
    {"gradient_clipping", "gradient_value_clipping", "adaptive_gradient_clipping"},
    {"mixup", "cutmix", "either"},
    {"rand_augment", "aug_mix"},
    {"progressive_resizing", "sequence_length_warmup"},
]


@pytest.mark.parametrize("first, second", ALLOWED)
def test_order_of_listing_is_irrelevant(first, second):
    a, b = Recipe(example(first), example(second)), Recipe(example(second), example(first))
    assert a == b and a.hash == b.hash and str(a) == str(b) and hash(a) == hash(b)
    assert a.to_json() == b.to_json()
    assert Recipe(example(first)) + example(second) == a
    assert a - type(example(second)) == Recipe(example(first))


@pytest.mark.parametrize("first, second", REFUSED)
def test_conflicts_name_both_and_a_way_out(first, second):
    message = str(conflict(first, second))
    for name in (first, second):
        assert methods.CATALOGUE[name].__name__ in message
    assert re.search(r"; (use Either\(.*, or )?take one out, as in recipe - ", message), message


def test_conflicts_are_those_of_one_place():
    expected = {pair for pair in PAIRS for group in EXCLUSIVE if set(pair) <= group}
    known = set().union(*EXCLUSIVE)
    assert {pair for pair in REFUSED if set(pair) <= known} == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_listed_once(name):
    with pytest.raises(ValueError, match="listed twice") as error:
        Recipe(example(name), example(name))
    assert methods.CATALOGUE[name].__name__ in str(error.value)


def _sharing(slot_class):
    """Pairs that take one phase of a slot, where it holds many."""
    many = SLOTS[slot_class].many
    takes = {name: {p for c, _, p in example(name).places() if c is slot_class} for name in NAMES}
    return [(a, b) for a, b in ALLOWED if takes[a] & takes[b] & many and worlds_of(a, b)]


def test_pairs_in_one_phase_are_those_that_are_compared():
    """A slot in which two methods meet in one phase needs a test that they commute."""
    compared = {ModelMethod, FactorsMethod, StartMethod}
    for slot_class in set(SLOTS) - compared:
        sharing = _sharing(slot_class)
        if slot_class is ScheduleMethod:  # each hyperparameter has one schedule, so these write other ones
            sharing = [(a, b) for a, b in sharing if {*example(a).paces} & {*example(b).paces}]
        assert not sharing, f"{slot_class.__name__}: compare these here"


@pytest.mark.parametrize(
    "first, second", [p for p in ALLOWED if all(isinstance(example(n), ModelMethod) for n in p)]
)
def test_surgery_commutes(first, second):
    """Both orders give the same function of the same named weights, within a phase and across phases."""
    for world in worlds_of(first, second):
        outputs, keys = [], []
        for order in ((first, second), (second, first)):
            model = world.model()
            for name in order:
                with stream(stable_hash(0, name)):
                    model = example(name).model(model)
            scramble_weights(model)  # new layers begin as the identity, which would commute with anything
            keys.append(sorted(model.state_dict()))
            with torch.no_grad():
                outputs.append(model.eval()(world.inputs[:4]))
        assert keys[0] == keys[1]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("first, second", _sharing(FactorsMethod))
def test_factors_multiply(first, second):
    for world in worlds_of(first, second):
        recipe = recipe_of(first, second)
        model = recipe.model(world.model())
        single = [example(first), example(second)]
        for group in recipe.groups(model):
            for name, parameter in zip(group["names"], group["params"]):
                product = {}
                for method in single:
                    for key, factor in method.factors(model, name, parameter).items():
                        product[key] = product.get(key, 1.0) * factor
                assert group["factors"].items() >= {k: v for k, v in product.items() if v != 1.0}.items()


@pytest.mark.parametrize("first, second", _sharing(StartMethod))
def test_starts_of_one_phase_write_other_parameters(first, second):
    for world in worlds_of(first, second):
        model = world.model()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        inputs = world.batch(slice(0, 4)).inputs
        written = [{name for name, _ in example(n).start(model, weights, inputs)} for n in (first, second)]
        assert all(written) and written[0].isdisjoint(written[1])


@pytest.mark.parametrize("first, second", ALLOWED)
def test_forms_read_back(first, second):
    recipe = Recipe(example(first), example(second))
    read = [
        methods.parse(str(recipe)),
        methods.from_json(json.loads(json.dumps(recipe.to_json()))),
        pickle.loads(pickle.dumps(recipe)),
    ]
    for other in read:
        assert other == recipe and other.hash == recipe.hash


# -- Either stands for a pair that could not go together


class Negate(BatchMethod):
    phases = (Phase.MIX,)

    def batch(self, batch, at):
        return Batch(-batch.inputs, batch.targets, batch.rows, batch.index)


def test_either_takes_the_phase_of_both():
    either = methods.Either(methods.MixUp(), Negate())
    assert either.phases == (Phase.MIX,)
    with pytest.raises(ValueError, match="Either and MixUp both want batch/mix"):
        Recipe(either, methods.MixUp())


def test_either_refuses_what_shares_no_phase():
    with pytest.raises(ValueError, match="MixUp and SequenceLengthWarmup share none; list both"):
        methods.Either(methods.MixUp(), methods.SequenceLengthWarmup())
    with pytest.raises(ValueError, match="change the batch and nothing else; AdamW is none"):
        methods.Either(methods.AdamW(), methods.AdamW())


def test_either_draws_by_its_share_and_alike_on_all_slices():
    inputs = torch.ones(4, 2)
    batch = Batch(inputs, torch.zeros(4), torch.arange(4), torch.arange(4))
    either = methods.Either(Negate(), methods.MixUp(), share=0.3)
    drawn = []
    for step in range(400):
        signs = {
            either.batch(batch, At(step, 400, 0, 4 * step, 1600, 5, 4, slice=s, slices=2)).inputs[0, 0].item()
            < 0
            for s in range(2)
        }
        assert len(signs) == 1
        drawn.append(signs.pop())
    assert abs(sum(drawn) / 400 - 0.3) < 0.07
