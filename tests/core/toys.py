"""Small methods and models for the tests of the core, each doing one visible thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from stretto.core import (
    At,
    AverageMethod,
    Batch,
    BatchMethod,
    ConstrainMethod,
    FactorsMethod,
    Forward,
    GradientsMethod,
    Group,
    Loss,
    LossMethod,
    ModelMethod,
    OptimizerMethod,
    PassesMethod,
    Phase,
    PredictMethod,
    Recipe,
    ScheduleMethod,
    SelectMethod,
    StartMethod,
    State,
)
from stretto.plan import Plan
from stretto.timed import Clock, Timed
from stretto.update import Updater


@dataclass(frozen=True)
class Plain(OptimizerMethod):
    """Plain gradient descent."""

    lr: float = 0.1
    phases = (Phase.UPDATE,)

    def optimizer(self, model: nn.Module, groups: list[Group]) -> Optimizer:
        return torch.optim.SGD(groups, lr=self.lr)


@dataclass(frozen=True)
class Ramp(ScheduleMethod):
    """The learning rate falls linearly."""

    paces = ("lr",)

    def schedule(self, at: At) -> dict[str, float]:
        return {"lr": 1 - at.middle}


@dataclass(frozen=True)
class Growth(ScheduleMethod):
    """The batch grows from `start` to full size, linearly over `over` of the run."""

    start: float = 0.25
    over: float | str = 0.5
    paces = ("batch_size",)

    def schedule(self, at: At) -> dict[str, float]:
        over = at.share(self.over)
        return {"batch_size": self.start + (1 - self.start) * min(1.0, at.fraction / over)}


@dataclass(frozen=True)
class Rates(FactorsMethod):
    """Another learning rate for biases."""

    bias: float = 0.5
    phases = (Phase.GROUP,)

    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        return {"lr": self.bias} if name.endswith("bias") else {}


@dataclass(frozen=True)
class Ascend(PassesMethod):
    """Two passes: the second one from weights moved along the gradient."""

    rho: float = 0.1
    phases = (Phase.ASCEND,)

    def passes(self, params: list[nn.Parameter], at: At) -> Iterator[None]:
        assert not torch.is_grad_enabled()  # also after each yield, whatever the loop body does
        yield
        assert not torch.is_grad_enabled()
        kept = [p.clone() for p in params]
        try:
            for p in params:
                if p.grad is not None:
                    p.add_(p.grad, alpha=self.rho)
            yield
        finally:
            for p, value in zip(params, kept):
                p.copy_(value)


@dataclass(frozen=True)
class Noise(BatchMethod):
    """Adds noise to each row, drawn by row."""

    size: float = 0.1
    phases = (Phase.AUGMENT,)

    def batch(self, batch: Batch, at: At) -> Batch:
        assert batch.rows is not None
        draws = at.uniform("noise", batch.rows, batch.inputs[0].numel()).view(batch.inputs.shape)
        return batch._replace(inputs=batch.inputs + self.size * draws.to(batch.inputs.dtype))


@dataclass(frozen=True)
class Hardest(SelectMethod):
    """Keeps the half of each slice with the largest losses."""

    phases = (Phase.SELECT,)

    def select(self, batch: Batch, at: At, losses: Callable[[Batch], Tensor]) -> Batch:
        values = losses(batch)
        assert values.shape == (len(batch),) and not values.requires_grad
        return batch.take(values.topk(len(batch) // 2).indices)


@dataclass(frozen=True)
class Double(LossMethod):
    """Twice the loss."""

    phases = (Phase.TARGET,)

    def loss(self, loss: Loss, clock: Clock) -> Loss:
        return lambda outputs, targets: 2 * loss(outputs, targets)


@dataclass(frozen=True)
class Penalty(LossMethod):
    """Adds the square of the outputs."""

    weight: float = 0.1
    phases = (Phase.PENALTY,)

    def loss(self, loss: Loss, clock: Clock) -> Loss:
        def penalised(outputs: Any, targets: Any) -> Tensor:
            return loss(outputs, targets) + self.weight * outputs.square().mean(-1)

        return penalised


@dataclass(frozen=True)
class Average(AverageMethod):
    """The plain mean of the weights of all steps."""

    def average(self, model: nn.Module, at: At, state: State) -> None:
        for name, p in model.named_parameters():
            mean = state.setdefault(name, torch.zeros_like(p, requires_grad=False))
            mean.lerp_(p, 1 / (at.step + 1))

    def averaged(self, model: nn.Module, optimizer: Optimizer, at: At, state: State) -> dict[str, Tensor]:
        return dict(state)


@dataclass(frozen=True)
class Halve(GradientsMethod):
    """Halves all gradients, and counts."""

    phases = (Phase.CLIP,)

    def gradients(self, model: nn.Module, at: At, state: State) -> None:
        state.setdefault("count", torch.zeros(())).add_(1)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)


@dataclass(frozen=True)
class Bound(ConstrainMethod):
    """Clamps all weights."""

    phases = (Phase.PROJECT,)

    def constrain(self, model: nn.Module, at: At, state: State) -> None:
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


@dataclass(frozen=True)
class Mirror(PredictMethod):
    """Averages predictions for the inputs and their negatives."""

    phases = (Phase.ENSEMBLE,)

    def predict(self, forward: Forward) -> Forward:
        return lambda inputs: (forward(inputs) + forward(-inputs)) / 2


@dataclass(frozen=True)
class Zero(StartMethod):
    """Zero for one parameter."""

    parameter: str = "2.bias"
    phases = (Phase.INITIALISE,)

    def start(
        self, model: nn.Module, weights: Mapping[str, Tensor], sample: Any
    ) -> Iterable[tuple[str, Tensor]]:
        yield self.parameter, torch.zeros_like(weights[self.parameter])


@dataclass(frozen=True)
class FromSample(StartMethod):
    """Fills every vector with the mean of the sample."""

    phases = (Phase.FIT,)

    def start(
        self, model: nn.Module, weights: Mapping[str, Tensor], sample: Any
    ) -> Iterable[tuple[str, Tensor]]:
        for name, value in weights.items():
            if value.ndim == 1:
                yield name, torch.full_like(value, sample.mean().item())


@dataclass(frozen=True)
class Widen(ModelMethod):
    """Puts a layer before the model."""

    size: int = 4
    phases = (Phase.INSERT,)

    def model(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        model.add_module("extra", nn.Linear(3, 3))
        return model


@dataclass(frozen=True)
class Idle(ModelMethod):
    """Finds nothing and says nothing."""

    phases = (Phase.REPLACE,)

    def model(self, model: nn.Module) -> nn.Module:
        return model


class Times(Timed):
    """Scales by the fraction of the run, and notes when it was advanced."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.noted: list[tuple[int, int, int]] = []

    def advance(self, at: At, row: int = 0, device: torch.device | str = "cpu") -> None:
        self.noted.append((at.step, at.slice, row))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.clock.fraction)


