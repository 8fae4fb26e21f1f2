"""The Updater: one visible order from a batch to averaged weights, and one state_dict.

It runs a recipe in anybody's loop: `for part in update(batch, at): update.loss(model(part.inputs),
part.targets).backward()`. What a method may do, and when, is the order of the calls in this file.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from stretto.core import (
    At,
    AverageMethod,
    Batch,
    BatchMethod,
    ConstrainMethod,
    Forward,
    GradientsMethod,
    Loss,
    LossMethod,
    Method,
    Mixed,
    ModelMethod,
    OptimizerMethod,
    PassesMethod,
    Phase,
    PredictMethod,
    Recipe,
    SelectMethod,
    StartMethod,
    State,
    WrapMethod,
    first_tensor,
    map_data,
    stable_hash,
    stream,
)
from stretto.plan import Plan
from stretto.timed import Clock, Timed

Valid = Callable[[Any], Tensor]  # targets -> bool, in the shape of the loss's values


class Part(NamedTuple):
    """A micro-batch on its way through the model."""

    batch: Batch
    at: At
    row: int  # the first global row
    number: int  # among the parts of this step


class Updater:
    """Takes a recipe through a run: call it with each batch and time, and step through the parts it yields.

    model: as `recipe.model` returned it, wrapped or not. loss: per-example, or a torch loss asked for it by
    `reduction="none"`. optimizer: yours, where the recipe has none. forward(model, inputs): how to run the
    model where the Updater does so itself. valid(targets): which targets count. scaler: a GradScaler.
    pretrained: weights were loaded, so INITIALISE is refused. microbatch: examples in one forward.
    Raises ValueError for a recipe without optimizer, and for a model that skipped `recipe.model`.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        loss: Loss,
        plan: Plan,
        *,
        optimizer: Optimizer | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        valid: Valid | None = None,
        scaler: Any = None,
        pretrained: bool = False,
        microbatch: int | None = None,
    ) -> None:
        self.recipe, self.plan, self.wrapped, self.model = recipe, plan, model, unwrap(model)
        self.run_model, self.scaler, self.microbatch = forward or run_model, scaler, microbatch
        self.step = 0
        self._started = False
        self._check_surgery(pretrained)
        self.clock = Clock()
        self.valid = valid or default_valid(loss)
        self.base = per_example(loss)
        self._values = self._compose(self.base)
        self.optimizer = self._build(optimizer)
        self.device = next(self.model.parameters()).device
        self._selects, self._batches = recipe.of(SelectMethod), recipe.of(BatchMethod)
        self._passes, self._gradients = recipe.of(PassesMethod), recipe.of(GradientsMethod)
        self._constrains, self._averages = recipe.of(ConstrainMethod), recipe.of(AverageMethod)
        self.state: dict[str, State] = {
            m.name: {} for m in (*self._gradients, *self._constrains, *self._averages)
        }
        self._timed = [module for module in self.model.modules() if isinstance(module, Timed)]
        if recipe.of(LossMethod):
            self._timed.append(self.clock)
        self._count: Tensor | float = 1.0  # of what counts in the present batch, over all slices
        self._examples = 1
        self._part: Part | None = None
        self.round = 0  # which pass of the present step is running

    # -- one step

    def __call__(self, batch: Batch, at: At) -> Iterator[Batch]:
        """Yield the parts to run forward and backward; then step. Leaving early means no step."""
        complete = False
        try:
            yield from self.passes(batch, at)
            complete = True
        finally:
            if not complete:
                self.optimizer.zero_grad()
        self.finish(at)

    def passes(self, batch: Batch, at: At) -> Iterator[Batch]:
        """The first half of a step, for hosts with a loop of their own: all up to the gradients."""
        self._check_step(at)
        batch = self._number(batch, at)
        if self.step == 0 and not self._started:
            self._start(batch)
        self._schedule(at)
        parts = self._cut(self._prepare(batch, at))
        rounds = self._rounds(at)
        caller = _random_state(self.device)
        try:
            for number, _ in enumerate(rounds):
                self.round = number
                self.optimizer.zero_grad()
                kept = self._buffers() if number else None
                for part in parts:
                    for timed in self._timed:
                        timed.advance(part.at, part.row, self.device)
                    _seed(self.device, stable_hash(at.seed, "layers", at.step, part.number))
                    self._part = part
                    yield part.batch
                if kept:
                    torch._foreach_copy_(list(self.model.buffers()), kept)
        finally:
            rounds.close()
            self._part = None
            _restore_random_state(self.device, caller)

    @torch.no_grad()
    def finish(self, at: At) -> None:
        """The second half of a step: from the gradients to the averages."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        for method in self._gradients:
            method.gradients(self.model, at, self.state[method.name])
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        for method in self._constrains:
            method.constrain(self.model, at, self.state[method.name])
        for method in self._averages:
            method.average(self.model, at, self.state[method.name])
        self.skip()

    def skip(self) -> None:
        """End a step without updating: gradients are dropped, time goes on."""
        self.optimizer.zero_grad()
        self.step += 1

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """This part's share of the batch's mean loss, () with gradient; the shares of all parts sum to it."""
        values = self._values(outputs, targets)
        if values.ndim == 0:
            assert self._part is not None
            total = values * (len(self._part.batch) / self._examples)
        else:
            total = self._weighted(values, targets).sum() / self._count
        if self.scaler:
            total = _ScaleGradient.apply(total, self.scaler.scale(torch.ones_like(total)))
        return total

    # -- between steps

    @contextmanager
    def evaluating(self, calibration: Iterable[Any] = ()) -> Iterator[Forward]:
        """Within it the model predicts as the recipe would: averaged weights, eval mode, no gradients.

        Where weights are averaged and there is batch norm, its statistics are re-estimated on `calibration`
        (inputs, or tuples that begin with inputs); else that is never iterated. All is put back on exit.
        """
        at = self.plan.at(self.step)
        modes = [(module, module.training) for module in self.model.modules()]
        parameters = dict(self.model.named_parameters())
        buffers = self._buffers()
        kept: dict[str, Tensor] = {}
        with torch.no_grad():
            try:
                self.model.eval()
                for method in self._averages:
                    for name, value in method.averaged(
                        self.model, self.optimizer, at, self.state[method.name]
                    ).items():
                        kept.setdefault(name, parameters[name].clone())
                        parameters[name].copy_(value)
                if kept:
                    self._estimate_batch_norm(calibration)
                yield self._predict()
            finally:
                for name, value in kept.items():
                    parameters[name].copy_(value)
                for buffer, value in zip(self.model.buffers(), buffers):
                    buffer.copy_(value)
                for module, mode in modes:
                    module.training = mode

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, averages and masks, step: everything a resumed run needs, for weights_only=True."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "step": self.step,
            "recipe": self.recipe.hash,
            "slices": self.plan.slices,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; then `plan.resume(update.step)`. Refuses another recipe's state."""
        for name, mine in (("recipe", self.recipe.hash), ("slices", self.plan.slices)):
            if state[name] != mine:
                raise ValueError(
                    f"this state is of a run with {name} {state[name]}, and this run has {name} {mine}; "
                    "resume with what the run began with"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.state = {name: dict(kept) for name, kept in state["state"].items()}
        self.step, self._started = state["step"], True
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    # -- making

    def _check_surgery(self, pretrained: bool) -> None:
        wanted = tuple(m.name for m in self.recipe.of(ModelMethod))
        surgery = getattr(self.model, "stretto_surgery", None)
        found = surgery.methods if surgery else ()
        if found != wanted:
            raise ValueError(
                f"the recipe changes the model by {', '.join(wanted) or 'nothing'}, and this model was changed "
                f"by {', '.join(found) or 'nothing'}; call model = recipe.model(model) before wrapping it"
            )
        self._inserted = set(surgery.inserted) if surgery else set()
        self.pretrained = pretrained
        if pretrained:
            for method in self.recipe.of(StartMethod):
                if Phase.INITIALISE in method.phases:
                    raise ValueError(
                        f"{type(method).__name__} sets initial values, which would destroy pretrained weights; "
                        f"take it out: recipe - {type(method).__name__}"
                    )

    def _build(self, optimizer: Optimizer | None) -> Optimizer:
        methods = self.recipe.of(OptimizerMethod)
        if optimizer is None and not methods:
            raise ValueError("the recipe has no optimizer; add one, such as AdamW(), or give optimizer=")
        if optimizer is not None and methods:
            raise ValueError(
                f"{type(methods[0]).__name__} of the recipe and optimizer= both want to step; drop one of them"
            )
        if optimizer is None:
            optimizer = methods[0].optimizer(self.model, self.recipe.groups(self.model))
        for wrapper in self.recipe.of(WrapMethod):
            optimizer = wrapper.wrap(optimizer)
        names = set(self.recipe.schedule(self.plan.at(0))) - {"batch_size"}
        for group in optimizer.param_groups:
            for name in names | set(group.get("factors", ())):
                if name not in group:
                    raise ValueError(
                        f"the recipe paces {name!r}, and {type(optimizer).__name__} has no such hyperparameter; "
                        f"it has {', '.join(sorted(set(group) - {'params', 'names', 'factors'}))}"
                    )
            group["base"] = {name: group[name] for name in names | set(group.get("factors", ()))}
        return optimizer

    def _compose(self, loss: Loss) -> Loss:
        """The loss, its target methods, the mixture, the penalties: from the inside out."""
        methods = self.recipe.of(LossMethod)
        if methods:
            loss = _needs_examples(loss, " and ".join(type(m).__name__ for m in methods))
        penalties = [m for m in methods if Phase.PENALTY in m.phases]
        for method in methods:
            if method not in penalties:
                loss = method.loss(loss, self.clock)
        loss = self._mixture(loss)
        for method in penalties:
            loss = method.loss(loss, self.clock)
        return loss

    def _mixture(self, loss: Loss) -> Loss:
        """share * loss(first) + (1 - share) * loss(second), each where its target counts."""
        each = _needs_examples(loss, "mixing targets")

        def mixed(outputs: Any, targets: Any) -> Tensor:
            if not isinstance(targets, Mixed):
                return loss(outputs, targets)
            first, second = each(outputs, targets.first), each(outputs, targets.second)
            share = _by_example(targets.share, first)
            if (counts := self.valid(targets.first)) is not None:
                first = torch.where(counts, first, 0)
                second = torch.where(self.valid(targets.second), second, 0)
            return share * first + (1 - share) * second

        return mixed

    # -- the steps of a step

    def _check_step(self, at: At) -> None:
        if at.step != self.step:
            raise ValueError(
                f"the update is at step {self.step} and the plan at {at.step}; "
                "after loading a state call plan.resume(update.step)"
            )

    def _number(self, batch: Batch, at: At) -> Batch:
        """Fill rows and index; check that the batch is the plan's."""
        if len(first_tensor(batch.inputs)) != at.batch:
            raise ValueError(
                f"step {at.step} takes {at.batch} examples and was given {len(first_tensor(batch.inputs))}; "
                "let the loader draw from plan.batches()"
            )
        device = first_tensor(batch.inputs).device
        rows = torch.arange(at.batch, device=device) if batch.rows is None else batch.rows
        index = self.plan.indices(at).to(device, non_blocking=True) if batch.index is None else batch.index
        return Batch(batch.inputs, batch.targets, rows, index)

    @torch.no_grad()
    def _start(self, batch: Batch) -> None:
        parameters = dict(self.model.named_parameters())
        weights = {name: parameter.detach() for name, parameter in parameters.items()}
        for method in self.recipe.of(StartMethod):
            with stream(stable_hash(self.plan.seed, "start", method.name)):
                for name, value in method.start(self.model, weights, batch.inputs):
                    if value.shape != parameters[name].shape:
                        raise ValueError(
                            f"{method.name} gives {name} the shape {tuple(value.shape)}; "
                            f"it has {tuple(parameters[name].shape)}"
                        )
                    if not self.pretrained or name in self._inserted:
                        parameters[name].copy_(value)
        self._started = True

    def _schedule(self, at: At) -> None:
        schedule = self.recipe.schedule(at)
        for group in self.optimizer.param_groups:
            factors = group.get("factors", {})
            for name, value in group.get("base", {}).items():
                group[name] = value * factors.get(name, 1.0) * schedule.get(name, 1.0)

    @torch.no_grad()
    def _prepare(self, batch: Batch, at: At) -> list[tuple[Batch, At]]:
        """Select and transform each slice on its own, and count what counts over all of them."""
        width = at.batch // at.slices
        slices = []
        for number in range(at.slices):
            here = at if at.slices == 1 else _in_slice(at, number)
            piece = batch if at.slices == 1 else batch.take(slice(number * width, (number + 1) * width))
            for select in self._selects:
                piece = select.select(piece, here, self._losses)
            for method in self._batches:
                piece = method.batch(piece, here)
            slices.append((piece, here))
        self._examples = sum(len(piece) for piece, _ in slices)
        counts = [self._weights(piece.targets) for piece, _ in slices]
        whole = [count for count in counts if count is not None]
        self._count = sum(count.sum() for count in whole).clamp(min=1e-12) if whole else self._examples  # type: ignore[union-attr]
        return slices

    def _cut(self, slices: list[tuple[Batch, At]]) -> list[Part]:
        parts: list[Part] = []
        row = 0
        for batch, at in slices:
            size = self.microbatch or len(batch)
            for begin in range(0, len(batch), size):
                cut = batch if size >= len(batch) else batch.take(slice(begin, begin + size))
                parts.append(Part(cut, at, row + begin, len(parts)))
            row += len(batch)
        return parts

    def _rounds(self, at: At) -> Any:
        """A generator of passes: the recipe's, or a single one."""
        if self._passes:
            return self._passes[0].passes([p for p in self.model.parameters() if p.requires_grad], at)
        return (None for _ in range(1))

    def _weights(self, targets: Any) -> Tensor | None:
        """How much each value of the loss counts, or None where each example counts the same."""
        if isinstance(targets, Mixed):
            first, second = self.valid(targets.first), self.valid(targets.second)
            if first is None:
                return None
            share = _by_example(targets.share, first)
            return share * first + (1 - share) * second
        counts = self.valid(targets)
        return None if counts is None else counts.float()

    def _weighted(self, values: Tensor, targets: Any) -> Tensor:
        weights = self._weights(targets)
        if weights is None:
            return values.flatten(1).mean(1) if values.ndim > 1 else values
        if weights.shape != values.shape:
            raise ValueError(
                f"the loss gives values of shape {tuple(values.shape)} for targets whose counting ones have "
                f"shape {tuple(weights.shape)}; give Updater(valid=...), a bool for each value"
            )
        return torch.where(weights > 0, values, 0) * weights

    def _losses(self, batch: Batch) -> Tensor:
        """(N,) losses of a batch by the plain loss; no gradient, no moved statistics."""
        kept = self._buffers()
        with torch.no_grad():
            values = self.base(self.run_model(self.wrapped, batch.inputs), batch.targets)
            if kept:
                torch._foreach_copy_(list(self.model.buffers()), kept)
            if values.ndim == 0:
                raise ValueError("selecting examples needs per-example losses, and this loss gives a scalar")
            weights = self._weights(batch.targets)
            if values.ndim == 1:
                return values
            if weights is None:
                return values.flatten(1).mean(1)
            return (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)

    def _buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.model.buffers()]

    def _estimate_batch_norm(self, calibration: Iterable[Any]) -> None:
        layers = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not layers:
            return
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # type: ignore[assignment]  # None: a plain average over the batches
            layer.train()
        try:
            count = 0
            for item in calibration:
                inputs = item if isinstance(item, Tensor | Mapping) else item[0]
                self.run_model(self.wrapped, map_data(lambda t: t.to(self.device), inputs))
                count += 1
            if not count:
                raise ValueError(
                    "averaged weights need batch norm re-estimated: update.evaluating(plan.calibration(data))"
                )
        finally:
            for layer, momentum in zip(layers, momenta):
                layer.momentum = momentum
                layer.eval()

    def _predict(self) -> Forward:
        forward: Forward = functools.partial(self.run_model, self.wrapped)
        for method in self.recipe.of(PredictMethod):
            forward = method.predict(forward)
        return forward


