"""The Updater: one visible order from a batch to averaged weights, and one state_dict.

It runs a recipe in anybody's loop: `for part in update(batch, at): update.loss(model(part.inputs),
part.targets).backward()`. What a method may do, and when, is the order of the calls in this file.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from stretto import batch_norms, shards
from stretto.core import (
    At,
    AverageMethod,
    Batch,
    BatchMethod,
    ConstrainMethod,
    FactorsMethod,
    Forward,
    GradientsMethod,
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
    WrapMethod,
    first_tensor,
    generators,
    map_data,
    mix,
    nearest,
    short_form,
    stable_hash,
    stream,
)
from stretto.losses import Valid, compose, default_valid, how_much_counts, per_example, plain_mean
from stretto.plan import Plan
from stretto.timed import Clock, Timed
from stretto.wrapping import Wrapping, unwrap

HALF = (torch.float16, torch.bfloat16)  # too short for sums
_ONE_PASS = (None,)


class Part(NamedTuple):
    """A micro-batch on its way through the model."""

    batch: Batch
    at: At  # its slice's
    row: int  # the first global row
    number: int  # among the parts of its slice
    share: float | Tensor  # of the step's examples, times the number of ranks
    weights: (
        Tensor | None
    )  # of each value of the loss; a step's sum to 1 as the mean of ranks. None: all alike
    inner: torch.Size | None  # of an example's targets that may count, and so of its values. None: any


class Updater:
    """Takes a recipe through a run: call it with each batch and time, and step through the parts it yields.

    model: as `recipe.model` returned it, wrapped or not. loss: per-example, or a torch loss asked for it by
    `reduction="none"`. optimizer: yours, where the recipe has none. forward(model, inputs): how to run the
    model where the Updater does so itself. valid(targets): which targets count; the loss is finite for the
    others too. scaler: a GradScaler. pretrained: weights were loaded, so INITIALISE is refused.
    microbatch: examples in one forward.
    Schedules multiply `base`, a dict in each of the optimizer's groups, which may be changed during the run.
    Of several ranks each takes its share of the batch, and all do the same: `start`, `evaluating`, `state_dict`
    and leaving early are for all of them.
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
        if microbatch is not None and microbatch < 1:
            raise ValueError(f"microbatch is {microbatch}; it must be 1 or more, or None for whole slices")
        self.recipe, self.plan, self.wrapped, self.model = recipe, plan, model, unwrap(model)
        self.run_model, self.scaler, self.microbatch = forward or run_model, scaler, microbatch
        self.pretrained = pretrained
        self.wrapping = Wrapping(model)
        self.step = 0
        self.round = 0  # which pass of the present step is running
        self._check_plan()
        self._check_ranks()
        self._check_unused()
        self._inserted = self._check_surgery()
        self._schedules = recipe.of(ScheduleMethod)
        self._selects, self._batches = recipe.of(SelectMethod), recipe.of(BatchMethod)
        self._passes, self._gradients = recipe.of(PassesMethod), recipe.of(GradientsMethod)
        self._constrains, self._averages = recipe.of(ConstrainMethod), recipe.of(AverageMethod)
        keepers = (*self._gradients, *self._constrains, *self._averages)
        self.state: dict[str, State] = {method.name: {} for method in keepers}
        self.clock = Clock()
        self.valid = valid or default_valid(loss)
        self._values, self._scores = compose(recipe, per_example(loss), self.valid, self.clock)
        self._mean = plain_mean(loss) if valid is None and not recipe.of(LossMethod) else None
        self.wrapping.reshard()
        self.optimizer = self._build(optimizer)
        self.wrapping.share(self.optimizer)

        self._parameters = list(self.model.parameters())
        stepped = (p for group in self.optimizer.param_groups for p in group["params"])
        self._cleared = list({id(p): p for p in (*self._parameters, *stepped)}.values())
        self.device = self._parameters[0].device
        self._precision = torch.promote_types(
            torch.float32, next((p.dtype for p in self._parameters if p.is_floating_point()), torch.float32)
        )
        self._generators = generators(self.device)
        self._timed = [module for module in self.wrapped.modules() if isinstance(module, Timed)]
        if recipe.of(LossMethod):
            self._timed.append(self.clock)
        self._places = [  # of buffers; masks do not move
            (module._buffers, name)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype != torch.bool
        ]
        if batch_norms.moving(model):
            self.wrapping.keep_buffers()
        self._before: list[Tensor] = []  # the buffers as they were before the present step
        self._rows: dict[int, Tensor] = {}  # by batch size
        self._part: Part | None = None
        self._started = False
        self._examples: int | Tensor = 0
        self._chosen: int | Tensor = 0  # examples of the present step
        self._left = False  # whether the step before was left early

    @property
    def examples(self) -> int:
        """How many it trained on so far, on all ranks, without those that a selection left out."""
        return int(self._examples)

    # -- one step

    def __call__(self, batch: Batch, at: At) -> Iterator[Batch]:
        """Yield the parts to run forward and backward; then step.

        Leaving early means no step: gradients, weights, buffers and random state are as before, and the same
        step may be tried again, or the next one taken. All ranks leave, or none (see `agreed`).
        """
        yield from self.passes(batch, at)
        self.finish(at)

    def passes(self, batch: Batch, at: At) -> Iterator[Batch]:
        """The first half of a step, for hosts with a loop of their own: all up to the gradients.

        Then call `finish(at)`, or `skip()` to drop them. Leaving early is as leaving the whole step.
        """
        self._begin(at)
        caller = [generator.get_state() for generator in self._generators]
        self._before = self._buffers()
        rounds: Any = _ONE_PASS
        complete = False
        try:
            batch = self._take_in(batch, at)
            if self.step == 0 and not self._started:
                self._start(batch, at)
            if self._schedules:
                self._schedule(at)
            parts = self._cut(self._prepare(batch, at))
            if self._passes:
                trained = [p for p in self._parameters if p.requires_grad]
                rounds = torch.no_grad()(self._passes[0].passes)(trained, at)
            for self.round, _ in enumerate(rounds):
                self._clear_gradients()
                before = self._buffers() if self.round else []
                for number, part in enumerate(self._in_order(parts), 1):
                    if self.wrapping and len(parts) > 1:
                        self.wrapping.sync(number == len(parts))
                    self._enter(part.at, part.row, part.number)
                    self._part = part
                    yield part.batch
                if before:
                    self._restore(before)  # statistics count one pass
            complete = True
        finally:
            self._part = None
            for generator, state in zip(self._generators, caller):
                generator.set_state(state)
            if not complete:
                self._left = True
                self.wrapping.abandon()
                self._clear_gradients()
                self._restore(self._before)
                if rounds is not _ONE_PASS:
                    rounds.close()

    def finish(self, at: At) -> None:
        """The second half of a step: from the gradients to the averages."""
        if self.scaler is not None:
            self._unscale()
        for clip in self._gradients:
            with torch.no_grad():
                clip.gradients(self.model, at, self.state[clip.name])
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        for constrain in self._constrains:
            with torch.no_grad():
                constrain.constrain(self.model, at, self.state[constrain.name])
        for average in self._averages:
            with torch.no_grad():
                average.average(self.model, at, self.state[average.name])
        self._clear_gradients()
        self.step += 1
        self._examples = self._examples + self._chosen

    def skip(self) -> None:
        """End a step without updating: gradients and moved statistics are dropped, time goes on.

        All ranks skip, or none (see `agreed`).
        """
        self._clear_gradients()
        self._restore(self._before)
        self.step += 1

    def agreed(self, flag: Tensor) -> Tensor:
        """The largest value that a number has on any rank; one collective, and nothing when alone.

        For decisions that all must make alike, tensor-parallel ranks too: skip where any has found an infinity.
        """
        if self.plan.everyone is None:
            return flag
        flag = flag.to(torch.int32) if flag.dtype == torch.bool else flag.clone()
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.plan.everyone)
        return flag

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """This part's share of the batch's mean loss, () with gradient; the shares of all parts sum to it.

        With several ranks the mean of their sums is the batch's, since DDP and FSDP average gradients.
        """
        part = self._part
        if part is None:
            raise ValueError(
                "update.loss weighs a part of a step: call it in `for part in update(batch, at)`"
            )
        if self._mean is not None and part.weights is None and isinstance(targets, Tensor):
            values = self._mean(outputs, targets)
        else:
            values = self._values(outputs, targets)
        if values.dtype in HALF:
            values = values.float()
        if values.ndim == 0:  # the mean over what counts in this part
            total = _times(values, part.share) if part.weights is None else values * part.weights.sum()
        elif part.inner is not None and values.shape != (len(part.batch), *part.inner):
            raise ValueError(
                f"the loss gives values of shape {tuple(values.shape)} for targets of which those that count "
                f"are told in shape {(len(part.batch), *part.inner)}; give Updater(valid=...), a bool for "
                "each value, or None where every example counts"
            )
        elif part.weights is None:
            total = _times(values.mean(), part.share)
        else:
            total = values.flatten().dot(part.weights.flatten().to(values.dtype))
        if self.scaler is not None:
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
        modes = [(module, module.training) for module in self.wrapped.modules()]
        norms = self._merged_norms()
        self.wrapping.reshard()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = self._buffers()
        kept: dict[str, Tensor] = {}
        with torch.no_grad():
            try:
                self.wrapped.eval()
                for method in self._averages:
                    averages = method.averaged(self.model, self.optimizer, at, self.state[method.name])
                    for name, value in averages.items():
                        mine = shards.local(parameters[name])
                        kept[name] = mine.clone()
                        mine.copy_(shards.local(value))
                if kept and norms:
                    run = functools.partial(self.run_model, self.wrapped)
                    batch_norms.estimate(norms, run, self._slices_of(calibration), self.plan.group)
                yield self._predict()
            finally:
                self.wrapping.reshard()
                for name, value in kept.items():
                    shards.local(parameters[name]).copy_(value)
                self._restore(buffers)
                for module, mode in modes:
                    module.training = mode

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, averages and masks, step: all a resumed run needs, for weights_only=True.

        All ranks ask for it; what is sharded stays so.
        """
        self._merged_norms()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "step": self.step,
            "examples": self.examples,
            "started": self._started,
            "recipe": self.recipe.hash,
            "slices": self.plan.slices,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; then `plan.resume(update.step)`.

        Nothing of `state` is shared with the run. Raises ValueError for the state of another recipe, of
        another number of slices, and of other parameters.
        """
        self.check_state(state)
        groups = (self.optimizer.param_groups, state["optimizer"]["param_groups"])
        here, there = ([group.get("names") for group in side] for side in groups)
        if here != there:
            raise ValueError(
                "this state is of an optimizer with other parameters, or with others in a group: "
                "load it into a model of the same sizes and names"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name, kept in state["state"].items():
            self.state[name] = {key: value.to(self.device, copy=True) for key, value in kept.items()}
        self.step, self._examples = state["step"], state["examples"]
        self._started, self._left = state["started"], False
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for the state of another recipe, or of another number of slices."""
        for name, mine in (("recipe", self.recipe.hash), ("slices", self.plan.slices)):
            if state[name] != mine:
                raise ValueError(
                    f"this state is of a run with {name} {state[name]}, and this run has {name} {mine}; "
                    "resume with what the run began with"
                )

    # -- making

    def _check_plan(self) -> None:
        mine, its = (
            [short_form(m) for m in recipe.of(ScheduleMethod) if "batch_size" in m.paces]
            for recipe in (self.recipe, self.plan.recipe)
        )
        if mine != its:
            raise ValueError(
                f"the plan paces batch sizes by {its[0] if its else 'nothing'}, and the recipe by "
                f"{mine[0] if mine else 'nothing'}; make the plan of the recipe: Plan(recipe, ...)"
            )

    def _check_ranks(self) -> None:
        for module in self.wrapping.replicated:
            if (found := module.process_group.size()) != self.plan.ranks:
                raise ValueError(
                    f"{found} ranks share the work of this DDP model, and the plan deals batches to "
                    f"{self.plan.ranks} rank{'s' * (self.plan.ranks != 1)}; make the plan after "
                    "init_process_group, or with mesh= the mesh of the model"
                )

    def _check_unused(self) -> None:
        model = self.wrapped
        if isinstance(model, nn.parallel.DistributedDataParallel) and not model.find_unused_parameters:
            for method in self.recipe.methods:
                if method.leaves_unused:
                    raise ValueError(
                        f"{type(method).__name__} leaves parameters without gradients in some steps, and DDP "
                        "waits for all of them; wrap with find_unused_parameters=True, or take it out: "
                        f"recipe - {type(method).__name__}"
                    )

    def _check_surgery(self) -> set[str]:
        wanted = tuple(short_form(method) for method in self.recipe.of(ModelMethod))
        surgery = getattr(self.model, "stretto_surgery", None)
        found = surgery.methods if surgery else ()
        if found != wanted:
            raise ValueError(
                f"the recipe changes the model by {', '.join(wanted) or 'nothing'}, and this model was "
                f"changed by {', '.join(found) or 'nothing'}; call recipe.model(model) before wrapping it"
            )
        for method in self.recipe.of(StartMethod) if self.pretrained else ():
            if Phase.INITIALISE in method.phases:
                raise ValueError(
                    f"{type(method).__name__} sets initial values, which would destroy pretrained weights; "
                    f"take it out: recipe - {type(method).__name__}"
                )
        return set(surgery.inserted) if surgery else set()

    def _build(self, optimizer: Optimizer | None) -> Optimizer:
        methods = self.recipe.of(OptimizerMethod)
        if optimizer is None:
            if not methods:
                raise ValueError("the recipe has no optimizer; add one, such as AdamW(), or give optimizer=")
            optimizer = methods[0].optimizer(self.model, self.recipe.groups(self.model))
        elif methods:
            name = type(methods[0]).__name__
            raise ValueError(
                f"{name} of the recipe and optimizer= both want to step; leave one out, as in recipe - {name}"
            )
        elif not all("factors" in group for group in optimizer.param_groups):
            self._check_factors(optimizer)
        for wrapper in self.recipe.of(WrapMethod):
            optimizer = wrapper.wrap(optimizer)
        self._set_bases(optimizer)
        return optimizer

    def _check_factors(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that knows nothing of the factors that the recipe gives to parameters."""
        if any(group["factors"] for group in self.recipe.groups(self.model)):
            names = " and ".join(type(method).__name__ for method in self.recipe.of(FactorsMethod))
            raise ValueError(
                f"the recipe gives parameters rates of their own ({names}), and this "
                f"{type(optimizer).__name__} was made without them; make it of recipe.groups(model) in place "
                "of model.parameters()"
            )

    def _set_bases(self, optimizer: Optimizer) -> None:
        """Note in each group what schedules multiply; what has factors only is multiplied once."""
        start = self.plan.at(0)
        for method in self._schedules:
            if (given := set(method.schedule(start))) != set(method.paces):
                raise TypeError(
                    f"{type(method).__name__} paces {', '.join(method.paces)} by its class, and gives "
                    f"{', '.join(sorted(given))}"
                )
        paced = {name for method in self._schedules for name in method.paces} - {"batch_size"}
        for group in optimizer.param_groups:
            if "base" in group:  # it served another Updater; its lr may stand at the end of a schedule
                continue
            factors = group.get("factors", {})
            for name in sorted(paced | set(factors)):
                if name not in group:
                    raise ValueError(
                        f"the recipe scales {name!r}, and {type(optimizer).__name__} has no such "
                        f"hyperparameter; {nearest(name, set(group) - {'params', 'names', 'factors'})}"
                    )
            scaled = {name: float(group[name]) * factors.get(name, 1.0) for name in paced | set(factors)}
            for name, value in scaled.items():
                _set(group, name, value)
            group["base"] = {name: scaled[name] for name in sorted(paced)}

    # -- the steps of a step

    def _begin(self, at: At) -> None:
        if self._part is not None:
            raise ValueError("the step before is still open: go through its parts, or close it")
        if at.step != self.step:
            if not (self._left and at.step == self.step + 1):
                raise ValueError(
                    f"the update is at step {self.step} and the plan at {at.step}; call "
                    "plan.resume(update.step) after loading a state or leaving the loop, and finish(at) or "
                    "skip() after passes(batch, at)"
                )
            self.step = at.step
        self._left = False

    def _take_in(self, batch: Batch, at: At) -> Batch:
        """Check that the batch is the plan's, put it on the device, fill rows and index."""
        share = at.batch // self.plan.ranks
        if len(batch) != share:
            raise ValueError(
                f"step {at.step} takes {share} examples{' of each rank' * (self.plan.ranks > 1)} and was given "
                f"{len(batch)}; let the loader draw from plan.batches()"
            )
        rows, index = batch.rows, batch.index
        if rows is None:
            if share not in self._rows:
                self._rows[share] = torch.arange(share, device=self.device) + self.plan.rank * share
            rows = self._rows[share]
        if index is None:
            index = self.plan.indices(at)
        batch = Batch(batch.inputs, batch.targets, rows, index)
        return batch if self.device.type == "cpu" else batch.to(self.device)

    @torch.no_grad()
    def _start(self, batch: Batch, at: At) -> None:
        """Write the recipe's first values, found on the first slice's inputs; on all ranks those of rank 0."""
        self.wrapping.reshard()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        sample = batch.take(slice(0, at.batch // at.slices)).inputs
        if self.plan.everyone is not None and self.recipe.of(StartMethod):
            sample = map_data(lambda t: t.to(self.device), _of_rank_0(sample, self.plan.everyone))
        for method in self.recipe.of(StartMethod):
            written = 0
            with stream(stable_hash(self.plan.seed, "start", method.name), self.device):
                for name, value in method.start(self.model, _Whole(parameters), sample):
                    if name not in parameters or value.shape != parameters[name].shape:
                        found = tuple(parameters[name].shape) if name in parameters else "none"
                        raise ValueError(
                            f"{type(method).__name__} gives {name} of shape {tuple(value.shape)}; "
                            f"{type(self.model).__name__} has {found}"
                        )
                    if not self.pretrained or name in self._inserted:
                        if self.plan.everyone is not None:
                            value = value.to(self.device).contiguous()
                            dist.broadcast(value, group_src=0, group=self.plan.everyone)
                        shards.write(parameters[name], value)
                        written += 1
            if not written:
                what = "layers that were inserted" if self.pretrained else "parameters"
                raise ValueError(
                    f"{type(method).__name__} found no {what} to fill in this {type(self.model).__name__}; "
                    f"take it out: recipe - {type(method).__name__}"
                )
        self._started = True

    def _schedule(self, at: At) -> None:
        schedule = self.recipe.schedule(at)
        for group in self.optimizer.param_groups:
            for name, base in group["base"].items():
                _set(group, name, base * schedule[name])

    def _prepare(self, batch: Batch, at: At) -> list[tuple[Batch, At]]:
        """Select and transform each of this rank's slices on its own."""
        slices = [(batch, at)]
        if (mine := at.slices // self.plan.ranks) > 1:
            width = at.batch // at.slices
            slices = [
                (batch.take(slice(n * width, (n + 1) * width)), dataclasses.replace(at, slice=at.slice + n))
                for n in range(mine)
            ]
        self._chosen = at.batch
        if self._selects or self._batches:
            with torch.no_grad():
                slices = [(self._select(piece, here), here) for piece, here in slices]
                if self._selects:
                    self._chosen = sum(len(piece) for piece, _ in slices)
                slices = [(self._transform(piece, here), here) for piece, here in slices]
        return slices

    def _select(self, batch: Batch, at: At) -> Batch:
        for select in self._selects:
            batch = select.select(batch, at, functools.partial(self._losses, at=at))
        return batch

    def _transform(self, batch: Batch, at: At) -> Batch:
        for method in self._batches:
            batch = method.batch(batch, at)
        return batch

    def _cut(self, slices: list[tuple[Batch, At]]) -> list[Part]:
        """Cut slices into parts, and give what counts in all of them the same weight."""
        [(batch, at), *more] = slices
        size = self.microbatch or max(len(batch) for batch, _ in slices)
        count_parts = self._count_parts([len(batch) for batch, _ in slices])
        alone = self.plan.group is None and not more and size >= len(batch)
        if alone and self._mean is not None and isinstance(batch.targets, Tensor):
            return [
                Part(batch, at, at.slice * (at.batch // at.slices), 0, 1.0, None, None)
            ]  # torch's mean will do
        counts = [how_much_counts(batch.targets, self.valid) for batch, _ in slices]
        weights, examples = self._normal(counts, sum(len(batch) for batch, _ in slices))
        parts: list[Part] = []
        for (batch, at), count, weight in zip(slices, counts, weights):
            inner = None if count is None else count.shape[1:]
            row = at.slice * max(len(batch), at.batch // at.slices)
            bounds = _bounds(len(batch), size, count_parts)
            for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
                whole = end - begin == len(batch)
                cut = batch if whole else batch.take(slice(begin, end))
                mine = weight if whole or weight is None else weight[begin:end]
                parts.append(Part(cut, at, row + begin, number, len(cut) / examples, mine, inner))
        return parts

    def _count_parts(self, lengths: list[int]) -> int:
        """Into how many parts each slice is cut: as many as the longest needs, on whatever rank it lies.

        Each pass is a collective under `fully_shard`, so a rank that selected fewer examples takes as many.
        """
        most, fewest = max(lengths), min(lengths)
        if self._selects and self.plan.group is not None:
            ends = torch.tensor([-most, fewest]).to(self.device)
            dist.all_reduce(ends, dist.ReduceOp.MIN, group=self.plan.group)
            least, fewest = ends.tolist()
            most = -least
        count = max(1, -(-most // (self.microbatch or most or 1)))
        if fewest < count:
            raise ValueError(
                f"{type(self._selects[0]).__name__} kept {fewest} examples of one slice and {most} of another, and "
                f"each takes as many passes, {count} with microbatch={self.microbatch}, of an example or more: "
                "select more evenly, or give a larger microbatch"
            )
        return count

    def _normal(
        self, weights: list[Tensor | None], examples: int | Tensor
    ) -> tuple[list[Tensor | None], int | Tensor]:
        """The weights of a step's slices, such that all of them sum to 1; NaN where nothing counts, as in torch.

        None where all count alike, as far as that is known without waiting for the device. Then the examples, of
        which a part is a share. With several ranks the sums are 1 as the mean of ranks.
        """
        known = [weight for weight in weights if weight is not None]
        on_cpu = self.device.type == "cpu"
        if self.plan.group is not None:
            count, examples = self._counts_of_all_ranks(known, examples)
        elif not known or (on_cpu and all(w.dtype == torch.bool and bool(w.all()) for w in known)):
            return [None] * len(weights), examples
        else:
            count = functools.reduce(torch.add, [weight.sum(dtype=self._precision) for weight in known])
        return [None if w is None else (w / count).to(self._precision) for w in weights], examples

    def _counts_of_all_ranks(self, known: list[Tensor], examples: int | Tensor) -> tuple[Tensor, Tensor]:
        """The mean over ranks of what counts, and of examples. Each takes part, whatever its own targets are."""
        numbers = torch.tensor([0, examples, self._chosen], dtype=torch.float64).to(self.device)
        for weight in known:
            numbers[0] += weight.sum(dtype=torch.float64)
        dist.all_reduce(numbers, group=self.plan.group)
        if self._selects:
            self._chosen = numbers[2]
        count, mean = (numbers[:2] / self.plan.ranks).to(self._precision)
        return count, mean

    def _in_order(self, parts: list[Part]) -> Iterable[Part]:
        """The parts; where there is batch norm, its statistics do not pass from one slice into another."""
        if self.plan.slices == self.plan.ranks or not (norms := batch_norms.moving(self.wrapped)):
            return parts
        slices = itertools.groupby(parts, lambda part: part.at.slice)
        return batch_norms.from_one_beginning([list(of_one) for _, of_one in slices], norms)

    def _enter(self, at: At, row: int, number: int) -> None:
        """Tell the time to the layers that ask for it, and seed those that draw by themselves.

        All are seeded, since from outside nobody sees whether a forward calls `F.dropout`.
        """
        for timed in self._timed:
            timed.advance(at, row, self.device)
        seed = mix(at.seed, at.step, at.slice, number)
        for generator in self._generators:
            generator.manual_seed(seed)

    @torch.no_grad()
    def _losses(self, batch: Batch, at: At) -> Tensor:
        """(N,) losses of a batch by the plain loss; no gradient, no moved statistics."""
        self._enter(at, at.slice * (at.batch // at.slices), -1)
        try:
            values = self._scores(self.run_model(self.wrapped, batch.inputs), batch.targets)
        finally:
            self._restore(self._before)
        weights = how_much_counts(batch.targets, self.valid)
        if values.ndim == 1:
            return values
        if weights is None:
            return values.flatten(1).mean(1)
        return (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)

    def _clear_gradients(self) -> None:
        """As `zero_grad`, at a tenth of its cost, also of parameters that the optimizer does not step."""
        for parameter in self._cleared:
            parameter.grad = None

    def _moving(self) -> list[Tensor]:
        return [buffer for buffers, name in self._places if (buffer := buffers[name]) is not None]

    def _buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._moving()]

    @torch.no_grad()
    def _restore(self, kept: list[Tensor]) -> None:
        if kept:
            torch._foreach_copy_(self._moving(), kept)

    def _unscale(self) -> None:
        """Unscale gradients; torch asks but one mesh for infinities, and here they count wherever they are found."""
        self.scaler.unscale_(self.optimizer)
        if self.plan.everyone is not None:
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(self.agreed(found))

    def _merged_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """The layers of batch norm whose statistics move, with those of all ranks."""
        norms = batch_norms.moving(self.wrapped)
        batch_norms.merge(norms, self.plan.group, self.plan.ranks)
        return norms

    def _slices_of(self, calibration: Iterable[Any]) -> Iterator[Any]:
        """The inputs of each batch on the device, in as many pieces as this rank takes slices of a batch."""
        count = self.plan.slices // self.plan.ranks

        def piece(t: Tensor, number: int) -> Tensor:
            return t.chunk(count)[number]

        for item in calibration:
            inputs = item if isinstance(item, Tensor | Mapping) else item[0]
            inputs = map_data(lambda t: t.to(self.device), inputs)
            for number in range(len(first_tensor(inputs).chunk(count))):
                yield map_data(functools.partial(piece, number=number), inputs)

    def _predict(self) -> Forward:
        forward: Forward = functools.partial(self.run_model, self.wrapped)
        for method in self.recipe.of(PredictMethod):
            forward = method.predict(forward)
        return forward


# ------------------------------------------------------------------------------------------------ small parts


def run_model(model: nn.Module, inputs: Any) -> Any:
    """model(**inputs) for mappings, else model(inputs); its `.logits` where it has them."""
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(outputs, "logits", outputs)


class _Whole(Mapping[str, Tensor]):
    """Full values by name; each is gathered when it is asked for, by all ranks."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return shards.whole(self.parameters[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __contains__(self, name: object) -> bool:  # Mapping's own would gather
        return name in self.parameters


def _of_rank_0(data: Any, group: dist.ProcessGroup) -> Any:
    """Rank 0's data, which may have another shape than this rank's."""
    held = [map_data(Tensor.cpu, data)] if dist.get_rank(group) == 0 else [None]
    dist.broadcast_object_list(held, group_src=0, group=group)
    return held[0]


def _bounds(length: int, size: int, count: int) -> list[int]:
    """Where a slice is cut: after every `size` examples, or evenly where that would be fewer than `count` parts."""
    if -(-length // size) == count:
        return [*range(0, length, size), length]
    return [number * length // count for number in range(count + 1)]


def _times(value: Tensor, share: float | Tensor) -> Tensor:
    return value if isinstance(share, float) and share == 1.0 else value * share


def _set(group: dict[str, Any], name: str, value: float) -> None:
    """Set a hyperparameter, in place where it is a tensor that compiled code reads."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled: the loss that is printed stays true."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


__all__ = ["Updater", "default_valid", "per_example", "run_model", "unwrap"]
