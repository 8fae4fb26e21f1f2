"""The words every other file speaks: time (At), data (Batch, Mixed), places (Phase, slots) and Recipe.

A method inherits one slot class for each thing it touches and names its phases there. Order and conflicts
follow from the phases alone, whatever the order in which methods are listed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from stretto.timed import Clock

Duration = float | str  # a share of the run, or "500 steps", "30 epochs", "1e6 samples", "2e9 tokens"
State = dict[str, Tensor]  # what a method keeps between steps, owned by the Updater
Data = Tensor | Mapping[str, Tensor]
Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> per-example values (N,) or (N, T ...)
Forward = Callable[[Any], Any]  # inputs -> outputs
Group = dict[str, Any]  # an optimizer's parameter group: params, names, factors, hyperparameters
M = TypeVar("M", bound="Method")

# ------------------------------------------------------------------------------------------ time and chance


def stable_hash(*parts: object) -> int:
    """A signed 64-bit hash of the printed parts, the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(*numbers: int) -> int:
    """A hash of whole numbers in [0, 2**64), as `stable_hash`, at a tenth of its cost."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


_GAMMA = -0x61C8864680B583EB  # odd, the golden ratio's part of 2**64


def scramble(x: Tensor) -> Tensor:
    """A bijection of int64 values that looks random (the finaliser of splitmix64); compiles, never syncs."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hash_uniform(key: int | Tensor, rows: Tensor, k: int = 1) -> Tensor:
    """Draws in [0, 1) that depend on key, row and column alone: rows (n,) int64 -> (n, k) float32.

    Of splitmix64, with the key as its seed, the output of number row * k + column. What touches only bits that
    are dropped is left out of its finaliser.
    """
    number = rows[:, None] if k == 1 else rows[:, None] * k + torch.arange(k, device=rows.device)
    x = number * _GAMMA + key
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return ((x >> 40) & 0xFFFFFF).float() * 2.0**-24


_DURATION = re.compile(
    r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*(step|epoch|sample|token)s?\s*"
)


def parse_duration(duration: Duration) -> tuple[float, str]:
    """Value and unit of a duration: 0.3 -> (0.3, "share"), "500 steps" -> (500.0, "steps").

    Raises ValueError for a negative value, a share above 1 and an unknown unit.
    """
    if isinstance(duration, str):
        found = _DURATION.fullmatch(duration)
        if not found:
            raise ValueError(
                f"{duration!r} is no duration; give a share of the run such as 0.3, or a number with "
                "steps, epochs, samples or tokens, such as '500 steps'"
            )
        return float(found[1]), found[2] + "s"
    if not 0 <= duration <= 1:
        raise ValueError(f"{duration} is no share of a run; a bare number lies in [0, 1], else name its unit")
    return float(duration), "share"


@dataclass(frozen=True)
class At:
    """Where training is, outside the compiled graph: all that varies over time is a function of it."""

    step: int  # the step about to be taken, from 0
    steps: int  # of the whole run; 0 while a plan is still being laid
    epoch: int
    done: int  # examples seen before this step
    planned: int  # examples of the whole run
    seed: int = 0
    batch: int = 0  # examples of this step, over all slices
    examples: int = 0  # in the data set
    tokens_per_example: int | None = None
    slice: int = 0
    slices: int = 1

    @property
    def fraction(self) -> float:
        """The share of the run that is done, in [0, 1)."""
        return self.done / self.planned

    @property
    def middle(self) -> float:
        """The share of the run at the middle of this step: neither 0 at the first nor 1 at the last."""
        return (self.done + self.batch / 2) / self.planned

    def share(self, duration: Duration) -> float:
        """A duration as a share of this run, above 1 where it is longer.

        Steps count as average ones where the batch size changes. Raises ValueError where the unit is unknown
        to the plan.
        """
        value, unit = parse_duration(duration)
        if unit == "share":
            return value
        per_unit = {
            "steps": self.planned / self.steps if self.steps else None,
            "epochs": self.examples or None,
            "samples": 1,
            "tokens": 1 / self.tokens_per_example if self.tokens_per_example else None,
        }[unit]
        if per_unit is None:
            raise ValueError(
                f"{duration!r} cannot be placed in this run: "
                + {
                    "steps": "the number of steps follows from batch sizes, so these need another unit",
                    "epochs": "the size of the data set is unknown",
                    "tokens": "give Plan(tokens_per_example=...)",
                }[unit]
            )
        return value * per_unit / self.planned

    def uniform(self, name: str, rows: Tensor, k: int = 1) -> Tensor:
        """(n, k) float32 draws in [0, 1) on the device of `rows` (n,), the same however the batch is cut."""
        return hash_uniform(stable_hash(self.seed, name, self.step), rows, k)

    def generator(self, name: str) -> torch.Generator:
        """A CPU stream owned by `name` at this step and slice, for draws that have no row."""
        return torch.Generator().manual_seed(stable_hash(self.seed, name, self.step, self.slice))

    def shared(self, name: str) -> random.Random:
        """A stream owned by `name` at this step, the same on every rank and slice."""
        return random.Random(stable_hash(self.seed, name, self.step))


