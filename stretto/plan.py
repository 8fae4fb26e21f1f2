"""The plan: from a recipe and a budget to steps, batch sizes and data order, known before the run begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from stretto.core import At, Recipe, ScheduleMethod, stable_hash

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CALIBRATION_BATCHES = 32
GRID = 1024  # points at which a batch-size schedule is read to foresee how many examples some steps take


class Plan:
    """Steps, batch sizes and data order of one run; iterating yields `At` from the present step on.

    examples: size of the data set. batch: examples a step, over all slices. One of epochs, steps, samples
    and tokens is the budget: exactly so many steps, or else whole batches that stay within it, at least one.
    Batches that a schedule scales are multiples of the number of slices, which share a batch equally.
    Data order is a function of (seed, epoch): every example once an epoch, batches may straddle two epochs.
    mesh: ranks along its dims take slices of the batch, those along "tp" share them; None: all ranks that there
    are. slices: of the batch, as many as ranks unless the run began with more; each rank takes neighbouring ones.
    Raises ValueError for a budget that is missing or given twice, for a batch its slices cannot share, and for
    slices that the ranks cannot.
    """

    ranks: int  # that share the data
    rank: int  # this one's number among them
    group: dist.ProcessGroup | None  # of them; None when alone
    everyone: dist.ProcessGroup | None  # they, and those that are tensor-parallel; None when alone

    def __init__(
        self,
        recipe: Recipe,
        examples: int,
        batch: int,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        samples: int | None = None,
        tokens: float | None = None,
        seed: int = 0,
        tokens_per_example: int | None = None,
        mesh: DeviceMesh | None = None,
        slices: int | None = None,
    ) -> None:
        budgets = {"epochs": epochs, "steps": steps, "samples": samples, "tokens": tokens}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"a plan has one budget: epochs, steps, samples or tokens; given: {given or 'none'}"
            )
        [(unit, value)] = given.items()
        if not value > 0:
            raise ValueError(f"the budget is {value} {unit}; it must be above 0")
        if examples <= 0 or batch <= 0:
            raise ValueError(f"examples ({examples}) and batch ({batch}) must be above 0")
        self.recipe, self.examples, self.batch, self.seed = recipe, examples, batch, seed
        self.ranks, self.rank, self.group, self.everyone = _company(mesh)
        self.tokens_per_example = tokens_per_example
        self.slices = self.ranks if slices is None else slices
        if self.slices < 1 or batch % self.slices:
            raise ValueError(f"a batch of {batch} cannot be cut into {self.slices} equal slices")
        if self.slices % self.ranks:
            raise ValueError(
                f"{self.slices} slices cannot be shared equally by {self.ranks} ranks; give slices= a multiple "
                "of the ranks, or start as many ranks as divide them"
            )
        if unit == "tokens" and not tokens_per_example:
            raise ValueError("a budget in tokens needs tokens_per_example")
        if unit == "steps":
            self.sizes = self._exactly(int(value))
        else:
            budget = value / (tokens_per_example or 1) if unit == "tokens" else value
            budget *= examples if unit == "epochs" else 1
            self.sizes = self._within(max(1, math.floor(budget + 1e-6)))
        self.ends = list(accumulate(self.sizes))  # examples done after each step
        self.planned = self.ends[-1]
        self.step = 0
        self._orders: dict[int, Tensor] = {}  # by epoch
        self._latest = (-1, torch.empty(0, dtype=torch.int64))  # step and ids

    def _pace(self, samples: int) -> Callable[[float], int] | None:
        """Batch sizes of a run over so many examples, from examples done; None where nothing paces them."""
        paced = [m for m in self.recipe.of(ScheduleMethod) if "batch_size" in m.paces]
        if not paced:
            return None

        def size(done: float) -> int:
            at = At(
                0, 0, 0, min(int(done), samples - 1), samples, self.seed,
                examples=self.examples, tokens_per_example=self.tokens_per_example,
            )  # fmt: skip
            factor = paced[0].schedule(at)["batch_size"]
            return max(1, round(self.batch * factor / self.slices)) * self.slices

        return size

    def _within(self, samples: int) -> list[int]:
        """Batch sizes of a run over at most so many examples."""
        pace = self._pace(samples)
        if pace is None:
            return [self.batch] * max(1, samples // self.batch)
        sizes: list[int] = []
        done = 0
        while done + (size := pace(done)) <= samples or not sizes:
            sizes.append(size)
            done += size
        return sizes

    def _exactly(self, steps: int) -> list[int]:
        """Batch sizes of a run of so many steps."""
        if steps < 1:
            raise ValueError(f"the budget is {steps} steps; it must be 1 or more")
        # Steps are the sum of 1 / size over the examples, so their number foretells how many there will be.
        # Two rounds, since a schedule given in examples or epochs depends on that number in turn.
        samples = steps * self.batch
        for _ in range(2):
            if (pace := self._pace(samples)) is None:
                return [self.batch] * steps
            each = [1 / pace((i + 0.5) / GRID * samples) for i in range(GRID)]
            samples = max(1, round(steps / (sum(each) / GRID)))
        pace = self._pace(samples)
        assert pace is not None
        sizes: list[int] = []
        done = 0
        for _ in range(steps):
            sizes.append(pace(done))
            done += sizes[-1]
        return sizes

    @property
    def steps(self) -> int:
        """How many steps the whole run takes."""
        return len(self.sizes)

    def __len__(self) -> int:
        return self.steps - self.step

    def at(self, step: int) -> At:
        """Where training is just before this step; `at(plan.steps)` is the end."""
        done = self.ends[step - 1] if step else 0
        batch = self.sizes[step] if step < self.steps else 0
        return At(
            step, self.steps, done // self.examples, done, self.planned, self.seed, batch,
            self.examples, self.tokens_per_example, self.rank * (self.slices // self.ranks), self.slices,
        )  # fmt: skip

    def __iter__(self) -> Iterator[At]:
        while self.step < self.steps:
            yield self.at(self.step)
            self.step += 1

    def resume(self, step: int) -> None:
        """Go on before this step; loaders made by then start there."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"this plan has {self.steps} steps; it cannot resume at {step}")
        self.step = step

    def indices(self, at: At) -> Tensor:
        """The data set's ids of this rank's share of the batch, (at.batch // ranks,) int64, in row order."""
        if at.step != self._latest[0]:  # a host asks for the data, then the Updater
            share = at.batch // self.ranks
            self._latest = (at.step, self._draw(at)[self.rank * share : (self.rank + 1) * share])
        return self._latest[1]

    def _draw(self, at: At) -> Tensor:
        """Those of the global batch."""
        epoch, offset = divmod(at.done, self.examples)
        if offset + at.batch <= self.examples:
            return self._order(epoch)[offset : offset + at.batch]
        pieces, missing = [], at.batch
        while missing:
            pieces.append(self._order(epoch)[offset : offset + missing])
            missing -= len(pieces[-1])
            epoch, offset = epoch + 1, 0
        return torch.cat(pieces)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            generator = torch.Generator().manual_seed(stable_hash(self.seed, "order", epoch))
            self._orders[epoch] = torch.randperm(self.examples, generator=generator)
        return self._orders[epoch]

    def batches(self) -> Sampler[list[int]]:
        """A batch sampler for a DataLoader: this rank's ids of each batch, from the plan's present step."""
        return _Batches(self)

    def calibration(self, dataset: Any, batches: int = CALIBRATION_BATCHES, **loader: Any) -> DataLoader[Any]:
        """A loader of its own over this rank's share of batches about the present step; it loads when iterated.

        `loader` goes to the DataLoader (collate_fn, num_workers …). The caller's random state stays as it is.
        """
        first = max(0, min(self.step, self.steps - batches))
        sampler = _Batches(self, first, min(self.steps, first + batches))
        return DataLoader(dataset, batch_sampler=sampler, **{"generator": torch.Generator(), **loader})