def mlp(dtype: torch.dtype = torch.float32, *, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """4 -> 8 -> 3; children 0, 1 (ReLU or norm), 2, then perhaps dropout."""
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.Linear(8, 3)]
    if dropout:
        layers.insert(2, nn.Dropout(dropout))
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.to(dtype)


def examples(count: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (count, 4) and classes (count,)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator, dtype=dtype)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def make(
    recipe: Recipe,
    model: nn.Module | None = None,
    loss: Loss = F.cross_entropy,
    *,
    batch: int = 8,
    steps: int = 3,
    slices: int | None = None,
    seed: int = 0,
    **more: Any,
) -> Updater:
    """An Updater on `examples()`."""
    plan = Plan(recipe, 24, batch, steps=steps, slices=slices, seed=seed)
    return Updater(recipe, recipe.model(mlp()) if model is None else model, loss, plan, **more)


def train(
    update: Updater, data: tuple[Any, Any], steps: int | None = None, model: Any = None
) -> list[Tensor]:
    """Take steps to the end, or so many; the loss of each."""
    last = update.plan.steps if steps is None else update.step + steps
    losses = []
    for step in range(update.step, last):
        at = update.plan.at(step)
        index = update.plan.indices(at)
        total = torch.zeros((), dtype=torch.float64)
        for part in update(Batch(data[0][index], data[1][index]), at):
            loss = update.loss((model or update.wrapped)(part.inputs), part.targets)
            loss.backward()
            if update.round == 0:
                total += loss.detach()
        losses.append(total)
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the state_dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two dicts of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