class Batch(NamedTuple):
    """What one step trains on. Tensors, or dicts of tensors, whose first dimension is the example."""

    inputs: Any
    targets: Any
    rows: Tensor | None = None  # (N,) int64: each example's row in the global batch
    index: Tensor | None = None  # type: ignore[assignment]  # (N,) int64: each example's id in the data set

    def take(self, rows: Any) -> Batch:
        """The examples named by a slice, or by indices or a mask (n,), of everything the batch holds."""
        return Batch(*(None if part is None else map_data(lambda t: t[rows], part) for part in self))

    def to(self, device: torch.device) -> Batch:
        """The batch on this device."""
        move = functools.partial(Tensor.to, device=device, non_blocking=True)
        return Batch(*(None if part is None else map_data(move, part) for part in self))

    def __len__(self) -> int:  # of examples, not of fields
        return first_tensor(self.inputs).shape[0]


# namedtuple's own asks for as many fields as `len` says, so that `_replace` would count examples.
Batch._make = classmethod(tuple.__new__)  # type: ignore[method-assign, assignment]


class Mixed(NamedTuple):
    """Two targets for one input; share (N,) is the part of the first, the example's own."""

    first: Any
    second: Any
    share: Tensor


def map_data(change: Callable[[Tensor], Tensor], data: Any) -> Any:
    """Apply `change` to a tensor, or to each tensor of a Mixed or a mapping."""
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mixed):
        return Mixed(*(map_data(change, part) for part in data))
    if isinstance(data, Mapping):
        return {name: map_data(change, value) for name, value in data.items()}
    return change(data)


def first_tensor(data: Any) -> Tensor:
    """The tensor that tells how many examples there are and where they lie."""
    return data if isinstance(data, Tensor) else next(iter(data.values()))


# ------------------------------------------------------------------------------------------- slots and phases


class Phase(Enum):
    """Where in its slot a method runs. A phase belongs to its slot: SIZE of batch and predict never meet."""

    FILTER = auto()
    PACK = auto()
    PACE = auto()
    POSITIONS = auto()
    ACTIVATION = auto()
    NORM = auto()
    DEPTH = auto()
    REPLACE = auto()
    INSERT = auto()
    LAYOUT = auto()
    INITIALISE = auto()
    FIT = auto()
    GROUP = auto()
    SELECT = auto()
    SIZE = auto()
    FLIP = auto()
    AUGMENT = auto()
    THIN = auto()
    ERASE = auto()
    MIX = auto()
    BASE = auto()
    TARGET = auto()
    MIXTURE = auto()
    PENALTY = auto()
    REDUCE = auto()
    ASCEND = auto()
    UPDATE = auto()
    LENGTH = auto()
    DECAY = auto()
    WRAP = auto()
    CLIP = auto()
    MASK = auto()
    PROJECT = auto()
    AVERAGE = auto()
    ENSEMBLE = auto()


@dataclass(frozen=True)
class Slot:
    """A thing that methods touch: its phases in running order, and those that several methods may share."""

    name: str
    order: tuple[Phase, ...]
    many: frozenset[Phase] = frozenset()
    own: frozenset[Phase] = frozenset()  # where the recipe itself runs, and no method


SLOTS: dict[type, Slot] = {}  # slot class -> slot, in the order in which a run meets them


def _slot(
    name: str, order: Iterable[Phase], many: Iterable[Phase] = (), own: Iterable[Phase] = ()
) -> Callable[[type[M]], type[M]]:
    def register(cls: type[M]) -> type[M]:
        SLOTS[cls] = Slot(name, tuple(order), frozenset(many), frozenset(own))
        return cls

    return register


