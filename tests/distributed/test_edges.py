"""The Shampoo family over ranks where something is missing, uneven or rounded: still one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_family import FAMILY, STEPS, Net, assert_close, give, gradients, spread, whole
from torch import Tensor, nn

from stretto.optim import (
    SOAP,
    CautiousWeightDecay,
    EMANesterov,
    Hyperball,
    Lookahead,
    Muon,
    PrimalAveraging,
    ScheduleFree,
    Shampoo,
    UpdateFloor,
)
from stretto.optim.exchange import local

PLACES = [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp+fsdp", 4)]
USUAL: dict[str, Any] = {"lr": 0.01, "every": 3, "block": 8, "weight_decay": 0.1}
Missing = Callable[[int, str], bool]  # at this step, of this parameter


class Small(nn.Module):
    """Fewer blocks than ranks, and shards without a row."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            self.register_parameter(f"w{i}", nn.Parameter(value))


def gradients_of(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
    }


def keys(optimizer: Shampoo) -> list[list[str]]:
    """Of what is kept of each parameter."""
    return [sorted(optimizer.state.get(p, {})) for p in optimizer._parameters()]


# -- gradients that are missing


def with_gaps(member: str, parallel: str, missing: Missing, **options: Any) -> tuple[dict[str, Tensor], Any]:
    model = Net()
    group = spread(model, parallel)
    optimizer = FAMILY[member](model.named_parameters(), process_group=group, **{**USUAL, **options})
    for step in range(STEPS):
        give(model, gradients(step), lambda name, step=step: missing(step, name))
        optimizer.step()
    return whole(model), keys(optimizer)


def in_some_steps(step: int, name: str) -> bool:
    """tall begins at the fourth step, square pauses at every other one, kernel never steps; one step has none."""
    gone = {"tall": step < 3, "square": step % 2 == 1, "kernel": True, "bias": step in (0, 6)}
    return step == 5 or gone.get(name, False)


@pytest.mark.parametrize(("parallel", "ranks"), PLACES)
def test_parameters_unused_in_some_steps_step_as_in_one_process(parallel: str, ranks: int) -> None:
    """Counters of steps and turns of refreshes that move on ranks with blocks of a parameter, and not on others."""
    cases: list[Any] = [("root", {}), ("soap", {}), ("kl", {"decay": "l2"}), ("muon", {})]

    def everyone() -> list[Any]:
        return [with_gaps(member, parallel, in_some_steps, **options) for member, options in cases]

    found = run(everyone, ranks)
    for number, (member, options) in enumerate(cases):
        expected, _ = with_gaps(member, "one", in_some_steps, **options)
        for theirs in found:
            assert_close(theirs[number][0], expected)
            assert theirs[number][1] == found[0][number][1]


def as_zeros(member: str, parallel: str, zeros: bool, **options: Any) -> dict[str, Tensor]:
    """The last rank has no gradient of some parameters in every other step, or zeros for them."""
    model = Net()
    group = spread(model, parallel)
    optimizer = FAMILY[member](model.named_parameters(), process_group=group, **{**USUAL, **options})
    last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(STEPS):
        give(model, gradients(step))
        for p in (model.square, model.bias, model.tall):
            if last and step % 2 == 0:
                p.grad = torch.zeros_like(p) if zeros else None
        optimizer.step()
    return {name: local(p).detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("parallel", "ranks"), PLACES)
def test_gradients_that_some_ranks_lack_count_as_zeros_there_and_do_not_hang(
    parallel: str, ranks: int
) -> None:
    """Meta's DDP Shampoo hangs where a gradient is None on some ranks alone: they skip the collective."""
    cases: list[Any] = [("soap", {"momentum": 0.9}), ("kl", {"decay": "l2"})]

    def both() -> list[Any]:
        return [[as_zeros(m, parallel, zeros, **more) for zeros in (True, False)] for m, more in cases]

    for theirs in run(both, ranks):
        for zeros, none in theirs:
            assert all(torch.equal(none[name], zeros[name]) for name in zeros)


# -- frozen parameters


def frozen(parallel: str, thaw: int) -> tuple[dict[str, Tensor], Any, str]:
    """square, bias and wte are frozen up to a step."""
    model = Net()
    group = spread(model, parallel)
    still = [model.square, model.bias, model.wte]
    for p in still:
        p.requires_grad_(False)
    optimizer = Shampoo(model.named_parameters(), process_group=group, **USUAL)
    before: Any = None
    for step in range(STEPS):
        for p in still:
            p.requires_grad_(step >= thaw)
        give(model, gradients(step), lambda name: not getattr(model, name).requires_grad)
        optimizer.step()
        if step == 0:
            before = [p in optimizer.state for p in model.parameters()]
    return whole(model), before, str(optimizer.layout)


