"""Recipe: conflicts, order, arithmetic, forms, hash, surgery and groups."""

import copy
import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from toys import (
    Ascend,
    Average,
    Bound,
    Double,
    Growth,
    Halve,
    Hardest,
    Idle,
    Noise,
    Penalty,
    Plain,
    Ramp,
    Rates,
    Widen,
    Zero,
    mlp,
)

from stretto.core import (
    At,
    Batch,
    BatchMethod,
    Duration,
    LossMethod,
    Method,
    ModelMethod,
    Phase,
    PredictMethod,
    Recipe,
    ScheduleMethod,
    change,
    method_json,
    nearest,
    short_form,
)


@dataclass(frozen=True)
class Blend(BatchMethod):
    alpha: float = 0.2
    phases = (Phase.MIX,)

    def batch(self, batch: Batch, at: At) -> Batch:
        return batch


@dataclass(frozen=True)
class Paste(BatchMethod):
    alpha: float = 1.0
    phases = (Phase.MIX,)

    def batch(self, batch: Batch, at: At) -> Batch:
        return batch


@dataclass(frozen=True)
class Fields(ScheduleMethod):
    """A field of each kind."""

    rate: float = 1.0
    over: Duration = 0.5
    orders: tuple[int, ...] = (2, 3)
    inner: Method = Blend()
    on: bool = True
    limit: float | None = None
    paces = ("momentum",)

    def schedule(self, at: At) -> dict[str, float]:
        return {"momentum": 1.0}


@dataclass(frozen=True)
class Descent(Plain):
    """Another optimizer."""


@dataclass(frozen=True)
class Cosine(Ramp):
    """Another schedule of lr."""


ALL = [Ascend(), Average(), Bound(), Double(), Growth(), Halve(), Hardest(), Idle(), Noise(), Penalty(), Plain(),
       Ramp(), Rates(), Widen(), Zero()]  # fmt: skip


# -- conflicts


def test_two_methods_in_one_place_are_refused_with_both_names_and_the_way_out():
    """MixUp with CutMix gave wrong labels in either order, in silence."""
    with pytest.raises(ValueError) as error:
        Recipe(Blend(), Paste())
    assert "Blend and Paste both want batch/mix" in str(error.value)
    assert "Either(Blend(), Paste())" in str(error.value)
    with pytest.raises(
        ValueError, match=r"Plain and Descent both want optimizer/update.*recipe - Plain \+ Desc"
    ):
        Recipe(Plain(), Descent())
    assert Recipe(Plain()) - Plain + Descent() == Recipe(Descent())


def test_two_schedules_of_one_hyperparameter_are_refused_and_of_two_are_not():
    """Factors of lr that multiply or overwrite each other unseen."""
    with pytest.raises(ValueError, match="Ramp and Cosine both want schedule/lr"):
        Recipe(Ramp(), Cosine())
    assert len(Recipe(Ramp(), Growth()).methods) == 2


def test_a_method_listed_twice_is_refused():
    """A method that runs twice because two recipes were added."""
    with pytest.raises(ValueError, match=r"Halve is listed twice.*recipe\.replace\(Halve"):
        Recipe(Halve()) + Recipe(Halve(), Bound())


@pytest.mark.parametrize("thing", [Blend, "blend", None, torch.optim.SGD])
def test_what_is_no_method_is_refused(thing):
    """A class given for an instance, found out deep inside a run."""
    with pytest.raises(ValueError, match="made of methods"):
        Recipe(thing)


def test_a_method_without_dataclass_or_phase_is_refused():
    """A method whose fields are not in the hash, or that never runs."""

    class Bare(Blend.__base__):  # type: ignore[misc, name-defined]
        phases = (Phase.MIX,)

        def batch(self, batch: Batch, at: At) -> Batch:
            return batch

    @dataclass(frozen=True)
    class Nowhere(BatchMethod):
        def batch(self, batch: Batch, at: At) -> Batch:
            return batch

    @dataclass(frozen=True)
    class Usurper(LossMethod):
        phases = (Phase.REDUCE,)

        def loss(self, loss: Any, clock: Any) -> Any:
            return loss

    with pytest.raises(TypeError, match="dataclass"):
        Recipe(Bare())
    with pytest.raises(TypeError, match="names no phase in the slot batch"):
        Recipe(Nowhere())
    with pytest.raises(TypeError, match="the recipe's own in the slot loss"):
        Recipe(Usurper())


def test_a_phase_belongs_to_its_slot():
    """Resizing while training refused beside resizing while testing."""

    @dataclass(frozen=True)
    class Small(BatchMethod):
        phases = (Phase.SIZE,)

        def batch(self, batch: Batch, at: At) -> Batch:
            return batch

    @dataclass(frozen=True)
    class Large(PredictMethod):
        phases = (Phase.SIZE,)

        def predict(self, forward: Any) -> Any:
            return forward

    assert len(Recipe(Small(), Large()).methods) == 2