# ------------------------------------------------------------------------------------------------- small parts


def unwrap(model: nn.Module) -> nn.Module:
    """The model as it was built: out of DDP (`module`) and torch.compile (`_orig_mod`)."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def run_model(model: nn.Module, inputs: Any) -> Any:
    """model(**inputs) for mappings, else model(inputs); its `.logits` where it has them."""
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(outputs, "logits", outputs)


def per_example(loss: Loss) -> Loss:
    """A torch loss asked for one value an example; any other callable as it is."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        loss = copy.copy(loss)
        loss.reduction = "none"  # type: ignore[attr-defined]
        return loss
    try:
        takes_reduction = "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        takes_reduction = False
    return functools.partial(loss, reduction="none") if takes_reduction else loss


def default_valid(loss: Loss) -> Callable[[Any], Any]:
    """Which targets count: integer ones other than the loss's ignore_index (-100 where it has none)."""
    ignore = getattr(loss, "ignore_index", getattr(loss, "keywords", {}).get("ignore_index", -100))

    def valid(targets: Any) -> Tensor | None:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return None
        return targets != ignore

    return valid


def _needs_examples(loss: Loss, who: str) -> Loss:
    def checked(outputs: Any, targets: Any) -> Tensor:
        values = loss(outputs, targets)
        if values.ndim == 0:
            raise ValueError(
                f"{who} needs per-example losses, and this loss gives a scalar; write it to give (N,) values"
            )
        return values

    return checked


def _by_example(share: Tensor, like: Tensor) -> Tensor:
    return share.reshape(-1, *(1,) * (like.ndim - 1))


def _in_slice(at: At, number: int) -> At:
    return At(*(getattr(at, f) for f in list(At.__dataclass_fields__)[:-2]), number, at.slices)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _seed(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled: the loss that is printed stays true."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


__all__ = ["Method", "Updater", "default_valid", "per_example", "run_model", "unwrap"]
