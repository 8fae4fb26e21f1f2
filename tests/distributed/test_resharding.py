"""Checkpoints of several ranks: saved on some, loaded on others, and complete or absent for all."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lines import RECIPE, Lines, WideLines
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stretto.core import Batch, Recipe
from stretto.methods import EMA, SOAP, Lookahead, Muon, Shampoo
from stretto.optim.wrapper import Wrapper
from stretto.plan import Plan
from stretto.train import Trainer, checkpoint
from stretto.train.parallel import Execution
from stretto.train.shards_on_disk import contents
from stretto.update import Updater
from stretto.workloads import Workload

SLICES = 4


def made(parallel: str, recipe: Recipe = RECIPE, workload: Workload | None = None) -> Trainer:
    replicas = 2 if parallel == "hsdp" else None
    execution = Execution(parallel if dist.is_initialized() else "none", replicas=replicas)  # type: ignore[arg-type]
    return Trainer(workload or Lines(), recipe, slices=SLICES, execution=execution)


def leg(folder: Path, until: int, parallel: str, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Go on with what is stored, to a step, and save; what the run is then, whole, and the keys on this rank."""
    trainer = made(parallel, recipe)
    if found := checkpoint.find(folder):
        checkpoint.load(trainer, found)
    losses = []
    while trainer.step < until:
        trainer.advance(1)
        losses.append(trainer.loss)
    checkpoint.save(trainer, folder)
    checkpoint.prune(folder, keep=1)
    return {"losses": losses, "metric": trainer.evaluate()["loss"], "state": whole(trainer.state_dict())}


def whole(value: Any) -> Any:
    """A state without DTensors."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(whole, value))
    return value.full_tensor() if isinstance(value, DTensor) else value


def on(count: int, folder: Path, until: int, *how: Any) -> dict[str, Any]:
    """The leg on so many ranks, which agree; one is a process without a group."""
    if count == 1:
        return leg(folder, until, *how)
    first, *others = ranks.run(leg, count, folder, until, *how)
    assert all(str(first) == str(other) for other in others)
    return first


def differ(a: Any, b: Any) -> float:
    """The largest difference of two states; infinite where they differ in keys, shapes or text."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((differ(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(differ, a, b), default=0.0)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        return float((a - b).abs().max()) if a.numel() else 0.0
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b)
    return 0.0 if a == b else float("inf")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_4_then_2_then_1_then_4_ranks_equal_one_uninterrupted_process(parallel: str, tmp_path: Path) -> None:
    """The slices are the run's, so that fewer ranks take several each."""
    expected = on(1, tmp_path / "whole", 12, parallel)
    losses = []
    for count, until in ((4, 3), (2, 6), (1, 9), (4, 12)):
        found = on(count, tmp_path / "cut", until, parallel)
        losses += found["losses"]
    assert differ(found["state"], expected["state"]) < 1e-12
    assert max(abs(a - b) for a, b in zip(losses, expected["losses"])) < 1e-12
    assert abs(found["metric"] - expected["metric"]) < 1e-12


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_as_many_ranks_as_before_go_on_bit_for_bit(parallel: str, tmp_path: Path) -> None:
    expected = on(2, tmp_path / "whole", 6, parallel)
    on(2, tmp_path / "cut", 3, parallel)
    assert differ(on(2, tmp_path / "cut", 6, parallel)["state"], expected["state"]) == 0


def test_one_parallelism_goes_on_with_what_another_saved(tmp_path: Path) -> None:
    expected = on(1, tmp_path / "whole", 12, "none")
    on(4, tmp_path / "cut", 3, "hsdp")
    on(2, tmp_path / "cut", 6, "ddp")
    on(2, tmp_path / "cut", 9, "fsdp")
    found = on(4, tmp_path / "cut", 12, "hsdp")
    assert differ(found["state"], expected["state"]) < 1e-12


