"""Tiny worlds in which every method of the catalogue is run, and the settings that let it act in six steps.

A new method enters every law by standing in the catalogue: with its defaults and in all worlds, unless
SETTINGS or WORKS_IN say otherwise.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto import methods
from stretto.core import Batch, Method, Mixed, OptimizerMethod, Recipe, map_data, stable_hash
from stretto.models.gpt import GPT, next_token_loss
from stretto.models.resnet import ResNet
from stretto.plan import Plan
from stretto.update import Updater, run_model

STEPS = 6
EXAMPLES = 24


@dataclass(frozen=True)
class World:
    name: str
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    inputs: Any  # a tensor, or a dict of tensors
    targets: Tensor
    run: Callable[[nn.Module, Any], Tensor] = run_model
    kind: str = ""  # "text" or "images", of a model that somebody else wrote

    def batch(self, index: Any, dtype: torch.dtype = torch.float32) -> Batch:
        """These examples, images in this type."""
        chosen = map_data(lambda t: t[index], self.inputs)
        inputs = map_data(lambda t: t.to(dtype) if t.is_floating_point() else t, chosen)
        return Batch(inputs, self.targets[index])

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights each time, all of them random: what is zero at first could hide a fault."""
        model = self.build().to(dtype)
        scramble_weights(model)
        return model