@pytest.mark.parametrize(("parallel", "ranks"), PLACES)
def test_frozen_parameters_have_no_state_and_may_be_thawed(parallel: str, ranks: int) -> None:
    """A parameter that joins later, on ranks that settled who owns what at the first step."""

    def everyone() -> list[Any]:
        return [frozen(parallel, thaw) for thaw in (4, STEPS)]

    found = run(everyone, ranks)
    for number, thaw in enumerate((4, STEPS)):
        expected, kept, _ = frozen("one", thaw)
        assert kept == [name not in ("square", "bias", "wte") for name, _ in Net().named_parameters()]
        for theirs, their_kept, layout in (each[number] for each in found):
            assert_close(theirs, expected)
            assert their_kept == kept and layout == found[0][number][2]


# -- more ranks than blocks


def small(member: str, parallel: str, shapes: list[tuple[int, ...]]) -> tuple[dict[str, Tensor], Any, Any]:
    model = Small(*shapes)
    group = spread(model, parallel)
    optimizer = FAMILY[member](model.named_parameters(), process_group=group, **USUAL)
    for step in range(STEPS):
        give(model, gradients_of(Small(*shapes), step))
        optimizer.step()
    again = FAMILY[member](model.named_parameters(), process_group=group, **USUAL)
    again.load_state_dict(optimizer.state_dict())
    for other in (optimizer, again):
        give(model, gradients_of(Small(*shapes), STEPS))
        other.step()
    return whole(model), keys(optimizer), sum(bucket.size for bucket in optimizer.buckets if bucket.dims)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_a_rank_that_owns_no_block_neither_hangs_nor_crashes(parallel: str) -> None:
    """Meta's distributed Shampoo crashes on a rank without blocks; its state has no keys there."""
    cases = [(member, [(4, 4)]) for member in FAMILY]
    cases += [(member, [(2, 3), (1,), (5, 2)]) for member in ("root", "soap", "muon")] + [("root", [(3,)])]

    def everyone() -> list[Any]:
        return [small(member, parallel, shapes) for member, shapes in cases]

    found = run(everyone, 4)
    for number, (member, shapes) in enumerate(cases):
        expected, _, blocks = small(member, "one", shapes)
        assert sum(theirs[number][2] for theirs in found) == blocks
        for theirs in found:
            assert_close(theirs[number][0], expected)
            assert theirs[number][1] == found[0][number][1] and all(theirs[number][1])


# -- less travels


