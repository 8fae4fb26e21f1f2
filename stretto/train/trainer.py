"""The trainer: the loop of the README around a workload, that can be advanced and left standing."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stretto import shards
from stretto.core import Batch, Forward, Recipe, map_data, stable_hash, stream
from stretto.plan import Plan
from stretto.train.parallel import Execution, start
from stretto.update import Updater

if TYPE_CHECKING:
    from stretto.workloads import Workload


class Trainer:
    """One run of a workload: `advance(n)` steps and stand; `evaluate()` at any time.

    batch and budget (both in examples) default to the workload's. A step whose loss or gradients are not
    finite is skipped; `max_skips` of them in a row raise FloatingPointError. Where execution spreads the run
    over ranks, every rank makes the same calls and finds the same numbers; slices are as many as share the data.
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        *,
        execution: Execution | None = None,
        batch: int | None = None,
        budget: int | None = None,
        seed: int = 0,
        slices: int | None = None,
        microbatch: int | None = None,
        max_skips: int = 3,
    ) -> None:
        self.workload, self.max_skips, self.skips = workload, max_skips, 0
        execution = execution or Execution()
        mesh = execution.mesh()
        self.data = recipe.data(workload.data("train"))
        self.model = start(
            functools.partial(_build, workload, recipe, seed), execution, mesh,
            leaves_unused=any(method.leaves_unused for method in recipe.methods),
        )  # fmt: skip
        self.plan = Plan(
            recipe,
            examples=len(self.data),
            batch=batch or workload.batch,
            samples=budget or workload.budget,
            seed=seed,
            tokens_per_example=workload.tokens_per_example,
            mesh=mesh,
            slices=slices,
        )
        self.update = Updater(recipe, self.model, workload.loss, self.plan, microbatch=microbatch)
        self.loss = math.nan  # of the last batch
        self._parameters = [p for p in self.update.model.parameters() if p.requires_grad]
        self._sharded = any(map(shards.is_sharded, self._parameters))
        device = self._parameters[0].device
        self._found, self._one = torch.zeros(1, device=device), torch.ones(1, device=device)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.update.step

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.step >= self.plan.steps

    def advance(self, steps: int = 1) -> None:
        """Take this many steps, or as many as the budget has left."""
        for step in range(self.step, min(self.step + steps, self.plan.steps)):
            at = self.plan.at(step)
            batch = Batch(*self.data.take(self.plan.indices(at)))
            losses: list[Tensor] = []
            for part in self.update.passes(batch, at):
                outputs = self.update.run_model(self.model, part.inputs)
                loss = self.update.loss(outputs, part.targets)
                loss.backward()
                if self.update.round == 0:
                    losses.append(loss.detach())
            self.loss = self._mean(losses[0] if len(losses) == 1 else torch.stack(losses).sum())
            if math.isfinite(self.loss) and self._gradients_finite():
                self.update.finish(at)
                self.skips = 0
            else:
                self._skip(step)

    def seek(self, step: int) -> None:
        """Stand before another step with the weights of this one: for measuring what steps there cost."""
        self.update.step = step

    def evaluate(self) -> dict[str, float]:
        """The workload's metrics of the weights that the recipe predicts with."""
        with self.update.evaluating(self.plan.calibration(self.data)) as predict:
            return self.workload.evaluate(functools.partial(_predict, predict, self.update.device))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return self.update.state_dict() | {"skips": self.skips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self.update.load_state_dict(state)
        self.skips = state["skips"]

    def _mean(self, loss: Tensor) -> float:
        """Of the ranks that share the data, so that all of them go on or none."""
        if self.plan.group is None:
            return float(loss)
        dist.all_reduce(loss, group=self.plan.group)
        return float(loss) / self.plan.ranks

    def _gradients_finite(self) -> bool:
        """One pass over all gradients, the check that GradScaler makes; they are multiplied by 1."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._sharded:
            gradients = [shard for shard in map(shards.local, gradients) if shard.numel()]
        found = self._found.zero_()
        if gradients:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self._one)
        return not self.update.agreed(found).item()

    def _skip(self, step: int) -> None:
        self.skips += 1
        named = self.update.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not shards.local(p.grad).isfinite().all()]
        self.update.skip()
        if self.skips >= self.max_skips:
            raise FloatingPointError(
                f"{self.skips} steps in a row, the last of them {step}, had no finite loss or gradients "
                f"(loss {self.loss}; {', '.join(bad[:3]) or 'no parameter'}{' …' if len(bad) > 3 else ''}); "
                "lower the learning rate or clip gradients"
            )


def _build(workload: Workload, recipe: Recipe, seed: int) -> nn.Module:
    """The workload's model, changed by the recipe."""
    with stream(stable_hash(seed, "model")):
        model = workload.model()
    return recipe.model(model, seed)


def _predict(predict: Forward, device: torch.device, inputs: Any) -> Any:
    """Predict on the model's device, for workloads that keep their data on the CPU."""
    outputs = predict(map_data(lambda t: t.to(device), inputs))
    return outputs.cpu() if isinstance(outputs, Tensor) else outputs