class _Batches(Sampler[list[int]]):
    def __init__(self, plan: Plan, first: int | None = None, last: int | None = None) -> None:
        self.plan, self.first, self.last = plan, first, plan.steps if last is None else last

    def _start(self) -> int:
        return self.plan.step if self.first is None else self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._start(), self.last):
            yield self.plan.indices(self.plan.at(step)).tolist()

    def __len__(self) -> int:
        return self.last - self._start()


def _company(
    mesh: DeviceMesh | None,
) -> tuple[int, int, dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """How many ranks share the data, which of them this one is, their group, and the group of the whole mesh."""
    if mesh is None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return 1, 0, None, None
        return dist.get_world_size(), dist.get_rank(), dist.group.WORLD, dist.group.WORLD
    names = mesh.mesh_dim_names or ()
    data = [dim for dim in range(mesh.ndim) if not names or names[dim] != "tp"]
    ranks, rank = 1, 0
    for dim in data:
        ranks, rank = ranks * mesh.size(dim), rank * mesh.size(dim) + mesh.get_local_rank(dim)
    return ranks, rank, _group(mesh, data), _group(mesh, list(range(mesh.ndim)))


def _group(mesh: DeviceMesh, dims: list[int]) -> dist.ProcessGroup | None:
    """The ranks that differ from this one in these dims alone."""
    dims = [dim for dim in dims if mesh.size(dim) > 1]
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(dims) == mesh.ndim and mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    names = mesh.mesh_dim_names
    assert names is not None, "dims that are taken together are named"
    return mesh[tuple(names[dim] for dim in dims)]._flatten().get_group()