def keys(state: Any) -> Any:
    """Of a state and of the states in it."""
    return {key: keys(value) for key, value in state.items()} if isinstance(state, dict) else None


FAMILY = [Recipe(SOAP(lr=0.01)), Recipe(Shampoo(lr=0.01, block=4), Lookahead()), Recipe(Muon(lr=0.01), EMA())]


@pytest.mark.parametrize("recipe", FAMILY, ids=str)
def test_blocks_that_ranks_own_are_dealt_out_anew(recipe: Recipe, tmp_path: Path) -> None:
    """What an optimizer of the family keeps of a parameter lies with the owners of its blocks.

    All begin on one rank: the first bases of SOAP, of factors that are not of full rank, hang on the last bit.
    """
    expected = leg(tmp_path / "whole", 12, "none", recipe)
    legs = (
        (1, 3, "none"),
        (4, 5, "fsdp"),
        (2, 7, "ddp"),
        (1, 8, "none"),
        (4, 10, "hsdp"),
        (2, 11, "fsdp"),
        (1, 12, "none"),
    )
    for count, until, parallel in legs:
        if count == 1:
            found = leg(tmp_path / "cut", until, parallel, recipe)
        else:
            found, *others = ranks.run(leg, count, tmp_path / "cut", until, parallel, recipe)
            assert all(keys(other["state"]) == keys(found["state"]) for other in others)
        assert keys(found["state"]) == keys(expected["state"])
    whole_run, cut = (contents(tmp_path / name / "step-000012") for name in ("whole", "cut"))
    assert whole_run.keys() == cut.keys()
    assert differ(found["state"], expected["state"]) < 1e-9
    assert abs(found["metric"] - expected["metric"]) < 1e-9


# -- complete or absent, refused or taken, for all ranks


def save_and_die(folder: Path, of: int) -> None:
    trainer = made("fsdp")
    trainer.advance(1)
    checkpoint.save(trainer, folder)
    trainer.advance(1)
    if dist.get_rank() == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(trainer, folder)


def test_a_kill_between_writing_and_renaming_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    killed, waiting = ranks.outcomes(save_and_die, 2, tmp_path, 2, seconds=20)
    assert isinstance(killed, ranks.Failed) and isinstance(waiting, ranks.Failed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002.partial"]
    with pytest.warns(UserWarning, match=r"step-000002\.partial is torn"):
        assert checkpoint.find(tmp_path) == tmp_path / "step-000001"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the torn one
        found = on(2, tmp_path, 3, "fsdp")
    assert len(found["losses"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def load_another(folder: Path) -> list[str]:
    trainer = made("fsdp", workload=WideLines())
    before = whole(trainer.state_dict())
    try:
        checkpoint.load(trainer, folder)
    except ValueError as error:
        return [str(error), str(differ(before, whole(trainer.state_dict())))]
    return []


def test_another_model_is_refused_on_every_rank_with_the_same_words(tmp_path: Path) -> None:
    on(2, tmp_path, 1, "fsdp")
    found = ranks.run(load_another, 2, tmp_path / "step-000001")
    assert found[0] == found[1]
    assert "of another model: shapes differ: 0.weight (7, 5) there, (8, 5) here" in found[0][0]
    assert found[0][1] == "0.0"


def fail_on_rank_0(folder: Path) -> str:
    trainer = made("ddp")
    try:
        checkpoint.save(trainer, folder / "file" / "checkpoints")
    except OSError as error:
        return type(error).__name__
    return "saved"


def test_what_rank_0_cannot_write_is_said_by_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert ranks.run(fail_on_rank_0, 2, tmp_path) == ["NotADirectoryError"] * 2


# -- tensors that a rank holds in part


@dataclass
class Part:
    """A stand-in for what an optimizer tells of a tensor."""

    whole: tuple[int, ...]
    local: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], int, int]]