class Method(ABC):
    """One speed-up: a frozen dataclass whose fields are its hyperparameters."""

    phases: ClassVar[tuple[Phase, ...]] = ()
    name: ClassVar[str]  # its file in stretto.methods, or its class name in lower case
    spaces: ClassVar[dict[str, str]] = {}  # ranges in which tuning looks for fields, as "log:1e-4..1e-2"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package, _, file = cls.__module__.rpartition(".")
        cls.name = file if package == "stretto.methods" else cls.__name__.lower()

    @property
    def leaves_unused(self) -> bool:
        """Whether in some steps parameters get no gradient, for which DDP would wait in vain."""
        return False

    def places(self) -> Iterator[tuple[type, Slot, Phase]]:
        """The slot classes this method inherits, each with the phase it takes there."""
        for slot_class, slot in SLOTS.items():
            if isinstance(self, slot_class):
                named = [phase for phase in slot.order if phase in self.phases]
                if not named and len(slot.order) == 1:
                    named = [slot.order[0]]
                if not named or not slot.own.isdisjoint(named):
                    choices = ", ".join(phase.name for phase in slot.order if phase not in slot.own)
                    found = "a phase that is the recipe's own" if named else "no phase"
                    raise TypeError(
                        f"{type(self).__name__} names {found} in the slot {slot.name}; it may name {choices}"
                    )
                yield from ((slot_class, slot, phase) for phase in named)

    def __str__(self) -> str:
        return short_form(self)


@_slot("data", (Phase.FILTER, Phase.PACK), many=(Phase.FILTER,))
class DataMethod(Method):
    """Changes the data set, once, before a plan is made of it."""

    @abstractmethod
    def data(self, dataset: Any) -> Any:
        """The data set to train on instead."""


@_slot("schedule", (Phase.PACE,), many=(Phase.PACE,))
class ScheduleMethod(Method):
    """Gives factors for named hyperparameters: lr, weight_decay, momentum, batch_size."""

    paces: ClassVar[tuple[str, ...]]  # the hyperparameters it gives; one method for each

    @abstractmethod
    def schedule(self, at: At) -> dict[str, float]:
        """A factor for each hyperparameter of `paces`; batch_size may depend on at.fraction alone."""


@_slot(
    "model",
    (
        Phase.POSITIONS,
        Phase.ACTIVATION,
        Phase.NORM,
        Phase.DEPTH,
        Phase.REPLACE,
        Phase.INSERT,
        Phase.LAYOUT,
    ),
    many=(Phase.REPLACE, Phase.INSERT, Phase.LAYOUT),
)
class ModelMethod(Method):
    """Changes the model, once, before it is sharded or compiled."""

    @abstractmethod
    def model(self, model: nn.Module) -> nn.Module:
        """The changed model. Raises ValueError saying what it looked for where there is nothing to change."""


@_slot("start", (Phase.INITIALISE, Phase.FIT), many=(Phase.INITIALISE, Phase.FIT))
class StartMethod(Method):
    """Gives parameters their first values."""

    @abstractmethod
    def start(
        self, model: nn.Module, weights: Mapping[str, Tensor], sample: Any
    ) -> Iterable[tuple[str, Tensor]]:
        """Yield (name, full new value); `weights[name]` gives a full present value, `sample` real inputs."""


@_slot("factors", (Phase.GROUP,), many=(Phase.GROUP,))
class FactorsMethod(Method):
    """Gives factors per parameter; those of several methods multiply, equal products share a group."""

    @abstractmethod
    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        """Factors of named hyperparameters for this parameter."""


@_slot("select", (Phase.SELECT,))
class SelectMethod(Method):
    """Chooses the examples of a batch worth training on."""

    @abstractmethod
    def select(self, batch: Batch, at: At, losses: Callable[[Batch], Tensor]) -> Batch:
        """The chosen examples; `losses(batch)` gives (N,) losses, without gradient or moved statistics."""


@_slot(
    "batch",
    (Phase.SIZE, Phase.FLIP, Phase.AUGMENT, Phase.THIN, Phase.ERASE, Phase.MIX, Phase.LAYOUT),
    many=(Phase.LAYOUT,),
)
class BatchMethod(Method):
    """Changes each batch, on the device, before the compiled region."""

    @abstractmethod
    def batch(self, batch: Batch, at: At) -> Batch:
        """The changed batch."""


