"""Equal blocks as stacked tensors: gathering gradients, keeping state, refreshing roots and bases, writing weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stretto.optim.directions import Kept, Rates, Rule
from stretto.optim.refresh import begin, named, power, refresh, remainder
from stretto.optim.regions import Region
from stretto.optim.rounding import add_steps
from stretto.optim.symmetric import Rate, halved

SQUARED = ("adam", "rmsprop", "adagrad")  # grafting rules that keep squares
ENTRIES = 1 << 21  # of the factors that the CPU refreshes at once
LARGE = 1 << 18  # entries of a tensor, from which on a copy into a stack is dearer than a call of its own
BASED = ("eigen", "soap")  # directions that keep bases, not roots


class Kernels(NamedTuple):
    """The two functions of `directions`, as they are or compiled."""

    accumulate: Callable[[Tensor, Kept, Rule, Rate, Rate], None]
    advance: Callable[[Tensor, Kept, Rule, Rates, Tensor | None], Tensor]


def rule_of(
    regions: list[Region],
    group: dict[str, Any],
    device: torch.device,
    lengths: list[int],
    total: Callable[[Tensor], Tensor] | None = None,
) -> Rule:
    """The operations of a bucket's step, from its group's options."""
    direction, graft = regions[0].direction, group["graft"]
    if graft == "auto":
        graft = "adam" if direction in ("root", "eigen", "one_sided", "diagonal") else None
    graft_beta2 = group["graft_beta2"]
    if direction == "spectral":
        graft = None
    if direction == "diagonal" and graft is None:
        graft = "adam"
    return Rule(
        direction=direction,
        sides=regions[0].sides,
        axes=regions[0].axes,
        graft=graft,
        summed=graft == "adagrad" or (group["betas"][1] if graft_beta2 is None else graft_beta2) == 1,
        then=group["then"] if direction not in ("spectral", "diagonal") else None,
        iterations=group["iterations"],
        coefficients=group["coefficients"],
        scale=group["scale"],
        nesterov=group["nesterov"],
        products=torch.bfloat16 if group["products"] and has_bfloat16(device) else None,
        lengths=tuple(lengths) if direction == "diagonal" else (),
        sizes=tuple(region.numel for region in regions) if direction == "diagonal" else (),
        total=total,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there: a CPU without units for them takes 3 to 500 times as long."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class Bucket:
    """Blocks of one shape, direction, group, dtype and device, as stacks (B, d1 .. dr).

    What is kept of each block is a row of a stack in `kept`. While all parameters of a bucket step together on the CPU
    their number of steps is a plain number; elsewhere, where the host cannot know which steps were skipped, and where
    some had no gradient, it is a tensor and the same arithmetic is done on tensors.
    """

    regions: list[Region]
    params: list[Tensor]
    group: dict[str, Any]
    phases: list[int] = field(default_factory=list)  # when each block is refreshed
    masked: bool = False  # numbers of a step are tensors even on the CPU, as a compiled step wants them
    counts: list[int] = field(default_factory=list)  # blocks of each region that are kept here; by itself all
    total: Callable[[Tensor], Tensor] | None = (
        None  # sums of the diagonal rule, over all ranks that have a part
    )

    def __post_init__(self) -> None:
        self.dims, self.device = self.regions[0].dims, self.params[0].device
        self.dtype = torch.promote_types(self.params[0].dtype, torch.float32)
        self.counts = self.counts or [region.count for region in self.regions]
        self.size = sum(self.counts)
        self.rests: list[Tensor | None] = [None] * len(self.params)  # of each member, what rounding left off
        self.together = True  # all members have taken the same steps
        self.steps = 0  # that they took, where the host knows
        self.updates = 0  # of the factors
        self.kept: Kept = {}
        self.indices: dict[tuple[int, ...], Tensor] = {}
        self.members = torch.empty(0)  # of each, whether it takes the present step
        self.complete()
        self.ready = [not self.rule.sides] * self.size if self.dims else []

    def complete(self) -> bool:
        """Make what the group's options ask for and is not there yet; whether there was any."""
        group, rule = self.group, rule_of(self.regions, self.group, self.device, self.counts, self.total)
        self.rule = rule
        missing = not self.kept
        if missing:
            self.kept = {
                name: torch.zeros(len(self.params), dtype=self.dtype, device=self.device)
                for name in ("step", "updates")
            }
            self.kept |= self._factors()
        shape = {"neurons": self.dims[:1]}
        wanted = {
            "momentum": group["betas"][0] > 0,
            "square": rule.graft in SQUARED,
            "second": rule.direction == "soap",
            "velocity": group["momentum"] > 0,
            "neurons": group["neuron_beta2"] > 0 and (rule.direction == "spectral" or rule.then is not None),
        }
        for name, is_wanted in wanted.items():
            if is_wanted and name not in self.kept:
                self.kept[name] = self.stack(*shape.get(name, self.dims)).zero_()
                missing = True
        return missing

    def views(self) -> list[dict[str, Tensor]]:
        """What is kept of each member, by name, as parts of the stacks."""
        starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        return [
            {
                f"{name}.{region.part}" if region.part else name: (
                    stack[i] if name in ("step", "updates") else stack[start : start + count]
                )
                for name, stack in self.kept.items()
            }
            for i, (region, start, count) in enumerate(zip(self.regions, starts, self.counts))
        ]

    def look(self) -> None:
        """Read which blocks have been refreshed; on a device this waits."""
        self.ready = (self.kept["refreshed"] > 0).tolist()

    def failed(self) -> list[int]:
        """Of each member, the refreshes in a row that failed; also reads which blocks have been refreshed."""
        if not self.rule.sides:
            return [0] * len(self.params)
        self.look()
        return [max(rows, default=0) for rows in map(Tensor.tolist, self.kept["failures"].split(self.counts))]

    def _factors(self) -> Kept:
        group, rule, kept = self.group, self.rule, {}
        stored = getattr(torch, group["storage"]) if group["storage"] else self.dtype
        for position, side in enumerate(rule.sides):
            n = self.dims[side]
            identity = torch.eye(n, dtype=stored, device=self.device).repeat(self.size, 1, 1)
            for name, part in named("factor", position, halved(identity)).items():
                kept[name] = torch.zeros_like(part)
            if rule.direction in BASED:
                kept[f"basis{position}"] = identity
                if rule.direction == "eigen":
                    kept[f"powers{position}"] = self.stack(n).fill_(1.0)
            else:
                kept |= named("root", position, [part.clone() for part in halved(identity)])
                if self.solver(position) == "qr":
                    kept[f"basis{position}"] = identity.clone()
        if rule.sides:
            kept["refreshed"] = torch.zeros(self.size, dtype=torch.int32, device=self.device)
            kept["failures"] = torch.zeros(self.size, dtype=torch.int32, device=self.device)
        return kept

    def solver(self, position: int) -> str:
        """How the roots or the basis of a side are found.

        By itself ("auto"): bases by orthogonal iteration from the last ones; roots on the CPU by eigenvalues,
        elsewhere by Newton's iteration where power and ridge allow it.
        """
        chosen: str = self.group["root"]
        if chosen != "auto":
            return chosen
        if self.rule.direction in BASED:
            return "qr"
        if self.device.type in ("cpu", "meta"):
            return "eigh"
        inverse = 1 / power(self.rule, self.group, position, len(self.dims))
        return "newton" if self.group["ridge"] != "pinv" and inverse == round(inverse) else "eigh"

    def stack(self, *dims: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised stack (B, *dims)."""
        return torch.empty(self.size, *dims, dtype=dtype or self.dtype, device=self.device)

    # -- a step

    def step(self, calls: int, keep: Tensor | None, refreshing: bool, kernels: Kernels) -> None:
        """One step of the members that have a gradient.

        calls: how often the group has been stepped, from 1. keep: 0-d, 0 where the step is to be skipped and 1 else;
        None where the host knows that it is not.
        """
        present = [p.grad is not None for p in self.params]
        if not any(present):
            if refreshing and self.rule.sides:
                self.refresh(self.due(calls), keep)
            return
        if keep is None and all(present) and self._is_adam():
            self._adam()
            return
        gradient = self._gather([p.grad for p in self.params])
        if self.group["decay"] == "l2" and self.group["weight_decay"]:
            gradient.add_(self._gather(list(self.params)), alpha=self.group["weight_decay"])
        step = self.advance(gradient, present, calls, keep, refreshing, kernels)
        self._write(step, shrink(self.group, keep), present)

    def _is_adam(self) -> bool:
        """Whether the step is AdamW's and nothing else, of tensors so large that the CPU should pass over them once."""
        group, rule = self.group, self.rule
        beta1, lr = group["betas"][0], group["lr"]
        return (
            (rule.direction, rule.graft, rule.summed) == ("diagonal", "adam", False)
            and self.device.type == "cpu" and self.size >= LARGE * len(self.params)
            and self.steps >= 0 and not self.masked
            and beta1 > 0 and group["beta3"] in (None, beta1) and group["bias_correction"]
            and not group["momentum"] and group["clip"] is None and float(lr) > 0
            and not (group["decay"] == "l2" and group["weight_decay"])
            and all(p.dtype == self.dtype for p in self.params)
        )  # fmt: skip

    def _adam(self) -> None:
        """The step by torch's kernel, which reads and writes everything once and needs no memory."""
        group, lr, taken = self.group, float(self.group["lr"]), torch.tensor(float(self.steps))
        first, second = (
            [part.view(p.shape) for part, p in zip(self.kept[name].split(self.counts), self.params)]
            for name in ("momentum", "square")
        )
        gradients = [p.grad.contiguous() for p in self.params if p.grad is not None]
        weights = [p.contiguous() for p in self.params]
        adamw(
            weights, gradients, first, second, [], [taken.clone() for _ in self.params], fused=True,
            beta1=group["betas"][0], beta2=self._graft_beta2, lr=lr, eps=group["eps"],
            weight_decay=(1 - float(shrink(group, None))) / lr, amsgrad=False, maximize=False,
        )  # fmt: skip
        self.steps += 1
        for p, weight in zip(self.params, weights):
            if weight is not p:
                p.copy_(weight)

    @property
    def _graft_beta2(self) -> float:
        own: float | None = self.group["graft_beta2"]
        return float(self.group["betas"][1]) if own is None else own

    def advance(
        self,
        gradient: Tensor,
        present: list[bool] | Tensor,
        calls: int,
        keep: Tensor | None,
        refreshing: bool,
        kernels: Kernels,
    ) -> Tensor:
        """What is to be added to the weights, (B, *dims), from their gradients (B, *dims), which are overwritten.

        present: which members have a gradient anywhere, known to the host or (members,). Zero where none is.
        """
        taking = self._taking(present, keep)
        accumulating = bool(self.rule.sides) and (calls - 1) % self.group["stats_every"] == 0
        if accumulating:
            self._count(taking)
        if not self.size:
            return gradient
        if keep is not None:
            gradient = torch.where(keep > 0, gradient, 0.0)
        rule = self.rule
        if rule.sides:
            if rule.graft is None and not all(self.ready):
                begin(self, gradient)
            if accumulating:
                self._accumulate(gradient, taking, kernels)
            if refreshing:
                self.refresh(self.due(calls), keep)
        ready = None if all(self.ready) else self.kept["refreshed"] > 0
        return kernels.advance(gradient, self.kept, rule, self._rates(taking), ready)

    def index(self, rows: list[int]) -> Tensor:
        """These rows as a tensor, copied to the device once."""
        key = tuple(rows)
        if key not in self.indices:
            self.indices[key] = torch.tensor(rows, device=self.device)
        return self.indices[key]

    def due(self, calls: int) -> list[int]:
        """The blocks whose turn it is."""
        start, every = self.group["start"], self.group["every"]
        if calls < start:
            return []
        return [block for block, phase in enumerate(self.phases) if phase == (calls - start) % every]

    def _taking(self, present: list[bool] | Tensor, keep: Tensor | None) -> Rate:
        """Which members take this step, 1.0 for all or (B,) or (1,); their steps are counted."""
        known = not isinstance(present, Tensor) and all(present)
        if keep is None and known and self.together and not self.masked:
            self.steps += 1
            return 1.0
        self.settle()
        mask = torch.ones((), dtype=self.dtype, device=self.device) if keep is None else keep.to(self.dtype)
        if not known:
            self.together = False
            mask = mask * torch.as_tensor(present, dtype=self.dtype, device=self.device)
        self.members = mask.expand(len(self.params))
        self.kept["step"].add_(self.members)
        self.steps = -1
        return self._spread(self.members)

    def settle(self) -> None:
        """Write down what the host has counted."""
        if self.steps >= 0:
            self.kept["step"].fill_(self.steps)
        if self.updates >= 0:
            self.kept["updates"].fill_(self.updates)

    def resumed(self) -> None:
        """Read what has been loaded into `kept`."""
        steps, updates = self.kept["step"], self.kept["updates"]
        self.together = bool((steps == steps[0]).all() and (updates == updates[0]).all())
        self.steps, self.updates = (int(steps[0]), int(updates[0])) if self.together else (-1, -1)
        if self.rule.sides:
            self.look()

    def _spread(self, values: Tensor) -> Tensor:
        """A number of each member (members,) for each block: (B, 1 .. 1), or (1, 1 .. 1) where all are equal."""
        if self.together:
            values = values[:1]
        else:
            counts = torch.tensor(self.counts, device=self.device)
            values = values.repeat_interleave(counts, output_size=self.size)
        return values.view(-1, *[1] * len(self.dims))

    @staticmethod
    def of(spread: Tensor, index: Tensor) -> Tensor:
        """What `_spread` gave, of some blocks: (K,) or (1,)."""
        return spread.flatten()[index] if len(spread) > 1 else spread.flatten()

    def number(self, name: str) -> int | Tensor:
        """Steps or updates so far, 1 at least: a number, or of each block."""
        known: int = self.steps if name == "step" else self.updates
        return max(known, 1) if known >= 0 else self._spread(self.kept[name]).clamp_min(1)

    def _rates(self, taking: Rate) -> Rates:
        group, rule = self.group, self.rule
        (beta1, beta2), t, corrected = group["betas"], self.number("step"), group["bias_correction"]
        usual = beta1**2 if rule.direction == "spectral" else beta1
        beta3 = usual if group["beta3"] is None else group["beta3"]
        graft_beta2 = self._graft_beta2
        return Rates(
            lr=group["lr"] * taking,
            keep=taking,
            momentum=(1 - beta1) * taking,
            lead=beta3 / beta1 if beta1 else 1.0,
            correction=1 - beta3 * (1 - remainder(beta1, t - 1)) if corrected else 1.0,
            second=(1 - beta2) * taking,
            second_correction=remainder(beta2, t) if corrected else 1.0,
            square=taking if rule.summed else (1 - graft_beta2) * taking,
            square_correction=remainder(graft_beta2, t)
            if corrected and rule.graft == "adam" and not rule.summed
            else 1.0,
            eps=group["eps"],
            neurons=(1 - group["neuron_beta2"]) * taking,
            velocity=1 - (1 - group["momentum"]) * taking,
            clip=group["clip"],
        )

    def _accumulate(self, gradient: Tensor, taking: Rate, kernels: Kernels) -> None:
        beta2 = self.group["betas"][1]
        weight = taking if beta2 == 1 else (1 - beta2) * taking
        kernels.accumulate(gradient, self.kept, self.rule, 1.0 if beta2 == 1 else 1 - weight, weight)

    def _count(self, taking: Rate) -> None:
        """One more update of the factors of the members that take this step."""
        if isinstance(taking, float) and self.updates >= 0:
            self.updates += 1
            return
        if self.updates >= 0:
            self.kept["updates"].fill_(self.updates)
            self.updates = -1
        self.kept["updates"].add_(1.0 if isinstance(taking, float) else self.members)

    def refresh(self, rows: list[int], keep: Tensor | None = None) -> None:
        """New roots or bases of these blocks, unless keep is 0."""
        at_once = len(rows)
        if self.device.type == "cpu" and rows:  # where fresh memory costs more than a short stack
            at_once = max(
                torch.get_num_threads(), ENTRIES // max(self.dims[side] ** 2 for side in self.rule.sides)
            )
        for first in range(0, len(rows), max(at_once, 1)):
            refresh(self, rows[first : first + at_once], keep)

    # -- gradients in, weights out

    def _gather(self, tensors: list[Tensor | None]) -> Tensor:
        """Tensors shaped like the members, zeros where there is none, as a stack in the bucket's dtype."""
        if not self.dims:
            pieces = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, self.params)]
            return torch.cat([t if t.ndim == 1 else t.reshape(-1) for t in pieces]).to(self.dtype)
        found = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, self.params)]
        if all(region.shape == self.dims for region in self.regions):
            plain = all(t.shape == self.dims for t in found)
            stack = torch.stack(found if plain else [t.reshape(self.dims) for t in found])
            return stack.to(self.dtype).contiguous()
        blocks = [region.blocks(t).reshape(-1, *self.dims) for region, t in zip(self.regions, found)]
        return torch.cat(blocks).to(self.dtype).contiguous()

    def _write(self, step: Tensor, kept: Rate, present: list[bool]) -> None:
        """Add the steps to the weights that had a gradient, after their decay."""
        single = self.dims and self.size == len(self.params)
        pieces = list(step.unbind() if single else step.split(self.counts))
        # blocks of what is not contiguous would be copies: then of a copy, which is written back
        dense = {i: p.contiguous() for i, p in enumerate(self.params) if not p.is_contiguous()}
        weights = [dense.get(i, p) for i, p in enumerate(self.params)]
        rests = list(self.rests)
        for i, region in enumerate(self.regions):
            if pieces[i].shape != weights[i].shape:
                weights[i] = region.blocks(weights[i])
                pieces[i] = pieces[i].view(weights[i].shape)
            rest = rests[i]
            rests[i] = None if rest is None else region.blocks(rest).view(weights[i].shape)
        taking = [i for i, is_present in enumerate(present) if is_present]
        add_steps(
            [weights[i] for i in taking], [pieces[i] for i in taking], kept, self.group["rounding"],
            [rests[i] for i in taking],
        )  # fmt: skip
        for i, copy in dense.items():
            self.params[i].copy_(copy)


def shrink(group: dict[str, Any], keep: Tensor | None) -> Rate:
    """What a group's weights are multiplied by before the step."""
    decay, how = group["weight_decay"], group["decay"]
    taking: Rate = 1.0 if keep is None else keep
    if not decay or how == "l2":
        return 1.0
    if how == "independent":
        return 1 - decay * taking
    share = group["lr"] / group["peak_lr"] if how == "corrected" and group["peak_lr"] else 1.0
    return 1 - group["lr"] * share * decay * taking