class Owned(Optimizer):
    """SGD with momentum, kept for the rows that this rank owns: of every second row, dealt out in turn."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def rows(self, p: Tensor) -> list[int]:
        count, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        return list(range(rank, len(p), count))

    def held(self, p: Tensor, key: str, shape: tuple[int, ...]) -> Part | None:
        if key != "momentum":
            return None
        rows, rest = self.rows(p), tuple(shape[1:])
        zeros = (0,) * len(rest)
        return Part((len(p), *rest), (len(rows), *rest), [((r, *zeros), i, 1) for i, r in enumerate(rows)])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state, rows = self.state[p], self.rows(p)
                if not state:
                    state["momentum"], state["count"] = torch.zeros_like(p[rows]), torch.zeros(())
                state["momentum"].mul_(0.9).add_(p.grad[rows])
                state["count"] += 1
                step = torch.zeros_like(p)
                step[rows] = state["momentum"]
                if dist.is_initialized():
                    dist.all_reduce(step)
                p.sub_(group["lr"] * step)


class Slow(Wrapper):
    """Keeps of each parameter where it began, under the key that the inner optimizer uses too."""

    kept = ("beginning",)

    def around(self, stepping: Any) -> Any:
        for _, params in stepping:
            self.keep(params, "beginning")
        return warnings.catch_warnings()


def owned_leg(folder: Path, until: int) -> dict[str, Any]:
    """A loop of the user's own: plain parameters, gradients of all ranks summed by DDP."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    plan = Plan(Recipe(), examples=64, batch=12, steps=20, slices=12)
    data = Lines().data("train")
    wrapped: nn.Module = nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net
    update = Updater(Recipe(), wrapped, F.mse_loss, plan, optimizer=Slow(Owned(net.parameters())))
    if found := checkpoint.find(folder):
        checkpoint.load(update, found)
        plan.resume(update.step)
    while update.step < until:
        at = plan.at(update.step)
        for part in update(Batch(*data.take(plan.indices(at))), at):
            update.loss(wrapped(part.inputs), part.targets).backward()
    path = checkpoint.save(update, folder)
    stored: Any = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {key: tuple(value.size) for key, value in stored.items() if key.startswith("optimizer.0.weight")}
    return {"weights": [p.detach() for p in net.parameters()], "shapes": shapes}


def test_tensors_held_in_part_are_dealt_out_anew(tmp_path: Path) -> None:
    expected = owned_leg(tmp_path / "whole", 10)
    for count, until in ((4, 2), (2, 4), (1, 6), (3, 8), (4, 10)):
        if count == 1:
            found = owned_leg(tmp_path / "cut", until)
        else:
            found = ranks.run(owned_leg, count, tmp_path / "cut", until)[0]
        assert found["shapes"] == {
            "optimizer.0.weight.momentum": (7, 5), "optimizer.0.weight.count": (),
            "optimizer.0.weight.beginning": (7, 5),
        }  # fmt: skip
    assert differ(found["weights"], expected["weights"]) < 1e-12


def strided(folder: Path, save: bool) -> float:
    """TP and FSDP cut the same side, so that a rank's shard is no plain slice of the rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False)).double()
    values = [p.detach().clone() for p in net.parameters()]
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(net.parameters())
    plan = Plan(Recipe(), examples=64, batch=4, steps=20, slices=4)
    update = Updater(Recipe(), net, F.mse_loss, plan, optimizer=optimizer)
    if save:
        checkpoint.save(update, folder)
    else:
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        checkpoint.load(update, folder / "step-000000")
    return max(differ(whole(p.data), value) for p, value in zip(net.parameters(), values))


@pytest.mark.parametrize("saving", [1, 4])
def test_shards_of_two_meshes_are_put_together_right(saving: int, tmp_path: Path) -> None:
    for count, save in ((saving, True), (5 - saving, False)):
        found = [strided(tmp_path, save)] if count == 1 else ranks.run(strided, count, tmp_path, save)
        assert found == [0.0] * count