def scramble_weights(model: nn.Module) -> None:
    """Values that depend on the name of a parameter alone."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(stable_hash("weights", name))
            draws = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(draws * 0.3 + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0))


def _text() -> World:
    tokens = torch.randint(0, 17, (EXAMPLES, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[::5, :4] = -100  # some tokens do not count, unevenly
    return World("text", lambda: GPT(17, 16, 16, 3, 2), next_token_loss, tokens[:, :-1], targets)


def _images() -> World:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(EXAMPLES, 1, 6, 6, generator=generator)
    targets = torch.randint(0, 3, (EXAMPLES,), generator=generator)

    def build() -> nn.Module:
        model = ResNet(1, 3, (4, 8))
        model.head = nn.Sequential(nn.Dropout(0.0), model.head)
        return model

    return World("images", build, F.cross_entropy, images, targets)


WORLDS = {world.name: world for world in (_text(), _images())}

SETTINGS: dict[str, dict[str, Any]] = {
    "blur_pool": {"min_channels": 4},
    "stochastic_depth": {"drop": 0.5},
    "layer_freezing": {"start": 0.2},
    "factorize": {"min_size": 8},
    "gyro_dropout": {"p": 0.3, "sigma": 4, "tau": 2},
    "ghost_batch_norm": {"size": 2},
    "squeeze_excite": {"min_channels": 4},
    "float8": {"emulate": True},
    "logit_soft_cap": {"cap": 2.0},
    "sliding_window": {"window": 5},
    "sam": {"every": 2},
    "selective_backprop": {"start": 0.0, "interrupt": 4, "scale": 1.0},
    "z_loss": {"coefficient": 0.1},
    "either": {"first": methods.MixUp(0.3), "second": methods.MixUp(3.0)},
    "ema": {"half_life": 0.3},
    "primal_averaging": {"half_life": 0.3},
    "ema_nesterov": {"half_life": 0.3},
    "lookahead": {"every": 2},
    "shampoo": {"every": 2, "block": 8},
    "soap": {"every": 2, "block": 8},
    "update_floor": {"floor": 10.0},  # above Adam's own steps from weights this small
    "swa": {"start": 0.3},
    "type_rates": {"embedding": 3.0, "head": 0.5, "batch_norm_bias": 64.0},
    "label_smoothing": {"smoothing": 0.2},
    "ngram_embeddings": {"rows": 64},
    "sequence_length_warmup": {"over": 0.7},
    "batch_size_warmup": {"over": 0.7, "start": 0.5, "levels": 3},
    "gradient_value_clipping": {"limit": 0.01},
    "gradient_clipping": {"norm": 0.5},
}
WORKS_IN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "blur_pool", "channels_last", "dirac_init", "ghost_batch_norm", "patch_whitening", "squeeze_excite",
            "weight_standardization",
        ),
        ("images",),
    ),
    **dict.fromkeys(("patch_dropout", "unpadding"), ()),  # in those of families.py
    "random_token_dropping": ("text",),
    "float8": ("text",),
    "low_precision_norm": ("text",),
    "factorize": ("images",),
    "gyro_dropout": ("images",),
    **dict.fromkeys(("dice", "fix_res", "test_time_augmentation"), ("images",)),
    **dict.fromkeys(
        (
            "alternating_flip", "aug_mix", "colout", "cutmix", "cutout", "progressive_resizing", "rand_augment",
        ),
        ("images",),
    ),
    "either": ("images",),
    "mixup": ("images",),
    "sequence_length_warmup": ("text",),
    **dict.fromkeys(
        (
            "alibi", "gated_linear_units", "residual_scalars", "token_smearing", "sliding_window",
            "document_packing",
            "rotary_positions", "squared_relu", "qk_norm", "short_convolution", "ngram_embeddings",
            "value_embeddings",
        ),
        ("text",),
    ),
}  # fmt: skip
COMPANY: dict[str, tuple[Method, ...]] = {"low_precision_norm": (methods.BFloat16(),)}  # without, it is idle
ANYWHERE = {"bfloat16"}  # whatever has a parameter will do
ROUNDING = {  # of losses
    "float8": 0.05,  # tensors share a scale, and so do all that are in a micro-batch
    "soap": 1e-3,  # where factors have no full rank, rounding chooses the basis of what is left
}
SHARES_ROWS = {
    "progressive_layer_drop",
    "stochastic_depth",
}  # so many of a micro-batch's rows pass a layer by
TAKES_COMPANY = {"cutmix", "mixup", "either"}  # whose rows depend on who shares the slice


def example(name: str) -> Method:
    return methods.CATALOGUE[name](**SETTINGS.get(name, {}))


def worlds_of(*names: str) -> list[World]:
    """Where all these methods work."""
    return [w for w in WORLDS.values() if all(w.name in WORKS_IN.get(name, WORLDS) for name in names)]


def conflict(first: str, second: str) -> ValueError | None:
    try:
        Recipe(example(first), example(second))
    except ValueError as error:
        return error
    return None


NAMES = sorted(methods.CATALOGUE)
PAIRS = list(combinations(NAMES, 2))
ALLOWED = [pair for pair in PAIRS if conflict(*pair) is None]
REFUSED = [pair for pair in PAIRS if conflict(*pair) is not None]
CASES = [(name, world.name) for name in NAMES for world in worlds_of(name)]
PAIR_CASES = [(*pair, world.name) for pair in ALLOWED for world in worlds_of(*pair)]


def recipe_of(*names: str) -> Recipe:
    """These methods, in this order, with the company they need, and an optimizer if they have none."""
    return _complete([example(name) for name in names], names)


def recipe_without(name: str) -> Recipe:
    """The recipe of a method, without it."""
    return _complete([], (name,))


def _complete(chosen: list[Method], names: tuple[str, ...]) -> Recipe:
    held = {method.name for method in chosen}
    chosen += [m for name in names for m in COMPANY.get(name, ()) if m.name not in held]
    has_optimizer = any(isinstance(method, OptimizerMethod) for method in chosen)
    return Recipe(*chosen, *([] if has_optimizer else [methods.AdamW(lr=1e-2)]))


@dataclass
class Trace:
    """What a run left: the losses of its steps, the batches as the model saw them, its Updater."""

    update: Updater
    plan: Plan
    losses: list[float] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        return self.update.state_dict()


def train(
    world: World,
    recipe: Recipe,
    until: int | None = None,
    state: dict[str, Any] | None = None,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    microbatch: int | None = None,
    slices: int | None = None,
    seed: int = 3,
    steps: int = STEPS,
) -> Trace:
    """From step 0, or from a state, to the end of the run or to just before step `until`."""
    plan = Plan(recipe, EXAMPLES, batch, steps=steps, seed=seed, slices=slices)
    model = recipe.model(world.model(dtype), seed)
    update = Updater(recipe, model, world.loss, plan, forward=world.run, microbatch=microbatch)
    if state is not None:
        update.load_state_dict(state)
        plan.resume(update.step)
    trace = Trace(update, plan)
    for at in plan:
        if at.step == until:
            break
        total, parts = 0.0, []
        for part in update(world.batch(plan.indices(at), dtype), at):
            loss = update.loss(world.run(model, part.inputs), part.targets)
            loss.backward()
            if update.round == 0:  # a later pass sees the same parts again
                total, parts = total + loss.item(), [*parts, part]
        trace.losses.append(total)
        trace.batches.append(joined(parts))
    return trace


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def joined(parts: list[Batch]) -> Batch:
    """The parts of one step, one after the other."""

    def join(pieces: list[Any]) -> Any:
        if isinstance(pieces[0], Mixed):
            return Mixed(*map(join, zip(*pieces)))
        if isinstance(pieces[0], dict):
            return {key: join([piece[key] for piece in pieces]) for key in pieces[0]}
        return torch.cat(pieces)

    return Batch(*(join([part[i] for part in parts]) for i in range(4)))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, through dicts, lists and tuples."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where} differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a} != {b}"