@_slot(
    "loss",
    (Phase.BASE, Phase.TARGET, Phase.MIXTURE, Phase.PENALTY, Phase.REDUCE),
    many=(Phase.TARGET, Phase.PENALTY),
    own=(Phase.MIXTURE, Phase.REDUCE),
)
class LossMethod(Method):
    """Wraps the loss. MIXTURE and REDUCE are the recipe's own."""

    @abstractmethod
    def loss(self, loss: Loss, clock: Clock) -> Loss:
        """The changed loss, per-example values from (outputs, targets)."""


@_slot("passes", (Phase.ASCEND,))
class PassesMethod(Method):
    """Asks for more than one forward-backward a step."""

    @abstractmethod
    def passes(self, params: list[nn.Parameter], at: At) -> Iterator[None]:
        """A generator: each `yield` asks for a forward-backward; it restores in a `finally` what it moved."""


@_slot("optimizer", (Phase.UPDATE,))
class OptimizerMethod(Method):
    """Builds the optimizer."""

    @abstractmethod
    def optimizer(self, model: nn.Module, groups: list[Group]) -> Optimizer:
        """An optimizer of these groups; what a group carries beside params and names is kept in it."""


@_slot("wrap", (Phase.LENGTH, Phase.DECAY, Phase.WRAP))
class WrapMethod(Method):
    """Wraps the optimizer; LENGTH sits inside DECAY, DECAY inside WRAP."""

    @abstractmethod
    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """The wrapped optimizer."""


@_slot("gradients", (Phase.CLIP, Phase.MASK), many=(Phase.MASK,))
class GradientsMethod(Method):
    """Changes gradients in place before the optimizer's step."""

    @abstractmethod
    def gradients(self, model: nn.Module, at: At, state: State) -> None:
        """Change `.grad` in place."""


@_slot("constrain", (Phase.PROJECT, Phase.MASK), many=(Phase.PROJECT, Phase.MASK))
class ConstrainMethod(Method):
    """Changes weights in place after the optimizer's step."""

    @abstractmethod
    def constrain(self, model: nn.Module, at: At, state: State) -> None:
        """Change parameters in place."""


@_slot("average", (Phase.AVERAGE,))
class AverageMethod(Method):
    """Keeps an average of the weights, used when evaluating."""

    @abstractmethod
    def average(self, model: nn.Module, at: At, state: State) -> None:
        """After each step, in place on `state`."""

    @abstractmethod
    def averaged(self, model: nn.Module, optimizer: Optimizer, at: At, state: State) -> dict[str, Tensor]:
        """The weights to evaluate with, by parameter name, bias-corrected."""


@_slot("predict", (Phase.SIZE, Phase.ENSEMBLE))
class PredictMethod(Method):
    """Changes how the model predicts, when evaluating only."""

    @abstractmethod
    def predict(self, forward: Forward) -> Forward:
        """The changed forward; its cost is reported."""


# ----------------------------------------------------------------------------------------------------- recipe


def short_form(method: Method, brackets: str = "") -> str:
    """The method as the command line writes it, fields that differ from their defaults only."""
    fields = []
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if field.default is dataclasses.MISSING or _json_value(value) != _json_value(field.default):
            text = short_form(value, "()") if isinstance(value, Method) else str(value).replace(" ", "")
            fields.append(f"{field.name}={text}")
    text = ":".join([method.name, *fields])
    return f"({text})" if brackets and fields else text


def method_json(method: Method) -> dict[str, Any]:
    """Name and all fields, as JSON values; a field that is a method is written the same way.

    Values that are equal are written alike, 1.0 as 1 and a tuple as a list, so that they hash alike. Raises
    TypeError for a field that JSON cannot hold.
    """
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    return {"method": method.name} | {f.name: _json_value(getattr(method, f.name)) for f in fields}


def _json_value(value: Any) -> Any:
    if isinstance(value, Method):
        return method_json(value)
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(value)
    if value is None or isinstance(value, int | str):
        return value
    raise TypeError(
        f"{value!r} of type {type(value).__name__} cannot stand in a recipe; fields of methods hold numbers, "
        "texts, methods, and tuples of these"
    )


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an error message: the nearest known names, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, count, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