def travelled(
    member: str, parallel: str, transport: str | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Net()
    group = spread(model, parallel)
    optimizer = FAMILY[member](model.named_parameters(), process_group=group, transport=transport, **USUAL)
    for step in range(STEPS):
        give(model, gradients(step))
        optimizer.step()
    return whole(model), {name: local(p).detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_bfloat16_on_the_wire_costs_its_rounding_and_replicas_stay_equal(parallel: str, ranks: int) -> None:
    """Owners that keep the exact step while the others add the rounded one."""
    members = ["root", "soap", "muon"]

    def everyone() -> list[Any]:
        return [travelled(member, parallel, "bfloat16") for member in members]

    begin = whole(Net())
    found = run(everyone, ranks)
    shards = ranks // 2 if parallel == "hsdp" else ranks if parallel == "fsdp" else 1
    for number, member in enumerate(members):
        exact, _ = travelled(member, "one", None)
        for rank, theirs in enumerate(found):
            assert_close(moved(theirs[number][0], begin), moved(exact, begin), 1e-2)
            replica = found[rank % shards][number][1]
            assert all(torch.equal(value, replica[name]) for name, value in theirs[number][1].items())


def moved(now: dict[str, Tensor], begin: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: now[name] - begin[name] for name in begin}


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "broadcast",
    "all_to_all_single", "all_to_all", "reduce_scatter_tensor",
)  # fmt: skip


def of_shards(parallel: str, member: str, patch: Any) -> tuple[bool, list[str]]:
    """Whether local blocks step as an optimizer of this rank's shards alone; the collectives of a plain step."""
    model = Net()
    group = spread(model, parallel)
    optimizer = FAMILY[member](model.named_parameters(), process_group=group, blocks="local", **USUAL)
    shards = [(name, nn.Parameter(local(p).detach().clone())) for name, p in model.named_parameters()]
    alone = FAMILY[member](shards, **USUAL)
    called: list[str] = []
    for step in range(STEPS):
        give(model, gradients(step))
        for (_, shard), p in zip(shards, model.parameters()):
            shard.grad = local(p.grad).clone()
        if step == 1:
            for name in COLLECTIVES:
                if theirs := getattr(dist, name, None):
                    patch.setattr(dist, name, noted(theirs, name, called))
        optimizer.step()
        patch.undo()
        alone.step()
    same = all(torch.equal(local(p), shard) for p, (_, shard) in zip(model.parameters(), shards))
    return same, called


def noted(function: Callable[..., Any], name: str, called: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        called.append(name)
        return function(*args, **options)

    return call


@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_local_blocks_step_as_shards_alone_and_exchange_flags_only(
    parallel: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of which a shard is empty, which has no blocks to cut it into."""
    members = ["root", "soap", "muon"]

    def everyone() -> list[Any]:
        return [of_shards(parallel, member, monkeypatch) for member in members]

    for theirs in run(everyone, ranks):
        for same, called in theirs:
            assert same and called == ["all_reduce"] * (2 if parallel == "hsdp" else 1)


# -- weights of fewer bits


def rounded(member: str, parallel: str) -> tuple[dict[str, Tensor], float]:
    model = Net().to(torch.bfloat16)
    model.kernel.data = model.kernel.data.contiguous(memory_format=torch.channels_last)
    if parallel != "ddp":
        model.kernel.data = model.kernel.data.contiguous()  # which fully_shard wants
    group = spread(model, parallel)

    def fresh() -> Shampoo:
        return FAMILY[member](
            model.named_parameters(), process_group=group, **{**USUAL, "lr": 1e-3}, rounding="compensated"
        )

    optimizer = fresh()
    for step in range(STEPS):
        give(model, {name: grad.bfloat16() for name, grad in gradients(step).items()})
        optimizer.step()
        if step == 4:
            saved = optimizer.state_dict()
            optimizer = fresh()
            optimizer.load_state_dict(saved)
    rest = sum(float(optimizer.state[p]["rest"].float().abs().sum()) for p in model.parameters())
    return whole(model), rest


@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_compensated_weights_are_those_of_one_process(parallel: str, ranks: int) -> None:
    """What rounding left off, lost with a copy of a shard or with a saved state."""
    members = ["root", "soap", "muon"]

    def everyone() -> list[Any]:
        return [rounded(member, parallel) for member in members]

    found = run(everyone, ranks)
    for number, member in enumerate(members):
        expected, rest = rounded(member, "one")
        assert rest > 0
        for theirs in found:
            assert theirs[number][1] > 0
            same = [(theirs[number][0][name] == value).flatten() for name, value in expected.items()]
            assert torch.cat(same).float().mean() >= 0.995, member
            assert_close(theirs[number][0], expected, 2**-8)


# -- around it

AROUND: dict[str, Callable[[Any], Any]] = {
    "schedule-free": ScheduleFree,
    "primal averaging": PrimalAveraging,
    "ema-nesterov": lambda inner: EMANesterov(inner, trend_rate=0.1),
    "lookahead": lambda inner: Lookahead(inner, every=3),
    "hyperball": Hyperball,
    "update floor": UpdateFloor,
    "cautious": CautiousWeightDecay,
    "two": lambda inner: Lookahead(CautiousWeightDecay(inner), every=4),
}


MEMBERS: list[Callable[..., Shampoo]] = [Shampoo, SOAP, Muon]


def wrapped(around: str, member: Callable[..., Shampoo], parallel: str) -> dict[str, Tensor]:
    model = Net()
    group = spread(model, parallel)
    optimizer = AROUND[around](member(model.named_parameters(), process_group=group, **USUAL))
    for step in range(STEPS):
        give(model, gradients(step), lambda name, step=step: in_some_steps(step, name))
        optimizer.step()
    return whole(model)


@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 2), ("fsdp", 4)])
def test_what_is_around_the_family_steps_as_in_one_process(parallel: str, ranks: int) -> None:
    """Averages of shards, norms of wholes, and steps that a rank without blocks takes too."""
    cases = list(zip(AROUND, itertools.cycle(MEMBERS)))

    def everyone() -> list[Any]:
        return [wrapped(around, member, parallel) for around, member in cases]

    found = run(everyone, ranks)
    for number, (around, member) in enumerate(cases):
        expected = wrapped(around, member, "one")
        for theirs in found:
            assert_close(theirs[number], expected)
