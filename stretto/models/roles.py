"""Which module of a model is what: one table per model family, so that a method is written once.

A family is a function from a model to its `Roles`; `roles(model)` finds it by the model's class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stretto.models.gpt import GPT
from stretto.models.resnet import ResNet


@dataclass(frozen=True)
class AttentionRoles:
    """The parts of one attention layer; projections give (N, T, heads * size)."""

    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    heads: int


@dataclass(frozen=True)
class Roles:
    """The parts of a model that methods ask for."""

    tokens: nn.Embedding | None = None
    positions: tuple[nn.Module, str] | None = None  # the module that holds learned positions, and their name
    attentions: tuple[AttentionRoles, ...] = ()
    activations: tuple[tuple[nn.Module, str], ...] = ()  # of MLPs: the module that holds one, and its name
    residual_ends: tuple[nn.Module, ...] = ()  # the last layer of each residual branch: its weight scales it
    heads: tuple[nn.Module, ...] = ()  # the layers that give the outputs


def _gpt(model: GPT) -> Roles:
    blocks: list[Any] = list(model.blocks)
    attentions = [block.attention for block in blocks]
    return Roles(
        tokens=model.tokens,
        positions=(model, "positions") if model.positions is not None else None,
        attentions=tuple(AttentionRoles(a, a.query, a.key, a.value, a.heads) for a in attentions),
        activations=tuple((block.mlp, "activation") for block in blocks),
        residual_ends=tuple(end for block in blocks for end in (block.attention.output, block.mlp.output)),
        heads=(model.head,),
    )


def _resnet(model: ResNet) -> Roles:
    blocks: list[Any] = list(model.blocks)
    return Roles(residual_ends=tuple(block.norm2 for block in blocks), heads=(model.head,))


FAMILIES: dict[type[nn.Module], Callable[[Any], Roles]] = {GPT: _gpt, ResNet: _resnet}


def roles(model: nn.Module) -> Roles:
    """The parts of this model; a model of no known family has none."""
    for family, read in FAMILIES.items():
        if isinstance(model, family):
            return read(model)
    return Roles()


def nothing_found(method: str, what: str, model: nn.Module) -> ValueError:
    """The error of a method that found nothing to change."""
    families = ", ".join(family.__name__ for family in FAMILIES)
    return ValueError(
        f"{method} looks for {what} and found none in {type(model).__name__}; it knows {families}"
    )


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Each parameter's kind: "embedding", "head", "matrix" (two or more dimensions) or "vector".

    Where the family is unknown, the head is the last Linear.
    """
    heads: tuple[nn.Module, ...] = roles(model).heads
    if not heads:
        heads = tuple(module for module in model.modules() if isinstance(module, nn.Linear))[-1:]
    kinds: dict[str, str] = {}
    special = {id(m.weight): "embedding" for m in model.modules() if isinstance(m, nn.Embedding)}
    special |= {id(head.weight): "head" for head in heads}
    for name, parameter in model.named_parameters():
        plain = "matrix" if parameter.squeeze().ndim >= 2 else "vector"
        kinds[name] = special.get(id(parameter), plain) if parameter.ndim >= 2 else plain
    return kinds


def replace_child(parent: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of a child, with its training flag, device and dtype."""
    old = getattr(parent, name)
    like = next((p for p in parent.parameters() if p.is_floating_point()), None)
    if like is not None:
        new.to(like.device, like.dtype)
    new.train(old.training if isinstance(old, nn.Module) else parent.training)
    setattr(parent, name, new)


# What can be attached to a projection, in the order in which it runs on the projection's output.
TAPS = ("convolution", "norm", "rotation")


def tap(projection: nn.Linear, heads: int, stage: str, layer: nn.Module) -> None:
    """Run `layer` on a projection's output, seen as (N, T, heads, size); stages run in the order of TAPS.

    The projection's own keys, hooks and class stay as they are; the layer's keys are `taps.<stage>.…`.
    """
    if not hasattr(projection, "taps"):
        projection.taps = Taps(heads).train(projection.training)
        projection.register_forward_hook(_run_taps)
    layer.to(projection.weight.device, projection.weight.dtype).train(projection.training)
    taps: Any = projection.taps
    taps.put(stage, layer)


class Taps(nn.Module):
    """The layers attached to one projection."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def put(self, stage: str, layer: nn.Module) -> None:
        """Attach a layer at a free stage."""
        assert stage in TAPS and stage not in self._modules, stage
        self.add_module(stage, layer)

    def layers(self) -> Iterator[nn.Module]:
        """The attached layers in running order."""
        return (self._modules[stage] for stage in TAPS if stage in self._modules)  # type: ignore[misc]

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Run all of them."""
        x_NTHd = x_NTD.unflatten(-1, (self.heads, -1))
        for layer in self.layers():
            x_NTHd = layer(x_NTHd)
        return x_NTHd.flatten(-2)


def _run_taps(projection: Any, inputs: Any, output: Tensor) -> Tensor:
    return projection.taps(output)