# -- order and arithmetic


def test_order_of_listing_changes_nothing():
    """LabelSmoothing listed before MixUp smoothed only part of the target."""
    recipe = Recipe(*ALL)
    for shift in range(len(ALL)):
        other = Recipe(*ALL[shift:], *ALL[:shift])
        assert other == recipe and other.hash == recipe.hash and other.methods == recipe.methods
    for a, b in itertools.pairwise([Hardest(), Noise(), Ascend(), Halve(), Bound(), Average()]):
        assert recipe.methods.index(a) < recipe.methods.index(b)


def test_recipes_add_subtract_and_replace():
    """A variant that shares or loses methods of the recipe it came from."""
    recipe = Recipe(Plain(), Blend())
    assert recipe + Halve() == Recipe(Halve(), Blend(), Plain())
    assert recipe + Recipe(Halve()) == recipe + Halve()
    assert recipe - Blend == Recipe(Plain()) and Blend in recipe and Halve not in recipe
    assert recipe.replace(Blend, alpha=0.4).methods[0] == Blend(0.4)
    assert recipe == Recipe(Plain(), Blend())
    with pytest.raises(ValueError, match=r"holds no Halve; it holds blend, plain"):
        recipe - Halve
    with pytest.raises(ValueError, match=r"blend has no field 'alpa'; did you mean alpha"):
        recipe.replace(Blend, alpa=0.4)
    with pytest.raises(ValueError, match="did you mean alpha"):
        change(Blend(), alfa=1)


def test_nearest_names_what_is_near_or_all():
    """An error about an unknown name that leaves one guessing."""
    assert nearest("mixpu", ["mixup", "cutmix", "adamw"]) == "did you mean mixup or cutmix?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


# -- forms and hash


def test_the_hash_is_the_same_in_every_process_and_version():
    """Stored runs that are never found again."""
    recipe = Recipe(Plain(lr=0.02), Blend(0.4), Growth(over="5 epochs"), Fields(orders=(2, 4)))
    assert recipe.hash == "5acc5c046b06"
    assert Recipe().hash == "12b075d6cc7d"


@pytest.mark.parametrize(
    ("a", "b"),
    [(Fields(rate=1), Fields(rate=1.0)), (Fields(over=1), Fields(over=1.0)),
     (Fields(orders=(2, 3)), Fields(orders=[2, 3])), (Fields(inner=Blend(1)), Fields(inner=Blend(1.0))),
     (Fields(limit=2), Fields(limit=2.0))],
)  # fmt: skip
def test_equal_values_of_another_type_hash_alike(a, b):
    """A run paid for twice because its recipe was written by hand with a 1."""
    assert Recipe(a).hash == Recipe(b).hash and Recipe(a) == Recipe(b)
    assert hash(Recipe(a)) == hash(Recipe(b))
    assert "orders" not in short_form(b) and "rate" not in short_form(b)


@pytest.mark.parametrize(
    "fields",
    [
        {"rate": 0.5},
        {"over": "500 steps"},
        {"orders": (2,)},
        {"inner": Blend(0.3)},
        {"on": False},
        {"limit": 1.0},
    ],
)
def test_every_field_is_in_the_hash(fields):
    """A changed hyperparameter that finds the old run."""
    assert Recipe(Fields(**fields)).hash != Recipe(Fields()).hash
    assert str(Recipe(Fields(**fields))) != str(Recipe(Fields()))


def test_a_recipe_as_json_and_as_text():
    """A form that needs eval, or that loses a field."""
    recipe = Recipe(Fields(over="500 steps", inner=Blend(0.5), orders=(2,)), Plain())
    written = json.loads(json.dumps(recipe.to_json()))
    assert written == {
        "methods": [
            {"method": "fields", "rate": 1, "over": "500 steps", "orders": [2],
             "inner": {"method": "blend", "alpha": 0.5}, "on": True, "limit": None},
            {"method": "plain", "lr": 0.1},
        ]
    }  # fmt: skip
    assert str(recipe) == "fields:over=500steps:orders=(2,):inner=(blend:alpha=0.5), plain"
    assert repr(Recipe(Blend())) == "Recipe(Blend(alpha=0.2))"


def test_a_field_that_json_cannot_hold_is_refused():
    """A recipe whose hash is that of a memory address."""
    with pytest.raises(TypeError, match="Tensor cannot stand in a recipe"):
        method_json(Fields(limit=torch.ones(2)))  # type: ignore[arg-type]


# -- surgery