class Recipe:
    """A set of methods, as data: order of listing is irrelevant, conflicts are refused when it is made.

    Raises ValueError where two methods want one place, naming both and the way out.
    """

    methods: tuple[Method, ...]  # in the order in which they run; ties within a phase by name

    def __init__(self, *methods: Method) -> None:
        for method in methods:
            if not isinstance(method, Method):
                way_out = f"{method.__name__}()" if isinstance(method, type) else "stretto.methods.parse(...)"
                raise ValueError(
                    f"a recipe is made of methods, and {method!r} is none; did you mean {way_out}?"
                )
            if not dataclasses.is_dataclass(method):
                raise TypeError(
                    f"{type(method).__name__} is no dataclass; put @dataclass(frozen=True) before it"
                )
        taken: dict[tuple[str, ...], Method] = {}
        for method in methods:
            for place in {("method", method.name), *_exclusive_places(method)}:
                if place in taken:
                    raise ValueError(_conflict(taken[place], method, place))
                taken[place] = method
        self.methods = tuple(sorted(methods, key=_running_order))
        self._slots = {slot_class: self._in_slot(slot_class, slot) for slot_class, slot in SLOTS.items()}

    def of(self, slot_class: Callable[..., M]) -> list[M]:
        """The methods of one slot in running order; `slot_class` is a class such as BatchMethod."""
        return self._slots[slot_class]  # type: ignore[return-value, index]

    def _in_slot(self, slot_class: type, slot: Slot) -> list[Method]:
        # where several of a method's phases are in one slot, it runs at the first
        first: dict[str, tuple[int, str]] = {}
        for method in self.methods:
            for cls, _, phase in method.places():
                if cls is slot_class:
                    first.setdefault(method.name, (slot.order.index(phase), method.name))
        return sorted((m for m in self.methods if m.name in first), key=lambda m: first[m.name])

    def __contains__(self, method: type[Method]) -> bool:
        return any(isinstance(mine, method) for mine in self.methods)

    def __add__(self, other: Method | Recipe) -> Recipe:
        return Recipe(*self.methods, *(other.methods if isinstance(other, Recipe) else (other,)))

    def __sub__(self, method: type[Method]) -> Recipe:
        self._the(method)
        return Recipe(*(mine for mine in self.methods if not isinstance(mine, method)))

    def replace(self, method: type[Method], **fields: Any) -> Recipe:
        """The recipe with these fields of one method changed: `recipe.replace(MixUp, alpha=0.4)`."""
        return self - method + change(self._the(method), **fields)

    def _the(self, method: type[M]) -> M:
        for mine in self.methods:
            if isinstance(mine, method):
                return mine
        held = ", ".join(mine.name for mine in self.methods) or "nothing"
        raise ValueError(f"the recipe holds no {method.__name__}; it holds {held}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return int(self.hash, 16)

    def __repr__(self) -> str:
        return f"Recipe({', '.join(map(repr, self.methods))})"

    def __str__(self) -> str:
        return ", ".join(map(short_form, self.methods))

    def to_json(self) -> dict[str, Any]:
        """All fields of all methods; read back by `stretto.methods.from_json`."""
        return {"methods": [method_json(method) for method in self.methods]}

    @property
    def hash(self) -> str:
        """12 hex digits of a hash of all fields, the same in each process and version that has the fields."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    # -- what the user's loop asks of a recipe directly

    def data(self, dataset: Any) -> Any:
        """The data set, filtered and packed by the recipe."""
        for method in self.of(DataMethod):
            dataset = method.data(dataset)
        return dataset

    def model(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """The model changed by the recipe; call it before sharding and compiling.

        New layers are initialised from streams named after their methods, so that adding a method leaves
        the values of all other layers unchanged. Raises ValueError where a method changed nothing.
        """
        if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"recipe.model wants the plain model, and was given a {type(model).__name__}; "
                "surgery comes first, then compiling and sharding"
            )
        methods = self.of(ModelMethod)
        if methods and hasattr(model, "stretto_surgery"):
            raise ValueError("this model went through recipe.model(...) before; build a fresh one")
        old = dict(model.named_parameters(remove_duplicate=False))
        known = {id(parameter) for parameter in old.values()}
        device = next((parameter.device for parameter in old.values()), torch.device("cpu"))
        for method in methods:
            before, _alive = _anatomy(model)
            with stream(stable_hash(seed, method.name), device):
                model = method.model(model)
            if _anatomy(model)[0] == before:
                raise ValueError(
                    f"{type(method).__name__} changed nothing in this {type(model).__name__}; "
                    "take it out of the recipe, or see `stretto methods` for what it looks for"
                )
        if methods:
            new = (name for name, p in model.named_parameters() if name not in old and id(p) not in known)
            model.stretto_surgery = Surgery(tuple(map(short_form, methods)), tuple(new))  # type: ignore[assignment]
        return model

    def schedule(self, at: At) -> dict[str, float]:
        """The factors of all hyperparameters that have a schedule, at this point of the run."""
        return {name: value for m in self.of(ScheduleMethod) for name, value in m.schedule(at).items()}

    def groups(self, model: nn.Module) -> list[Group]:
        """Parameters that train, grouped by equal factors: [{"params", "names", "factors"}]."""
        methods = self.of(FactorsMethod)
        groups: dict[tuple[tuple[str, float], ...], Group] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            product: dict[str, float] = {}
            for method in methods:
                for key, factor in method.factors(model, name, parameter).items():
                    product[key] = product.get(key, 1.0) * factor
            factors = {key: value for key, value in sorted(product.items()) if value != 1.0}
            group = groups.setdefault(tuple(factors.items()), {"params": [], "names": [], "factors": factors})
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())


class Surgery(NamedTuple):
    """What `Recipe.model` leaves on a model: its methods' short forms, and the inserted parameters' names."""

    methods: tuple[str, ...]
    inserted: tuple[str, ...]


def change(method: M, **fields: Any) -> M:
    """The method with these fields changed. Raises ValueError naming the nearest field for an unknown one."""
    known = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise ValueError(f"{method.name} has no field {name!r}; {nearest(name, known)}")
    return dataclasses.replace(method, **fields)  # type: ignore[type-var]


def generators(device: torch.device) -> list[torch.Generator]:
    """The global streams that layers on this device draw from."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextmanager
def stream(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within it, torch's draws (on this device too) come from this seed; the caller's are untouched."""
    used = generators(device or torch.device("cpu"))
    states = [generator.get_state() for generator in used]
    try:
        for generator in used:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(used, states):
            generator.set_state(state)


def _exclusive_places(method: Method) -> Iterator[tuple[str, ...]]:
    for _, slot, phase in method.places():
        if isinstance(method, ScheduleMethod) and phase is Phase.PACE:
            yield from (("schedule", name) for name in method.paces)
        elif phase not in slot.many:
            yield (slot.name, phase.name.lower())


def _conflict(first: Method, second: Method, place: tuple[str, ...]) -> str:
    a, b = type(first).__name__, type(second).__name__
    if a == b:
        return f"{a} is listed twice; give it once, or change it with recipe.replace({a}, ...)"
    text = f"{a} and {b} both want {'/'.join(place)}, which holds one; "
    if place[0] == "batch":
        text += f"use Either({a}(), {b}()), or "
    return text + f"take one out, as in recipe - {a} + {b}(...)"


def _running_order(method: Method) -> tuple[Any, ...]:
    slots = list(SLOTS)
    first = min((slots.index(cls), slot.order.index(phase)) for cls, slot, phase in method.places())
    return (*first, method.name)


def _anatomy(model: nn.Module) -> tuple[list[object], list[object]]:
    """What surgery can change: modules, their hooks and plain attributes, how the parameters lie.

    Then what must stay alive while this is compared, since it goes by identity.
    """
    parts: list[object] = []
    alive: list[object] = []
    plain = int | float | str | bool | None | tuple
    for name, module in model.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        parts.append((name, id(module), type(module), {k: v for k, v in own.items() if isinstance(v, plain)}))
        parts.append({key: id(value) for key, value in own.items() if callable(value)})
        parts.append(list(map(id, hooks)))
        alive += [module, *own.values(), *hooks]
    for name, p in model.named_parameters(remove_duplicate=False):
        parts.append((name, id(p), p.dtype, p.device, p.shape, p.stride(), p.requires_grad))
        alive.append(p)
    return parts, alive


__all__ = [
    "At",
    "AverageMethod",
    "Batch",
    "BatchMethod",
    "ConstrainMethod",
    "Data",
    "DataMethod",
    "Duration",
    "FactorsMethod",
    "Forward",
    "GradientsMethod",
    "Group",
    "Loss",
    "LossMethod",
    "Method",
    "Mixed",
    "ModelMethod",
    "OptimizerMethod",
    "PassesMethod",
    "Phase",
    "PredictMethod",
    "Recipe",
    "ScheduleMethod",
    "SelectMethod",
    "StartMethod",
    "State",
    "WrapMethod",
]
