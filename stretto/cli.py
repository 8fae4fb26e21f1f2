"""The command line. Mistakes are answered in one line, with exit code 2; torch is imported when needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import tyro
from tyro.conf import Positional, arg

from stretto.commands.algoperf import AlgoPerf
from stretto.commands.quality import Quality
from stretto.commands.recommend import Recommend
from stretto.commands.report import Report
from stretto.commands.study import Study
from stretto.commands.tune import Tune

if TYPE_CHECKING:
    from stretto.measure.store import Run
    from stretto.methods._pages import Line
    from stretto.recipes import Arm
    from stretto.train.parallel import Execution
    from stretto.workloads import Workload


@dataclass(frozen=True)
class Race:
    """Race recipes to a workload's target, interleaved, each on its own clock."""

    workload: Positional[str]
    """Name of a workload: stdlib-gpt, digits."""
    recipes: Annotated[tuple[str, ...], arg(metavar="RECIPE ...")] = ()
    """Names, short forms such as "muon:lr=0.02, rotary_positions" and JSON files, each perhaps followed by
    "@ batch=8 budget=400" (examples); the first is the reference. Default: the workload's own."""
    seeds: int = 3
    """How many seeds."""
    control: Literal["same", "fresh", "off"] = "same"
    """Race the reference against itself: on the same seeds, on fresh ones, or not."""
    target: str | None = None
    """Which of the workload's targets. Default: its first."""
    evaluations: int | None = None
    """How many a run, evenly over its budget: more of them tell its time more finely. Default: the workload's."""
    smooth: int = 1
    """Hold the median of so many evaluations against the target, where single ones are noisy."""
    out: Path = Path("runs")
    """Folder of the runs; what is stored there is not trained again."""

    def run(self) -> int:
        """Race, print the table, write the report."""
        from stretto import recipes, workloads
        from stretto.core import nearest
        from stretto.measure import live, race
        from stretto.measure.store import Store, stopping_clearly

        workload = workloads.find(self.workload, self.evaluations, self.smooth)
        target = self.target or next(iter(workload.targets))
        if target not in workload.targets:
            raise ValueError(f"{workload.name} has no target {target!r}; {nearest(target, workload.targets)}")
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}; it must be 1 or more")
        if self.recipes:
            arms = [recipes.arm(text, workload.name, target) for text in self.recipes]
        else:
            arms = list(recipes.raced(workload.name, target).values())
        names = [arm.name for arm in arms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the recipe {twice!r} is named twice; the control is the reference raced twice")
        store, goal = Store(self.out), workload.targets[target]
        with live.shown(workload.metric, goal, workload.falls) as watch, stopping_clearly(self.out):
            race_id = race.race(
                workload,
                arms,
                store,
                target=target,
                seeds=range(self.seeds),
                control=self.control,
                watch=watch,
            )
        return _conclude(store, race_id)


@dataclass(frozen=True)
class Train:
    """Train a workload once, to the end of the budget; under torchrun, on all its ranks.

    An interrupted run goes on from its newest checkpoint, also on fewer ranks.
    """

    workload: Positional[str]
    """Name of a workload."""
    recipe: str = "baseline"
    """A name, a short form or a JSON file."""
    seed: int = 0
    """Seed of weights and data order."""
    out: Path = Path("runs")
    """Folder of the runs, the same for all ranks; an interrupted run goes on there."""
    parallel: Literal["none", "ddp", "fsdp", "hsdp", "tp", "tp+fsdp"] = "none"
    """What ranks share: copies of the model (ddp), its shards (fsdp), both (hsdp), its layers (tp)."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """What the model computes in."""
    compile: bool = False
    """Compile each block."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, for memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; cuda if there is one."""
    replicas: int | None = None
    """hsdp: copies of the model. Default: one a machine."""
    tensor: int | None = None
    """tp: ranks that share each layer. Default: all; with fsdp those of a machine."""
    meta: bool = False
    """Start sharded, a model larger than one rank can hold."""
    slices: int | None = None
    """Shares that a batch is cut into, a multiple of the ranks. Default: the ranks at the first start."""
    save_every: float = 300.0
    """Seconds between checkpoints."""
    timeout: float = 600.0
    """Seconds after which a rank that waits for the others gives up."""
    ranks: int | None = None
    """Start so many ranks on this machine: torchrun, with the environment that restarts need."""
    restarts: int = 0
    """With --ranks: how often to start again after a rank died."""

    def run(self) -> int:
        """Train and print where the run lies."""
        from stretto.train.launch import become_torchrun, is_rank, joined, leave

        if self.ranks is not None and not is_rank():
            if self.ranks < 1:
                raise ValueError(f"--ranks is {self.ranks}; it must be 1 or more")
            _, _, execution = self._parts()  # a mistake is told before ranks are started, and once
            execution.sides(self.ranks)
            become_torchrun(
                self.ranks, self.restarts, ["train", *_arguments(self, without=("ranks", "restarts"))]
            )
        with joined(self.device, self.timeout):
            code = self._train()
        if is_rank():
            leave(code)
        return code

    def _parts(self) -> tuple[Workload, Arm, Execution]:
        from stretto import recipes, workloads
        from stretto.train.parallel import Execution

        workload = workloads.find(self.workload)
        arm = recipes.arm(self.recipe, workload.name, next(iter(workload.targets)))
        execution = Execution(
            self.parallel, self.precision, self.compile, self.checkpointing, self.device, self.replicas,
            self.tensor, self.meta,
        )  # fmt: skip
        return workload, arm, execution

    def _train(self) -> int:
        from stretto.measure import live, single
        from stretto.measure.store import stopping_clearly
        from stretto.train.launch import rank

        workload, arm, execution = self._parts()
        shown = live.shown if rank() == 0 else live.hidden
        with shown(workload.metric, None, workload.falls) as watch, stopping_clearly(self.out):
            run = single.train(
                workload,
                arm,
                self.out,
                execution=execution,
                seed=self.seed,
                slices=self.slices,
                save_every=self.save_every,
                watch=watch,
            )
        if rank() == 0:
            print(_last_words(run, workload.metric))
        return 130 if run.record["state"] == "interrupted" else 0


@dataclass(frozen=True)
class Methods:
    """The catalogue of methods, the card of one, or what it changes in a model."""

    name: Annotated[Positional[str | None], arg(metavar="[NAME]")] = None
    """A method, or a slot such as optimizer; with --model also a short form such as "mixup:alpha=0.4"."""
    model: Annotated[str | None, arg(metavar="SPEC")] = None
    """What it changes here: torchvision:NAME, timm:NAME, hf:TYPE, stretto:gpt or package.module:callable."""
    brief: bool = False
    """One line a method."""
    markdown: bool = False
    """The catalogue as the page docs/methods.md."""

    def run(self) -> int:
        """Print the catalogue, the card, or the changes: exit code 1 where there is nothing to change."""
        from stretto import methods
        from stretto.core import nearest
        from stretto.methods import _cards, _pages

        slots = _cards.slots()
        if self.model is not None:
            return self._changes()
        if self.markdown:
            print(_pages.markdown(methods.cards(), slots), end="")
        elif self.name is None or self.name in slots:
            chosen = slots if self.name is None else {self.name: slots[self.name]}
            cards = [card for card in methods.cards() if card.slot in chosen]
            if not cards:
                used = {card.slot for card in methods.cards()}
                raise ValueError(f"no method has its main place in {self.name}; {nearest('', used)}")
            _show(_pages.listing(cards, chosen, self.brief))
            count = "1 method" if len(cards) == 1 else f"{len(cards)} methods"
            print(f"{count}. All of one: stretto methods NAME. On a model: --model torchvision:resnet50")
        else:
            _show(_pages.page(_cards.card(methods.find(self.name))))
        return 0

    def _changes(self) -> int:
        from stretto import methods
        from stretto.methods import _cards, _changes, _pages
        from stretto.models import named

        if self.name is None:
            raise ValueError("--model wants a method to look at: stretto methods NAME --model ...")
        assert self.model is not None
        recipe, spec = methods.parse(self.name), self.model
        sys.path.insert(0, os.getcwd())  # where the user's own module may lie
        named.check(spec)
        if len(recipe.methods) == 1:
            _show(_pages.page(_cards.card(type(recipe.methods[0]))))
            print()
        try:
            seen = _changes.look(recipe, lambda: named.build(spec), named.sample)
        except ValueError as error:
            print(f"in {spec}: {error}")
            return 1
        _show(_pages.effects(recipe, spec, seen))
        return 0


@dataclass(frozen=True)
class Doctor:
    """What is found here: torch, devices, extras, data."""

    data: Path | None = None
    """Folder of data sets. Default: the environment's STRETTO_DATA."""

    def run(self) -> int:
        """Print the findings."""
        from stretto.doctor import advice, findings

        found = findings(self.data)
        for what, text in found:
            print(f"{what:22} {text}")
        if told := advice(found):
            print(f"\n{told}", end="")
        return 0


class Command(Protocol):
    """What the command line makes of its arguments."""

    def run(self) -> int:
        """Do it; the exit code."""


COMMANDS: dict[str, Callable[..., Command]] = {
    "race": Race, "train": Train, "study": Study, "quality": Quality, "tune": Tune, "recommend": Recommend,
    "report": Report, "algoperf": AlgoPerf, "methods": Methods, "doctor": Doctor,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 for a mistake in what was asked, 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(given[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
        sys.exit(_mistake(f"there is no command {given[0]!r}; {hint}"))
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="stretto",
        args=given,
        description="Train neural networks faster, and measure by how much.",
    )
    try:
        if os.environ.get("STRETTO_TORCHVISION_SHIM"):
            from stretto.doctor import prepare_torchvision

            prepare_torchvision()
        sys.exit(command.run())
    except ValueError as error:
        if os.environ.get("STRETTO_TRACEBACK"):
            raise
        sys.exit(_mistake(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


STYLES = {
    "heading": ("bold cyan", "cyan"),
    "title": ("bold", "bold"),
    "name": ("bold", ""),
    "text": ("", ""),
    "detail": ("dim", "dim"),
}
WIDEST = 120  # columns; longer rows are hard to read


def _mistake(text: str) -> int:
    print(f"stretto: {text}", file=sys.stderr)
    return 2


def _show(lines: Iterable[Line]) -> None:
    """Print lines: in columns and styles on a terminal, else plain, one row a line."""
    from rich.console import Console
    from rich.text import Text

    from stretto.methods import _pages

    console = Console(highlight=False)
    if not console.is_terminal:
        for head, text, _ in _pages.render(lines):
            print((head + text).rstrip())
        return
    for head, text, style in _pages.render(lines, min(console.width, WIDEST)):
        of_head, of_text = STYLES[style]
        console.print(Text.assemble((head, of_head), (text, of_text)), soft_wrap=True)


def _arguments(command: Train, without: tuple[str, ...]) -> list[str]:
    """What to type for this command."""
    given = [
        (field.name.replace("_", "-"), getattr(command, field.name))
        for field in fields(command)
        if field.name not in (*without, "workload") and getattr(command, field.name) != field.default
    ]
    options = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given)
    return [command.workload, *chain.from_iterable(options)]


def _last_words(run: Run, metric: str) -> str:
    """How a run ended, and where it lies."""
    rows, error = run.rows(), run.record["error"]
    last = f", {metric} {rows[-1][metric]:.4f} at step {rows[-1]['step']}" if rows else ""
    text = f"{run.record['state']}{f' ({error})' if error else ''}{last}; the run lies in {run.path}"
    if run.record["state"] == "interrupted":
        text += "\nthe same command goes on from its newest checkpoint"
    return text


def _conclude(store: object, race_id: str) -> int:
    """Print what a race showed and where its report lies."""
    from rich.console import Console

    from stretto.measure import report, summary
    from stretto.measure.store import Store

    assert isinstance(store, Store)
    race = store.race(race_id)
    found = summary.summarise(store, race)
    console = Console()
    if console.is_terminal:
        console.print(summary.table(found))
    else:
        print(summary.plain(found))
    for _, sentence in found.answers:
        print(sentence)
    for warning in found.warnings:
        print(f"note: {warning}")
    path = report.write(store, race_id, store.root / "races" / f"{race_id}.html")
    print(f"report: {path}")
    if race.get("interrupted"):
        print("interrupted: everything measured so far is kept, and the same command goes on from there")
        return 130
    return 0