@dataclass(frozen=True)
class Rename(ModelMethod):
    """Wraps a layer, so that its parameters have another name; adds one of its own."""

    phases = (Phase.REPLACE,)

    def model(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        model[0] = nn.Sequential(model[0], nn.Linear(8, 8))
        return model


def test_a_method_that_changed_nothing_raises():
    """BlurPool on a net without strided layers, found out after the run."""
    with pytest.raises(ValueError, match="Idle changed nothing in this Sequential"):
        Recipe(Idle()).model(mlp())


@pytest.mark.parametrize("what", ["attribute", "tuple", "function", "hook", "parameter", "layer"])
def test_each_kind_of_change_counts_as_one(what):
    """A method refused though it did its work."""

    @dataclass(frozen=True)
    class Changes(ModelMethod):
        phases = (Phase.REPLACE,)

        def model(self, model: nn.Module) -> nn.Module:
            layer: Any = model[0]  # type: ignore[index]
            if what == "attribute":
                layer.rate = 0.5
            elif what == "tuple":
                layer.size = (1, 2)
            elif what == "function":
                layer.activation = torch.relu
            elif what == "hook":
                layer.register_forward_hook(lambda m, i, o: None)
            elif what == "parameter":
                layer.weight = nn.Parameter(layer.weight.detach().clone())
            else:
                model[0] = nn.Linear(4, 8)  # type: ignore[index]
            return model

    layer: Any = (model := mlp())[0]
    layer.size, layer.activation = (1, 1), torch.tanh
    Recipe(Changes()).model(model)


def test_new_layers_draw_from_streams_of_their_methods():
    """A method added that changes the initial values of all later layers, or the caller's draws."""
    model = mlp()
    state = torch.get_rng_state()
    one = Recipe(Widen()).model(model)
    assert torch.equal(torch.get_rng_state(), state)
    both = Recipe(Widen(), Rename()).model(mlp())
    assert torch.equal(one.extra.weight, both.extra.weight)  # type: ignore[union-attr, arg-type]
    other = Recipe(Widen()).model(mlp(), seed=1)
    assert not torch.equal(one.extra.weight, other.extra.weight)  # type: ignore[union-attr, arg-type]


def test_inserted_parameters_are_those_that_are_new_and_not_renamed():
    """Pretrained weights overwritten because surgery gave their layer another name."""
    model = Recipe(Rename(), Widen(size=5)).model(mlp())
    methods, inserted = model.stretto_surgery  # type: ignore[misc]
    assert inserted == ("0.1.weight", "0.1.bias", "extra.weight", "extra.bias")
    assert methods == ("rename", "widen:size=5")


def test_surgery_happens_once_and_before_wrapping():
    """Layers inserted twice; surgery on a compiled model, whose graph never sees it."""
    model = Recipe(Widen()).model(mlp())
    with pytest.raises(ValueError, match="before"):
        Recipe(Widen()).model(model)
    assert Recipe(Plain()).model(model) is model  # nothing to do, nothing to refuse
    with pytest.raises(ValueError, match="surgery comes first"):
        Recipe(Widen()).model(torch.compile(mlp(), backend="eager"))
    assert copy.deepcopy(model).stretto_surgery == model.stretto_surgery


# -- groups


def test_parameters_are_grouped_by_equal_products_of_factors():
    """Factors of two methods where the last one wins; a tied or frozen parameter stepped twice or at all."""

    @dataclass(frozen=True)
    class Half(Rates):
        def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
            return {"lr": 0.5, "weight_decay": 0.0} if name in ("0.bias", "0.weight") else {"lr": 1.0}

    model = mlp()
    model.add_module("tied", nn.Linear(4, 8))
    model.tied.weight = model[0].weight  # type: ignore[union-attr]
    model[2].weight.requires_grad_(False)
    groups = Recipe(Rates(), Half()).groups(model)
    assert [(group["names"], group["factors"]) for group in groups] == [
        (["0.weight"], {"lr": 0.5, "weight_decay": 0.0}),
        (["0.bias"], {"lr": 0.25, "weight_decay": 0.0}),
        (["2.bias", "tied.bias"], {"lr": 0.5}),
    ]
    assert [len(group["params"]) for group in groups] == [1, 1, 2]


def test_a_batch_is_replaced_and_cut_by_examples():
    """`_replace` of a named tuple that counts examples in place of fields."""
    batch = Batch(torch.arange(6.0).view(3, 2), {"a": torch.arange(3)}, rows=torch.arange(3))
    assert len(batch) == 3 and len(list(batch)) == 4
    assert batch._replace(inputs=torch.ones(3)).inputs.shape == (3,)
    cut = batch.take(torch.tensor([2, 0]))
    assert cut.targets["a"].tolist() == [2, 0] and cut.rows is not None and cut.rows.tolist() == [2, 0]
    assert cut.index is None
