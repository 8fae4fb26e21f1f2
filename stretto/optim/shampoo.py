"""The Shampoo family: one optimizer for every direction, and presets under the names of the field.

Gupta et al. 2018, arXiv:1802.09568; Anil et al. 2021, arXiv:2002.09018; Shi et al. 2023, arXiv:2309.06497.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.optim import directions, exchange
from stretto.optim.buckets import Bucket, Kernels, shrink
from stretto.optim.exchange import Part, Seat, Wave
from stretto.optim.graft import GRAFTS
from stretto.optim.layout import Held, Layout
from stretto.optim.regions import DIRECTIONS, Region, arrange
from stretto.optim.roots import COEFFICIENTS
from stretto.optim.rounding import ROUNDINGS, add_steps

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Power = float | dict[int, float | tuple[float, ...]] | None

CHOICES: dict[str, tuple[Any, ...]] = {
    "direction": DIRECTIONS,
    "root": ("auto", "eigh", "qr", "newton", "denman_beavers"),
    "ridge": ("relative", "absolute", "pinv"),
    "graft": ("auto", None, *GRAFTS),
    "merge": ("dims", "matrix", "none"),
    "then": (None, "orthogonalize"),
    "coefficients": tuple(COEFFICIENTS),
    "scale": ("match_rms", "original", None),
    "decay": ("decoupled", "l2", "corrected", "independent"),
    "products": (None, "bfloat16"),
    "storage": (None, "bfloat16"),
    "rounding": ROUNDINGS,
}
LEAST = {
    "start": 1,
    "every": 1,
    "stats_every": 1,
    "block": 1,
    "split": 1,
    "iterations": 1,
    "one_sided_above": 1,
    "full_matrix_up_to": 0,
    "eps": 0,
    "ridge_eps": 0,
    "weight_decay": 0,
    "tolerance": 0,
}
# what the state depends on
FIXED = (
    "direction",
    "root",
    "graft",
    "merge",
    "block",
    "split",
    "one_sided_above",
    "full_matrix_up_to",
    "storage",
    "rounding",
)
REMEMBERED = ("defaults", "param_groups", "max_skips", "compiled", "refreshing", "transport", "placing")
NOT_OF_GROUPS = (
    "self",
    "params",
    "__class__",
    "max_skips",
    "compile",
    "process_group",
    "transport",
    "blocks",
)


class Shampoo(Optimizer):
    """Gradients multiplied, side by side, by inverse roots of their second moments.

    Every option is a plain value in the groups and read at each step. Matrices and kernels are cut into blocks, and
    equal blocks of all parameters step as one stack; `print(optimizer.layout)` shows them. Vectors step by the
    grafting rule alone, Adam unless told otherwise.

    direction: "root" multiplies by roots, "eigen" by their factors (a cheaper refresh, costlier steps), "soap" takes
    Adam's step in the eigenbasis, "kl" fits the factors to each other, "one_sided" has the shorter side alone,
    "spectral" takes the orthogonal factor of the momentum (Muon), "diagonal" the grafting rule. then="orthogonalize"
    takes the orthogonal factor of the direction.
    power: p of the inverse root; 1 / (2 sides) by itself, 1/2 for one side and for kl. A dict has it by order, a
    tuple by side.
    root: how roots are found; "auto", "eigh", "qr" (an orthogonal iteration from the last basis), "newton",
    "denman_beavers". ridge, ridge_eps: what is added to eigenvalues, relative to the largest or not, or "pinv", which
    drops those that are lost in rounding instead.
    graft: whose length the step has, for each block: "adam", "rmsprop", "adagrad", "sgd" or None; "auto" is Adam's
    for root, eigen and one_sided.
    every: steps in which each block is refreshed once, a share of them at each step; start: the first such step;
    stats_every: steps from one update of the factors to the next; tolerance: how far a basis may be from diagonal
    (share of the norm) before it is refreshed ("qr" alone).
    block: the largest side of a block; merge: neighbouring dims of kernels are merged up to it ("dims"), to
    (first, rest) ("matrix"), or not; split: parts of the first dim that are kept apart (3 x heads for a fused QKV);
    one_sided_above: matrices so many times longer than wide keep the shorter side alone, as do 2-D parameters named
    like embeddings or heads; full_matrix_up_to: vectors up to this length have a factor too.
    momentum, nesterov: momentum after preconditioning, beside beta1 before it; beta3 mixes the gradient into the
    latter. clip: the largest root mean square of a block's step. decay: "decoupled", "l2", "corrected" (lr² / peak lr)
    or "independent" of lr.
    products, storage: "bfloat16" for the dtype of products (on a CPU, where it has units for them), and of stored
    factors and roots. rounding: of weights in lower precision: "nearest", "stochastic" or "compensated".
    max_skips: a step with a gradient that is not finite changes nothing and counts in `skipped`; so many in a row
    raise ValueError, at most `every` steps late where looking means waiting for a device. The same number of failed
    refreshes in a row raises too.
    Parameters that are DTensors (fully_shard, tensor parallelism) are stepped as one process would: gradients go to
    the owners of blocks and steps come back. Plain ones that are equal on the ranks of process_group, as under DDP,
    share the work likewise; a group smaller than the world keeps the exchange within it. transport: "bfloat16" for
    what travels; blocks: "local" cuts each shard into blocks of its own instead, which needs no exchange and gives
    another result, that depends on the number of ranks.
    compile: torch.compile for what a step does with stacks. For a CUDA graph of `step` lr must be a tensor; see
    `refresh`.
    Raises ValueError for values out of range, naming them, and for sparse and complex gradients.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        direction: str = "root",
        power: Power = None,
        root: str = "auto",
        ridge: str = "relative",
        ridge_eps: float = 1e-6,
        trace_scaling: bool = False,
        graft: str | None = "auto",
        graft_beta2: float | None = None,
        beta3: float | None = None,
        bias_correction: bool = True,
        start: int = 1,
        every: int = 10,
        stats_every: int = 1,
        tolerance: float = 0.0,
        block: int = 1024,
        merge: str = "dims",
        split: int = 1,
        one_sided_above: float = 6.0,
        full_matrix_up_to: int = 0,
        then: str | None = None,
        iterations: int = 5,
        coefficients: str = "jordan",
        neuron_beta2: float = 0.0,
        scale: str | None = "match_rms",
        momentum: float = 0.0,
        nesterov: bool = False,
        clip: float | None = None,
        decay: str = "decoupled",
        products: str | None = None,
        storage: str | None = None,
        rounding: str = "nearest",
        max_skips: int = 3,
        compile: bool = False,
        process_group: Any = None,
        transport: str | None = None,
        blocks: str = "global",
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in NOT_OF_GROUPS}
        if max_skips < 1:
            raise ValueError(f"max_skips is {max_skips}; it must be 1 or more")
        for name, value, allowed in (
            ("transport", transport, (None, "bfloat16")),
            ("blocks", blocks, ("global", "local")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        self.transport, self.placing = transport, blocks
        self._begin(max_skips, compile, process_group)
        super().__init__(params, defaults)

    def _begin(self, max_skips: int, compile: bool, process_group: Any = None) -> None:
        self.max_skips, self.compiled, self.refreshing = max_skips, compile, True
        self.buckets: list[Bucket] = []
        self._process_group = process_group
        self._placed_on: Layout | None = None  # where all parameters lie, from the first step on
        self._seats: list[Seat] = []  # of each parameter
        self._waves: list[Wave] = []
        self._regions: list[Region] = []
        self._placed: set[Tensor] = set()
        self._skipped: Any = 0  # numbers on the CPU, tensors elsewhere
        self._row: Any = 0
        self._longest: Any = 0
        self._bad: Any = []
        self._seen: list[Tensor] = []
        self._kernels = Kernels(directions.accumulate, directions.advance)
        if compile:
            self._kernels = Kernels(
                torch.compile(directions.accumulate, dynamic=False),
                torch.compile(directions.advance, dynamic=False),
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group, with the defaults for what it does not say.

        Raises ValueError where ranks share the work and it has begun: who owns what is settled then.
        """
        if self._placed_on is not None and self._together:
            raise ValueError(
                "a parameter group was added after the ranks settled who owns which blocks; give the optimizer all "
                "parameters before its first step (frozen ones too), or make a new optimizer and load the state"
            )
        self._placed_on = None
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("calls", 0)
        group.setdefault("peak_lr", 0.0)
        group["fixed"] = {name: group[name] for name in FIXED}
        try:
            _check(group)
            self._regions += self._arranged(len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._stagger()

    def share(self, process_group: Any) -> None:
        """Share the work among these ranks, whose plain parameters and gradients are equal, as DDP makes them.

        Raises ValueError after the first step.
        """
        if self.buckets:
            raise ValueError("share() was called after the first step; who owns which blocks is settled then")
        self._process_group, self._placed_on = process_group, None

    # -- a step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient on any rank; where it has none, that counts as zeros."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._lay_out()
        params = self._parameters()
        gradients = {p: exchange.gradient(p) for p in params}
        stepping = [p for p in params if gradients[p] is not None]
        if not stepping and not self._together:
            return loss
        self._place(stepping, gradients)
        present: list[bool] | Tensor = []
        if self._together:
            flags = self._agreed(params, gradients)
            present = flags[0].bool().tolist() if flags.device.type == "cpu" else flags[0]
            keep = self._judge(flags[1] == 0, params)
            if isinstance(present, list) and not any(present):
                return loss
        else:
            keep = self._judge(_finite(stepping, gradients), stepping)
        if keep is False:
            return loss
        for group in self.param_groups:
            group["calls"] += 1
            peak, lr = group["peak_lr"], group["lr"]
            group["peak_lr"] = (
                torch.maximum(lr, torch.as_tensor(peak)) if isinstance(lr, Tensor) else max(lr, peak)
            )
        capturing = params[0].is_cuda and torch.cuda.is_current_stream_capturing()
        refreshing = self.refreshing and not capturing
        kept = None if keep is True else keep
        if self._together:
            self._step_together(gradients, present, kept, refreshing)
        else:
            for bucket in self.buckets:
                bucket.step(bucket.group["calls"], kept, refreshing, self._kernels)
        if not capturing:
            self._look()
        return loss

    def _step_together(
        self,
        gradients: dict[Tensor, Tensor | None],
        present: list[bool] | Tensor,
        keep: Tensor | None,
        refreshing: bool,
    ) -> None:
        """The buckets in waves: while one is computed the gradients of the next travel, and the steps of the last."""
        index = {p: i for i, p in enumerate(self._parameters())}
        self._add_decay(gradients, index, present)
        written = 0
        for number, wave in enumerate(self._waves):
            if number == 0:
                wave.send(gradients)
            if number + 1 < len(self._waves):
                self._waves[number + 1].send(gradients)
            steps = []
            for bucket, stack in zip(wave.buckets, wave.receive()):
                where = [index[p] for p in bucket.params]
                theirs = present[where] if isinstance(present, Tensor) else [present[i] for i in where]
                calls = bucket.group["calls"]
                steps.append(bucket.advance(stack, theirs, calls, keep, refreshing, self._kernels))
            wave.give(steps)
            while written < number:
                self._write(self._waves[written], index, present, keep)
                written += 1
        for wave in self._waves[written:]:
            self._write(wave, index, present, keep)

    def _add_decay(
        self,
        gradients: dict[Tensor, Tensor | None],
        index: dict[Tensor, int],
        present: list[bool] | Tensor,
    ) -> None:
        """The decay of groups that have it in their gradients, where a parameter has one on any rank."""
        for group in self.param_groups:
            if group["decay"] != "l2" or not group["weight_decay"]:
                continue
            for p in group["params"]:
                taking, shard, found = present[index[p]], exchange.local(p), gradients[p]
                if p not in self._placed or taking is False:
                    continue
                exact = torch.promote_types(p.dtype, torch.float32)
                found = torch.zeros_like(shard, dtype=exact) if found is None else found.to(exact)
                gradients[p] = found.add(shard.to(exact) * taking, alpha=group["weight_decay"])

    def _write(
        self, wave: Wave, index: dict[Tensor, int], present: list[bool] | Tensor, keep: Tensor | None
    ) -> None:
        """Add a wave's steps to this rank's shards."""
        arrived: dict[int, list[tuple[Part, Tensor]]] = defaultdict(list)
        for part, step in wave.take():
            arrived[part.bucket].append((part, step))
        for number, pieces in arrived.items():
            bucket = wave.buckets[number]
            where = [index[bucket.params[part.member]] for part, _ in pieces]
            if isinstance(present, list):
                pieces = [piece for piece, i in zip(pieces, where) if present[i]]
            parts, steps = [part for part, _ in pieces], [step.to(bucket.dtype) for _, step in pieces]
            members = {p: exchange.local(p) for p in bucket.params}
            # parts of what is not contiguous would be copies: then of a copy, which is written back
            dense = {p: shard.contiguous() for p, shard in members.items() if not shard.is_contiguous()}
            weights = wave.shards.views(parts, {**members, **dense})
            rests: list[Any] = [None] * len(parts)
            if any(rest is not None for rest in bucket.rests):
                rests = wave.shards.views(parts, dict(zip(bucket.params, bucket.rests)))
            kept: Any = shrink(bucket.group, keep)
            if isinstance(present, Tensor) and (isinstance(kept, Tensor) or kept != 1):
                kept = list((1 + (kept - 1) * present[where]).unbind())
            add_steps(weights, steps, kept, bucket.group["rounding"], rests)
            for p, copied in dense.items():
                members[p].copy_(copied)

    @torch.no_grad()
    def refresh(self, *, due: bool = False) -> None:
        """Refresh all blocks now; with due, those whose turn it is, which `step` does by itself.

        A CUDA graph of `step` has no refresh and counts no steps: call `refresh(due=True)` between replays.
        """
        for group in self.param_groups:
            group["calls"] += due
        for bucket in self.buckets:
            if bucket.rule.sides:
                bucket.refresh(bucket.due(bucket.group["calls"]) if due else list(range(bucket.size)))

    @property
    def skipped(self) -> int:
        """Steps that were skipped because a gradient was not finite; reading it waits for the device."""
        return int(self._skipped)

    # -- what lies where

    @property
    def layout(self) -> Layout:
        """Every parameter's blocks, direction, bytes of state, cost of a refresh and owners: print it."""
        layout = self._lay_out()
        params = self._parameters()
        for region in self._regions:
            p = params[region.index]
            stand_in = torch.empty(p.shape, dtype=p.dtype, device="meta")
            bucket = Bucket([region], [stand_in], self._group(region))
            layout.kept[region.index, region.part] = _bytes(bucket)
        return layout

    @property
    def _together(self) -> bool:
        """Whether this rank steps with others, or by itself what is placed on a mesh of one rank."""
        return any(len(seat.grid.ranks) > 1 or seat.meshed for seat in self._seats)

    def _lay_out(self) -> Layout:
        """Settle, once, who owns which blocks. Raises ValueError on every rank where the ranks' models differ."""
        if self._placed_on is not None:
            return self._placed_on
        params = self._parameters()
        seats: dict[Any, Seat] = {}
        located = [exchange.locate(p, self._process_group, seats) for p in params]
        self._seats = [seat for _, seat in located]
        if self._together:
            names = {region.index: region.name for region in self._regions}
            facts = [
                f"{names[i]} of shape {tuple(p.shape)}, {p.dtype}, cut along {[dim for dim, _ in where.cuts]}"
                + ("" if p.requires_grad else ", frozen")
                for i, (p, (where, _)) in enumerate(zip(params, located))
            ]
            exchange.check_equal(facts, "parameters", self._seats)
            exchange.check_equal(self._options(), "options", self._seats)
        for region in self._regions:
            if (
                self._group(region)["rounding"] == "stochastic"
                and self._seats[region.index].grid.replicas > 1
            ):
                raise ValueError(
                    f"rounding is 'stochastic' and {region.name} is the same on several ranks, which would round it "
                    "each in its own way; use 'compensated'"
                )
        shapes, placements = {}, {}
        if self.placing == "global":
            shapes = {i: tuple(p.shape) for i, p in enumerate(params)}
            placements = {i: placement for i, (placement, _) in enumerate(located)}
        every = [group["every"] for group in self.param_groups]
        layout = Layout(
            self._regions, shapes, placements, every=every, turns=self._phases, widths=self._widths()
        )
        for region in self._regions:
            if region.dims:
                layout.box(region, 0)  # raises for a misfit, which a rank with an empty shard would not find
        self._placed_on = layout
        return layout

    def _options(self) -> list[str]:
        """What ranks that step together must agree about, but for lr, which may be a tensor."""
        options = [f"transport={self.transport!r}", f"blocks={self.placing!r}"]
        for number, group in enumerate(self.param_groups):
            options += [f"{name}={group[name]!r} in group {number}" for name in self.defaults if name != "lr"]
        return options

    def _widths(self) -> tuple[int, int]:
        """Bytes of an entry of a gradient and of a step on their way."""
        if self.transport:
            return 2, 2
        widest = max((p.element_size() for p in self._parameters()), default=4)
        return widest, max(widest, 4)

    def held(self, p: Tensor, key: str, shape: tuple[int, ...]) -> Held | None:
        """Which part of what is kept of a parameter under a key this rank has; None: all ranks have all of it.

        shape: of the part or of the whole, of which the dims after the first are used. For checkpoints.
        Raises ValueError for blocks="local", whose factors fit no other number of ranks.
        """
        layout = self._lay_out()
        name, _, part = key.partition(".")
        if name in ("step", "updates") or not self._together:
            return None
        if self.placing == "local":
            raise ValueError(
                'blocks="local" keeps factors of shards, which fit no other number of ranks; choose '
                'blocks="global" for checkpoints, or save state_dict() on each rank'
            )
        index = next(i for i, other in enumerate(self._parameters()) if other is p)
        return layout.held(index, int(part or 0), name == "rest", shape[1:], self._seats[index].number)

    def state_bytes(self) -> int:
        """Of all that is kept now."""
        return sum(map(_bytes, self.buckets))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _group(self, region: Region) -> dict[str, Any]:
        return self.param_groups[region.group]

    def _arranged(self, number: int) -> list[Region]:
        group, first = self.param_groups[number], sum(len(g["params"]) for g in self.param_groups[:number])
        indices = range(first, first + len(group["params"]))
        names = group.get("param_names") or group.get("names") or [f"parameter {index}" for index in indices]
        return [
            region
            for index, name, p in zip(indices, names, group["params"])
            for region in arrange(
                index,
                name,
                tuple(exchange.local(p).shape if self.placing == "local" else p.shape),
                number,
                group,
                by_name="param_names" in group,
            )
        ]

    def _stagger(self) -> None:
        """Give every block its turn, so that all steps of a cycle cost about the same."""
        layout = Layout(self._regions)
        self._every = [group["every"] for group in self.param_groups]
        self._phases: dict[tuple[int, int], list[int]] = {}
        for every in set(self._every):
            groups = {number for number, theirs in enumerate(self._every) if theirs == every}
            self._phases |= layout.phases(every, groups)
        for bucket in self.buckets:
            bucket.phases = self._turns(bucket.regions)

    def _turns(self, regions: list[Region]) -> list[int]:
        """When the blocks that are kept here are refreshed."""
        found = [(region, self._phases.get((region.index, region.part), [])) for region in regions]
        return [turns[block] for region, turns in found if turns for block in self._here(region)]

    def _here(self, region: Region) -> Sequence[int]:
        """The blocks of a region that are kept here; of order 0, as many as there are entries."""
        layout, number = self._lay_out(), self._seat(region).number
        return layout.owned(region, number) if region.dims else range(layout.entries(region, number)[1])

    def _seat(self, region: Region) -> Seat:
        return self._seats[region.index] if self.placing == "global" else Seat()

    def _place(self, stepping: list[Tensor], gradients: dict[Tensor, Tensor | None]) -> None:
        """Check what may change between steps, and make buckets for parameters with their first gradient.

        Ranks that step together make them for all parameters that are not frozen.
        """
        for group in self.param_groups:
            changed = [name for name in FIXED if group[name] != group["fixed"][name]]
            if changed:
                raise ValueError(
                    f"{changed[0]} was changed from {group['fixed'][changed[0]]!r} to {group[changed[0]]!r}; it is "
                    "fixed once a group is added, since the state depends on it; make a new optimizer"
                )
        if [group["every"] for group in self.param_groups] != self._every:
            self._stagger()
        for p in stepping:
            grad = gradients[p]
            assert grad is not None
            if grad.layout != torch.strided or grad.is_complex():
                kind = "complex" if grad.is_complex() else "sparse"
                raise ValueError(
                    f"the gradient of {self._name(p)} is {kind}; Shampoo steps by dense real gradients: give this "
                    "parameter to another optimizer, or ask its layer for dense gradients"
                )
        wanted = [p for p in self._parameters() if p.requires_grad] if self._together else stepping
        if new := {p for p in wanted if p not in self._placed}:
            for bucket in self._made(new):
                self._adopt(bucket)
        for bucket in self.buckets:
            if bucket.complete():
                self._link(bucket)
        if self._together and not self._waves:
            seats = [self._seat(bucket.regions[0]) for bucket in self.buckets]
            transport = getattr(torch, self.transport) if self.transport else None
            self._waves = exchange.waves(self.buckets, seats, self._lay_out(), transport)

    def _made(self, params: set[Tensor]) -> list[Bucket]:
        """Buckets for these parameters, with the blocks that are kept here."""
        every, layout = self._parameters(), self._lay_out()
        found: dict[Any, list[Region]] = defaultdict(list)
        for region in self._regions:
            p = every[region.index]
            if p in params:
                shared = not region.dims and layout.shared(region)
                key = (region.group, region.dims, region.sides, region.direction, p.dtype, p.device)
                found[*key, self._seat(region), shared].append(region)
        return [
            Bucket(
                regions,
                [every[r.index] for r in regions],
                self._group(regions[0]),
                self._turns(regions),
                self.compiled,
                [len(self._here(region)) for region in regions],
                None if regions[0].dims else exchange.total(seat, shared),
            )
            for (*_, seat, shared), regions in found.items()
        ]

    def _adopt(self, bucket: Bucket) -> None:
        self.buckets.append(bucket)
        self._waves = []
        for i, p in enumerate(bucket.params):
            self._placed.add(p)
            if bucket.group["rounding"] == "compensated" and p.dtype != bucket.dtype:
                if "rest" not in self.state[p]:
                    # whatever the weight's strides: a copy of a part would not be kept
                    rest = torch.zeros_like(exchange.local(p), memory_format=torch.contiguous_format)
                    self.state[p]["rest"] = rest
                bucket.rests[i] = self.state[p]["rest"]
        self._link(bucket)

    def _link(self, bucket: Bucket) -> None:
        """Show a bucket's stacks as the state of its parameters, without a copy."""
        for p, views in zip(bucket.params, bucket.views()):
            self.state[p].update(views)

    def _name(self, p: Tensor) -> str:
        index = next(i for i, other in enumerate(self._parameters()) if other is p)
        return next(region.name for region in self._regions if region.index == index)

    # -- steps that cannot be taken

    def _agreed(self, params: list[Tensor], gradients: dict[Tensor, Tensor | None]) -> Tensor:
        """Which parameters have a gradient, and which one that is not finite, on any rank: (2, parameters)."""
        present = [i for i, p in enumerate(params) if gradients[p] is not None]
        flags = torch.zeros(2, len(params), device=params[0].device)
        if present:
            flags[0, present] = 1.0
            flags[1, present] = (~_finite([params[i] for i in present], gradients)).float()
        return exchange.agree(flags, self._seats)

    def _judge(self, finite: Tensor, stepping: list[Tensor]) -> bool | Tensor:
        """Whether all gradients are finite: known on the CPU, elsewhere a 0-d tensor, 1 or 0. Counts the others."""
        device = finite.device
        if device.type == "cpu":
            if finite.all():
                self._row = 0
                return True
            self._skipped, self._row = self._skipped + 1, self._row + 1
            self._bad = [p for p, is_finite in zip(stepping, finite.tolist()) if not is_finite]
            if self._row >= self.max_skips:
                self._stop()
            return False
        keep = finite.all().float()
        if not isinstance(self._skipped, Tensor):
            self._skipped = torch.tensor(float(self._skipped), device=device)
            self._row = self._longest = torch.zeros((), device=device)
        self._skipped = self._skipped + (1 - keep)
        self._row = (self._row + 1) * (1 - keep)
        self._longest = torch.maximum(self._longest, self._row)
        if not isinstance(self._bad, Tensor) or len(self._bad) != len(finite):
            self._bad = torch.zeros_like(finite)
        self._bad, self._seen = torch.where(keep > 0, self._bad, ~finite), stepping
        return keep

    def _look(self) -> None:
        """Once in a cycle, look at the counters of skipped steps and failed refreshes."""
        every = max(group["every"] for group in self.param_groups)
        if max(group["calls"] for group in self.param_groups) % every:
            return
        if isinstance(self._longest, Tensor) and self._longest >= self.max_skips:
            self._bad = [p for p, is_bad in zip(self._seen, self._bad.tolist()) if is_bad]
            self._stop()
        failures: dict[Tensor, int] = defaultdict(int)
        for bucket in self.buckets:
            for p, count in zip(bucket.params, bucket.failed()):
                failures[p] = max(failures[p], count)
        counts = torch.tensor([float(failures[p]) for p in self._parameters()])
        if self._together:
            counts = exchange.agree(counts.to(self._parameters()[0].device), self._seats)
        if counts.max() >= self.max_skips:
            p = self._parameters()[int(counts.argmax())]
            group = next(group for group in self.param_groups if any(p is other for other in group["params"]))
            raise ValueError(
                f"the factors of {self._name(p)} could not be refreshed {int(counts.max())} times in a row; raise "
                f"ridge_eps ({group['ridge_eps']}) or choose root='eigh'"
            )

    def _stop(self) -> None:
        names = ", ".join(self._name(p) for p in self._bad[:3])
        raise ValueError(
            f"{self.max_skips} steps in a row had a gradient that is not finite, last in {names}; the weights are "
            "those before them: lower the learning rate or clip gradients, or raise max_skips"
        )

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch's: plain tensors under plain keys, views of the stacks."""
        for bucket in self.buckets:
            bucket.settle()
        state: dict[str, Any] = super().state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError, and changes nothing, where layouts differ."""
        saved = state_dict["param_groups"]
        ours = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in saved]
        if ours != theirs:
            raise ValueError(f"the checkpoint has groups of {theirs} parameters, this optimizer of {ours}")
        for number, (group, other) in enumerate(zip(self.param_groups, saved)):
            for name in FIXED:
                if name in other and other[name] != group[name]:
                    raise ValueError(
                        f"the checkpoint has {name}={other[name]!r} in group {number}, this optimizer "
                        f"{group[name]!r}; make the optimizer with the checkpoint's"
                    )
        params, entries = self._parameters(), state_dict["state"]
        indices = [index for group in saved for index in group["params"]]
        kept = [dict(group) for group in self.param_groups]
        for group, other in zip(self.param_groups, saved):
            group.update(
                {k: copy.deepcopy(v) for k, v in other.items() if k not in ("params", "param_names", "names")}
            )
        self._lay_out()
        try:
            self._stagger()
            stored = {p: entries[index] for p, index in zip(params, indices) if index in entries}
            buckets = self._made(set(stored))
            for bucket in buckets:
                bucket.complete()
                for region, p, views in zip(bucket.regions, bucket.params, bucket.views()):
                    for name, view in views.items():
                        value = stored[p].get(name)
                        if value is None or value.shape != view.shape:
                            found = "none" if value is None else tuple(value.shape)
                            raise ValueError(
                                f"{name} of {region.name} should have shape {tuple(view.shape)}, and the checkpoint "
                                f"has {found}; it is of another layout"
                            )
                        view.copy_(value)
        except ValueError:
            for group, before in zip(self.param_groups, kept):
                group.clear()
                group.update(before)
            self._stagger()
            raise
        self.buckets, self._placed = [], set()
        self.state.clear()
        for p, values in stored.items():
            if "rest" in values:
                self.state[p]["rest"] = values["rest"].to(p.device, copy=True)
        for bucket in buckets:
            bucket.resumed()
            self._adopt(bucket)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name in REMEMBERED}
        return state | {"saved": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved")
        super().__setstate__({**state, "state": defaultdict(dict)})
        self._begin(state["max_skips"], state["compiled"])
        self._regions = [
            region for number in range(len(self.param_groups)) for region in self._arranged(number)
        ]
        self._stagger()
        self.load_state_dict(saved)


def _finite(stepping: list[Tensor], gradients: dict[Tensor, Tensor | None]) -> Tensor:
    """(n,) bool: of each parameter, whether its gradient here has only finite entries."""
    norms = torch._foreach_norm([g for p in stepping if (g := gradients[p]) is not None])
    return torch.stack([norm.to(stepping[0].device, torch.float32) for norm in norms]).isfinite()


def _bytes(bucket: Bucket) -> int:
    p, entries = bucket.params[0], bucket.size * prod(bucket.dims)
    rest = p.element_size() * entries if bucket.group["rounding"] == "compensated" else 0
    kept = sum(kept.numel() * kept.element_size() for kept in bucket.kept.values())
    return kept + (rest if p.dtype != bucket.dtype else 0)


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError for the first value out of range."""
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} is {group[name]!r}; it must be one of {listed}")
    for name, least in LEAST.items():
        if not group[name] >= least:
            raise ValueError(f"{name} is {group[name]}; it must be {least} or more")
    beta1, beta2 = group["betas"]
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1 is {beta1}; it must lie in [0, 1)")
    for name, beta in (("beta2", beta2), ("graft_beta2", group["graft_beta2"]), ("beta3", group["beta3"])):
        if beta is not None and not 0 <= beta <= 1:
            raise ValueError(f"{name} is {beta}; it must lie in [0, 1]")
    for name in ("momentum", "neuron_beta2"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} is {group[name]}; it must lie in [0, 1)")
    if not group["lr"] >= 0:
        raise ValueError(f"lr is {group['lr']}; it must be 0 or more")
    if group["clip"] is not None and not group["clip"] > 0:
        raise ValueError(f"clip is {group['clip']}; it must be above 0, or None")
    powers = group["power"].values() if isinstance(group["power"], dict) else [group["power"]]
    for power in powers:
        if any(not p > 0 for p in (power if isinstance(power, tuple | list) else [power]) if p is not None):
            raise ValueError(f"power is {group['power']}; every p must be above 0")
    for p in group["params"]:
        if group["rounding"] == "stochastic" and p.dtype == torch.float16:
            raise ValueError(
                "rounding is 'stochastic' and a parameter float16; it is for bfloat16: use 'compensated'"
            )
    direction, graft = group["direction"], group["graft"]
    if group["beta3"] and not beta1:
        raise ValueError(
            f"beta3 is {group['beta3']} and beta1 is 0; beta3 mixes into a momentum, which needs beta1"
        )
    if direction == "soap" and graft not in ("auto", None, "sgd"):
        raise ValueError(f"graft is {graft!r}; soap is Adam's step already: it takes None or 'sgd'")
    if direction == "soap" and beta2 == 1:
        raise ValueError("beta2 is 1; soap averages second moments and needs it below 1")
    if direction == "spectral" and graft not in ("auto", None):
        raise ValueError(f"graft is {graft!r}; spectral steps have a length of their own: leave graft out")
    if direction in ("eigen", "soap") and group["root"] not in ("auto", "eigh", "qr"):
        raise ValueError(f"root is {group['root']!r}; {direction} keeps bases, which eigh and qr find")
    if group["root"] in ("newton", "denman_beavers") and group["ridge"] == "pinv":
        raise ValueError(f"ridge is 'pinv'; {group['root']} finds no pseudo-inverse: choose root='eigh'")
    if group["tolerance"] and direction not in ("eigen", "soap") and group["root"] != "qr":
        raise ValueError(f"tolerance is {group['tolerance']}; it needs a basis to look at: choose root='qr'")


# -- presets


def SOAP(
    params: Parameters, lr: float | Tensor, betas: tuple[float, float] = (0.95, 0.95), **options: Any
) -> Shampoo:
    """Adam in the eigenbasis of Shampoo's factors. Vyas et al. 2024, arXiv:2409.11321."""
    return Shampoo(params, lr, betas, **{"direction": "soap", **options})


def KLShampoo(
    params: Parameters, lr: float | Tensor, betas: tuple[float, float] = (0.95, 0.95), **options: Any
) -> Shampoo:
    """Factors fitted to each other by the Kullback-Leibler divergence. Lin et al. 2025, arXiv:2509.03378."""
    return Shampoo(params, lr, betas, **{"direction": "kl", **options})


def OneSidedShampoo(
    params: Parameters, lr: float | Tensor, betas: tuple[float, float] = (0.9, 0.99), **options: Any
) -> Shampoo:
    """The shorter side alone, with p = 1/2: half the products and less state."""
    return Shampoo(params, lr, betas, **{"direction": "one_sided", **options})


def Muon(
    params: Parameters, lr: float | Tensor, betas: tuple[float, float] = (0.95, 0.95), **options: Any
) -> Shampoo:
    """The orthogonal factor of the Nesterov momentum. Jordan et al. 2024; sizes as Liu et al. 2025, arXiv:2502.16982.

    Vectors, and embeddings and heads where parameters come with names, step by Adam with the same betas.
    """
    return Shampoo(params, lr, betas, **{"direction": "spectral", **options})


def NorMuon(
    params: Parameters, lr: float | Tensor, betas: tuple[float, float] = (0.95, 0.95), **options: Any
) -> Shampoo:
    """Muon with rows of one size over time. Li et al. 2025, arXiv:2510.05491."""
    return Shampoo(params, lr, betas, **{"direction": "spectral", "neuron_beta2": 0.95, **options})


def SOAPMuon(
    params: Parameters, lr: float | Tensor, betas: tuple[float, float] = (0.95, 0.95), **options: Any
) -> Shampoo:
    """The orthogonal factor of SOAP's direction."""
    return Shampoo(params, lr, betas, **{"direction": "soap", "then": "orthogonalize", **options})
