"""What a step of Shampoo, SOAP and Muon takes, beside the bare products of the same buckets and beside AdamW.

    python benchmarks/optimizer_step.py [--sets gpt2tiny,resnet18] [--only shampoo,bf16,soap,muon] [--quick] [--check]
    python benchmarks/optimizer_step.py --memory | --linear | --gpu

CPU milliseconds of all threads. The rows take turns, a block of steps each, after a whole refresh cycle; figures
are medians over rounds, ratios medians of the ratios within a round. Refresh every 10, block 1024. Absolute
figures say something about the machine, ratios about the optimizer. --check: exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from optimizer_shapes import (
    GPT2,
    SETS,
    Floor,
    Shapes,
    Weights,
    factors,
    flops,
    gradient_pool,
    square_matrices,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from stretto.optim import SOAP, Shampoo

EVERY = 10  # steps of a refresh cycle
ROUNDS, QUICK_ROUNDS = 5, 2
PARTS = ("shampoo", "bf16", "soap", "muon")  # bf16: Shampoo with products in bfloat16
NOTE = """plain: a step with the refresh switched off; mean, worst: of the steps of a refresh cycle, each the median
over rounds. refresh: of everything at once. B/p: bytes of state per parameter. aten: calls of any kind, views too,
those of the worker threads of a refresh included; of a plain step, and of the steps of a cycle the median and
the largest."""


@dataclass(frozen=True)
class Bar:
    """A figure and what it may be at most."""

    text: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.met else "missed"
        return f"  {self.text:66} {self.value:9.3f}  at most {self.limit:<6g} {verdict}"


# -- optimizers


def groups(weights: Weights, tables: str) -> list[dict[str, Any]]:
    """One group of all but the tables, and one of the tables with a direction of their own."""
    found: list[dict[str, Any]] = [{"params": weights.others}]
    return [*found, {"params": weights.tables, "direction": tables}] if weights.tables else found


def shampoo(weights: Weights, *, block: int = 1024, **options: Any) -> Any:
    return Shampoo(groups(weights, "one_sided"), lr=1e-3, every=EVERY, block=block, **options)


def two_sided(weights: Weights) -> Any:
    """Shampoo with all sides of all matrices, tables too."""
    params = [*weights.others, *weights.tables]
    return Shampoo(params, lr=1e-3, every=EVERY, block=1024, one_sided_above=math.inf)


def soap(weights: Weights, **options: Any) -> Any:
    return SOAP(groups(weights, "one_sided"), lr=1e-3, every=EVERY, block=1024, **options)


def muon(weights: Weights, products: str | None = "bfloat16") -> Any:
    """The spectral direction with the momentum and the iterations of torch.optim.Muon; Adam for tables."""
    options: dict[str, Any] = {"betas": (0.95, 0.95), "beta3": 0.95**2, "products": products}
    return Shampoo(groups(weights, "diagonal"), lr=1e-3, direction="spectral", **options)


def torch_muon(weights: Weights) -> list[Optimizer]:
    """torch.optim.Muon, which computes in bfloat16, and fused AdamW for what is no matrix of the inside."""
    rest = [*weights.tables, *(p for p in weights.others if p.ndim < 2)]
    matrices = [p for p in weights.others if p.ndim == 2]
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, fused=True)]


def adamw(weights: Weights, **options: Any) -> list[Optimizer]:
    return [torch.optim.AdamW([*weights.tables, *weights.others], lr=1e-3, **options)]


# -- a row of the table


@dataclass
class Row:
    """What takes its turn: blocks of work of some kinds, each returning the CPU milliseconds of its steps."""

    name: str
    blocks: dict[str, Callable[[], list[float]]]
    bytes: float = math.nan  # of state, per parameter
    calls: tuple[int, float, int] | None = None  # of a plain step; median and largest of a cycle
    # of each kind, for each round, the times of its steps
    times: dict[str, list[list[float]]] = field(default_factory=dict)

    def take_turn(self) -> None:
        for kind, block in self.blocks.items():
            self.times.setdefault(kind, []).append(block())

    def in_rounds(self, kind: str) -> list[float]:
        """The middle of each round: of a cycle the mean, for its steps differ, of others the median."""
        middle = statistics.fmean if kind == "cycle" else statistics.median
        return [middle(steps) for steps in self.times[kind]]

    def figure(self, kind: str) -> float:
        return statistics.median(self.in_rounds(kind))

    def profile(self) -> list[float]:
        """Of each step of a cycle the median over rounds; of a row without refreshes, of its plain block."""
        return [statistics.median(step) for step in zip(*self.times.get("cycle", self.times["plain"]))]

    def __str__(self) -> str:
        steps = self.profile() if "plain" in self.times else []
        cells = [
            f"{self.figure('plain'):9.1f}" if steps else "",
            *((f"{statistics.fmean(steps):9.1f}", f"{max(steps):9.1f}") if self.calls else ("", "")),
            f"{self.figure('refresh'):9.1f}" if "refresh" in self.times else "",
            "" if math.isnan(self.bytes) else f"{self.bytes:7.1f}",
            *(("", "", "") if self.calls is None else (f"{count:g}" for count in self.calls)),
        ]
        return f"{self.name:20}" + "".join(cell.rjust(w) for cell, w in zip(cells, WIDTHS))


WIDTHS = (10, 10, 10, 10, 8, 8, 8, 8)
COLUMNS = ("plain", "mean", "worst", "refresh", "B/p", "aten", "median", "most")
HEAD = " " * 20 + "".join(name.rjust(w) for name, w in zip(COLUMNS, WIDTHS))


class Stepper:
    """An optimizer, or several that share the parameters, with parameters of its own."""

    def __init__(self, weights: Weights, optimizers: Any) -> None:
        self.weights = weights
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.ours = next((o for o in self.optimizers if isinstance(o, Shampoo)), None)
        for _ in range(EVERY):
            self.step()

    def step(self) -> float:
        """One step; its CPU milliseconds, without those of the gradients."""
        self.weights.next_gradients()
        return cpu(self.step_alone)

    def step_alone(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def cycle(self) -> list[float]:
        return [self.step() for _ in range(EVERY)]

    def plain(self) -> list[float]:
        """Steps without refreshes; a whole cycle of them, so that the next begins where the last one did."""
        with self.without_refreshes():
            return self.cycle()

    def refresh(self) -> list[float]:
        assert self.ours is not None
        return [cpu(self.ours.refresh)]

    @contextmanager
    def without_refreshes(self) -> Iterator[None]:
        if self.ours is None:
            yield
            return
        self.ours.refreshing = False
        try:
            yield
        finally:
            self.ours.refreshing = True

    def row(self, name: str, *, refreshes: bool = False) -> Row:
        blocks: dict[str, Callable[[], list[float]]] = {"plain": self.plain}
        if refreshes:
            blocks |= {"cycle": self.cycle, "refresh": self.refresh}
        return Row(name, blocks, self.state_bytes() / self.weights.numel, self.count_calls())

    def state_bytes(self) -> int:
        if self.ours is not None:
            return int(self.ours.state_bytes())
        values = (v for o in self.optimizers for state in o.state.values() for v in state.values())
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))

    def count_calls(self) -> tuple[int, float, int]:
        """Of a plain step; median and largest of the steps of a cycle."""
        with self.without_refreshes():
            plain = [self.counted() for _ in range(EVERY)]
        cycle = [self.counted() for _ in range(EVERY)]
        return plain[0], statistics.median(cycle), max(cycle)

    def counted(self) -> int:
        self.weights.next_gradients()
        with in_this_thread(), Calls() as calls:
            self.step_alone()
        return calls.count


def cpu(run: Callable[[], Any]) -> float:
    """CPU milliseconds of all threads."""
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e3


# -- counting


class Calls(TorchDispatchMode):
    """Counts the calls that reach aten."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def in_this_thread() -> Iterator[None]:
    """Workers run where they are called: dispatch modes and the profiler see one thread."""

    def submit(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done

    with patch.object(ThreadPoolExecutor, "submit", submit):
        yield


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes that torch's allocator handed out beyond what it held before, inside of kernels too."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with in_this_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# -- the step


def rows_of(shapes: Shapes, parts: Sequence[str]) -> list[Row]:
    """What takes turns on a set."""
    pool = gradient_pool(shapes)
    rows = [
        Stepper(weights := Weights(shapes, pool), adamw(weights, foreach=True)).row("AdamW foreach"),
        Stepper(weights := Weights(shapes, pool), adamw(weights, fused=True)).row("AdamW fused"),
    ]
    if {"shampoo", "bf16", "soap"} & set(parts):
        ours = Stepper(weights := Weights(shapes, pool), shampoo(weights))
        layout = list(ours.optimizers[0].layout)
        exact, stacks = Floor(layout, torch.float32), factors(layout)
        rows += [
            Row("floor fp32", {"plain": lambda: [cpu(exact.step) for _ in range(5)]}),
            Row("eigh of all", {"refresh": lambda: [cpu(lambda: [torch.linalg.eigh(s) for s in stacks])]}),
            ours.row("Shampoo", refreshes=True),
        ]
    if "bf16" in parts:
        half = Floor(layout, torch.bfloat16)
        rows.append(Row("floor bf16", {"plain": lambda: [cpu(half.step) for _ in range(5)]}))
        weights = Weights(shapes, pool)
        stepper = Stepper(weights, shampoo(weights, products="bfloat16"))
        rows.append(stepper.row("Shampoo bf16", refreshes=True))
    if "soap" in parts:
        stepper = Stepper(weights := Weights(shapes, pool), soap(weights))
        rows.append(stepper.row("SOAP", refreshes=True))
    if "muon" in parts:
        weights = Weights(shapes, pool, flat=True)
        rows.append(Stepper(weights, torch_muon(weights)).row("torch Muon bf16"))
        rows.append(Stepper(weights := Weights(shapes, pool), muon(weights)).row("Muon bf16"))
        rows.append(Stepper(weights := Weights(shapes, pool), muon(weights, None)).row("Muon fp32"))
    return rows


def step_table(shapes: Shapes, parts: Sequence[str], rounds: int) -> list[Bar]:
    """Time a set and print what was found."""
    rows = rows_of(shapes, parts)
    gc.collect()
    gc.disable()
    for number in range(rounds):
        for i in range(len(rows)):
            rows[(number + i) % len(rows)].take_turn()
    gc.enable()
    print(f"\n{shapes.name}, {shapes.numel:,} parameters, {rounds} rounds\n{HEAD}", *rows, sep="\n")
    found = ratios({row.name: row for row in rows})
    del rows
    if "shampoo" in parts:
        found += state_bars(shapes)
    print(*found, sep="\n", flush=True)
    return found


def ratios(rows: dict[str, Row]) -> list[Bar]:
    """The bars of the issue on time and calls, as far as their rows are there."""

    def within(ratio: Callable[..., float], *of: tuple[str, str]) -> float:
        return statistics.median(ratio(*figures) for figures in zip(*(rows[n].in_rounds(k) for n, k in of)))

    found = []
    for kind in ("fp32", "bf16"):
        name = "Shampoo" if kind == "fp32" else "Shampoo bf16"
        if name not in rows or f"floor {kind}" not in rows:
            continue
        plain, cycle, refresh = (name, "plain"), (name, "cycle"), (name, "refresh")
        floor, adam, eigh = (f"floor {kind}", "plain"), ("AdamW foreach", "plain"), ("eigh of all", "refresh")
        own, steps, calls = rows[name], rows[name].profile(), rows[name].calls
        allowed = 1.4 * rows[floor[0]].figure("plain") + 2 * rows[adam[0]].figure("plain")
        mean = own.figure("plain") + 1.2 * own.figure("refresh") / EVERY
        text = f"{name}: plain {own.figure('plain'):.0f} of 1.4 floor + 2 AdamW = {allowed:.0f}"
        found.append(Bar(text, within(lambda p, f, a: p / (1.4 * f + 2 * a), plain, floor, adam), 1))
        text = f"{name}: refresh {own.figure('refresh'):.0f} of eigh of all"
        found.append(Bar(text, within(lambda r, e: r / e, refresh, eigh), 0.8))
        text = f"{name}: mean {own.figure('cycle'):.0f} of plain + 1.2 refresh / {EVERY} = {mean:.0f}"
        found.append(Bar(text, within(lambda c, p, r: c / (p + 1.2 * r / EVERY), cycle, plain, refresh), 1))
        found.append(Bar(f"{name}: worst of median of a cycle", max(steps) / statistics.median(steps), 1.3))
        assert calls is not None
        found.append(Bar(f"{name}: aten calls, median of a cycle", calls[1], 150))
    if "SOAP" in rows:
        for kind, limit in (("plain", 1.5), ("cycle", 1.3)):
            ratio = within(lambda s, o: s / o, ("SOAP", kind), ("Shampoo", kind))
            found.append(Bar(f"SOAP: {'mean' if kind == 'cycle' else kind} of Shampoo's", ratio, limit))
    if "torch Muon bf16" in rows:
        ratio = within(lambda m, t: m / t, ("Muon bf16", "plain"), ("torch Muon bf16", "plain"))
        found.append(Bar("Muon: of torch.optim.Muon's", ratio, 0.7))
    return found


def state_bars(shapes: Shapes) -> list[Bar]:
    """Bytes of state per parameter after a first step and a refresh."""

    def kept(make: Callable[[Weights], Any]) -> float:
        weights = Weights(shapes, pool)
        weights.next_gradients()
        optimizer = make(weights)
        optimizer.step()
        optimizer.refresh()
        return int(optimizer.state_bytes()) / weights.numel

    pool = gradient_pool(shapes, sets=1)
    print(f"  state with both sides of every matrix: {kept(two_sided):.1f} bytes per parameter")
    return [
        Bar("Shampoo: bytes of state per parameter", kept(shampoo), 30),
        Bar("... with bf16 factors and roots", kept(lambda w: shampoo(w, storage="bfloat16")), 20),
    ]


# -- memory


def memory_table(shapes: Shapes, parts: Sequence[str]) -> list[Bar]:
    """Extra memory in the step, of the gradient bytes of the largest bucket."""
    pool = gradient_pool(shapes)
    makes: dict[str, Callable[[Weights], Any]] = {
        "Shampoo": shampoo,
        "SOAP": soap,
        "Muon": lambda w: muon(w, None),
    }
    found = []
    for name, make in makes.items():
        if name.lower() not in parts:
            continue
        stepper = Stepper(weights := Weights(shapes, pool), make(weights))
        sizes: dict[Any, int] = {}
        for region in stepper.optimizers[0].layout:
            bucket = (region.dims, region.sides, region.direction)
            sizes[bucket] = sizes.get(bucket, 0) + 4 * region.numel
        largest = max(sizes.values())
        peaks = {}
        for kind in ("plain", "cycle"):
            peaks[kind] = 0
            for _ in range(EVERY):
                weights.next_gradients()
                if kind == "plain":
                    with stepper.without_refreshes():
                        peak = peak_bytes(stepper.step_alone)
                else:
                    peak = peak_bytes(stepper.step_alone)
                peaks[kind] = max(peaks[kind], peak)
        for kind, peak in peaks.items():
            label = "a plain step" if kind == "plain" else "any step of a cycle"
            text = f"{name}, {label}: {peak / 1e6:.1f} MB, of a bucket of {largest / 1e6:.1f} MB"
            found.append(Bar(text, peak / largest, 2.2))
    print(
        f"\nextra memory, {shapes.name}: most that the allocator holds within a step beyond what it held before,"
    )
    print("one matrix of a refresh at a time (workers hold one each)", *found, sep="\n", flush=True)
    return found


# -- growth


def linear_table(quick: bool) -> list[Bar]:
    """Time against parameters: equal matrices in blocks of 256."""
    print("\ngrowth, matrices of 1024x1024 in blocks of 256: CPU ms, and ns for each parameter")
    print(f"{'parameters':>12} {'AdamW foreach':>18} {'plain':>18} {'refresh of all':>18}")
    points = []
    for count in (1, 4, 16) if quick else (1, 4, 16, 64, 191):
        shapes = square_matrices(count)
        pool = gradient_pool(shapes, sets=1)
        weights = Weights(shapes, pool)
        adam = adamw(weights, foreach=True)[0]
        weights.next_gradients()
        adam.step()
        times = [min(cpu(adam.step) for _ in range(3))]
        del adam
        ours = shampoo(weights, block=256)
        ours.refreshing = False
        ours.step()
        times += [min(cpu(ours.step) for _ in range(3)), cpu(ours.refresh)]
        points.append((shapes.numel, *times))
        cells = "".join(f"{ms:10.1f} {ms * 1e6 / shapes.numel:7.1f}" for ms in times)
        print(f"{shapes.numel:12,} {cells}", flush=True)
        del ours, weights, pool
    found = [
        Bar(f"exponent of {name} time against parameters", slope([(p[0], p[i]) for p in points]), 1.1)
        for name, i in (("plain", 2), ("refresh", 3))
    ]
    print(*found, sep="\n", flush=True)
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through the logarithms."""
    return statistics.linear_regression(
        [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    ).slope


# -- on a GPU


def gpu_table(rounds: int) -> None:
    """Step time, kernels and share of the roofline of the products, on the shapes of GPT-2 124M."""
    torch.backends.cuda.matmul.allow_tf32 = False
    peaks = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    print(
        f"\n{GPT2.name}, {GPT2.numel:,} parameters, {torch.cuda.get_device_name()}; ms between events, median"
    )
    print(
        "roofline: the products' FLOPs at the rate of a product of 8192x8192 in the same type, here TFLOP/s"
    )
    print(", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in peaks.items()))
    print(
        f"{'':16} {'plain':>9} {'mean':>9} {'worst':>9} {'kernels':>9} {'in cycle':>9} {'roofline':>9} {'extra MB':>9}"
    )
    pool = gradient_pool(GPT2, sets=2, device="cuda")
    makes: dict[str, tuple[Callable[[Weights], Any], str]] = {
        "AdamW fused": (lambda w: adamw(w, fused=True), ""),
        "AdamW foreach": (lambda w: adamw(w, foreach=True), ""),
        "Shampoo": (shampoo, "float32"),
        "Shampoo bf16": (lambda w: shampoo(w, products="bfloat16"), "bfloat16"),
        "SOAP": (soap, "float32"),
        "SOAP bf16": (lambda w: soap(w, products="bfloat16"), "bfloat16"),
        "torch Muon bf16": (torch_muon, "bfloat16"),
        "Muon bf16": (muon, "bfloat16"),
    }
    for name, (make, products) in makes.items():
        stepper = Stepper(weights := Weights(GPT2, pool), make(weights))
        with stepper.without_refreshes():
            plain = statistics.median(gpu_times(stepper, rounds * EVERY))
            kernels = count_kernels(stepper, 1)
            extra = peak_bytes(stepper.step_alone, "cuda")
        cycles = [gpu_times(stepper, EVERY) for _ in range(rounds)]
        steps = [statistics.median(step) for step in zip(*cycles)]
        share = ""
        if stepper.ours is not None:
            share = f"{flops(list(stepper.ours.layout)) / peaks[products] * 1e3 / plain:9.1%}"
        print(
            f"{name:16} {plain:9.2f} {statistics.fmean(steps):9.2f} {max(steps):9.2f} {kernels:9.0f} "
            f"{count_kernels(stepper, EVERY):9.0f} {share:>9} {extra / 1e6:9.0f}",
            flush=True,
        )
        del stepper, weights


def gpu_times(stepper: Stepper, count: int) -> list[float]:
    """Milliseconds of each step between events, the host running ahead as it does in training."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        stepper.weights.next_gradients()
        begin.record()
        stepper.step_alone()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def count_kernels(stepper: Stepper, steps: int) -> float:
    """Kernels, copies and fills that reach the device in a step, on average."""
    stepper.weights.next_gradients()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            stepper.step_alone()
        torch.cuda.synchronize()
    events = profiler.events() or []
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events) / steps


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a large product."""
    a = torch.randn(size, size, device="cuda").to(dtype)
    a @ a
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (begin.elapsed_time(end) / 1e3)


# -- the report


def machine() -> str:
    halves = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()}
    extras = [name for name, there in halves.items() if there] or ["no products in bf16"]
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {', '.join(extras)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(SETS), help="of parameters, between commas")
    parser.add_argument("--only", default=",".join(PARTS), help="optimizers, between commas")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--memory", action="store_true", help="extra memory in the step instead")
    parser.add_argument("--linear", action="store_true", help="growth from 1 M to 200 M parameters instead")
    parser.add_argument("--gpu", action="store_true", help="step time and kernels on a GPU instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    sets, parts = options.sets.split(","), options.only.split(",")
    unknown = [name for name in sets if name not in SETS] + [name for name in parts if name not in PARTS]
    if unknown:
        parser.error(
            f"unknown: {', '.join(unknown)}; sets are {', '.join(SETS)}, optimizers {', '.join(PARTS)}"
        )
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu wants a GPU that torch can use, and there is none")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    bars: list[Bar] = []
    print(machine())
    if options.gpu:
        gpu_table(rounds)
    if options.linear:
        bars += linear_table(options.quick)
    if options.memory:
        bars += [bar for name in sets for bar in memory_table(SETS[name], parts)]
    if not (options.gpu or options.linear or options.memory):
        print(NOTE)
        bars += [bar for name in sets for bar in step_table(SETS[name], parts, rounds)]
    missed = sum(not bar.met for bar in bars)
    print(f"\n{len(bars) - missed} of {len(bars)} bars met" if bars else "")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
