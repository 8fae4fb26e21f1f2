"""Losses: anybody's as per-example values, which targets count, and what the recipe's methods make of them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stretto.core import Loss, LossMethod, Mixed, Phase, Recipe
from stretto.timed import Clock

Valid = Callable[[Any], Tensor | None]  # targets -> bool, in the shape of the loss's values; None: all count


def compose(recipe: Recipe, base: Loss, valid: Valid, clock: Clock) -> tuple[Loss, Loss]:
    """The loss from the inside out: base, targets, mixture, penalties; and the base alone, for scores."""
    methods = recipe.of(LossMethod)
    names = " and ".join(type(method).__name__ for method in methods)
    loss = _needs_examples(base, names) if methods else base
    for method in methods:
        if Phase.BASE in method.phases:
            loss = method.loss(loss, clock)
    scores = mixture(_needs_examples(loss, "selecting examples"), valid)
    for method in methods:
        if Phase.TARGET in method.phases:
            loss = method.loss(loss, clock)
    loss = mixture(loss, valid)
    for method in methods:
        if Phase.PENALTY in method.phases:
            loss = method.loss(loss, clock)
    return loss, scores


def mixture(loss: Loss, valid: Valid) -> Loss:
    """share * loss(first) + (1 - share) * loss(second); where but one of both counts, that one's."""
    each = _needs_examples(loss, "mixing targets")

    def mixed(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(targets, Mixed):
            return loss(outputs, targets)
        first, second = each(outputs, targets.first), each(outputs, targets.second)
        share = _by_example(targets.share, first)
        counts, others = valid(targets.first), valid(targets.second)
        if counts is None or others is None:
            return share * first + (1 - share) * second
        own, other = share * counts, (1 - share) * others
        return (own * first + other * second) / (own + other).clamp(min=1e-12)

    return mixed


def how_much_counts(targets: Any, valid: Valid) -> Tensor | None:
    """How much each value of the loss counts, or None where each example counts the same."""
    if not isinstance(targets, Mixed):
        return valid(targets)
    first, second = valid(targets.first), valid(targets.second)
    if first is None or second is None:
        return None
    share = _by_example(targets.share, first)
    return share * first + (1 - share) * second


def per_example(loss: Loss) -> Loss:
    """A torch loss asked for one value an example; any other callable as it is."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        module: Any = copy.copy(loss)
        module.reduction = "none"
        return module
    try:
        takes_reduction = "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        takes_reduction = False
    return functools.partial(loss, **{"reduction": "none"}) if takes_reduction else loss


def plain_mean(loss: Loss) -> Loss | None:
    """Cross-entropy as torch averages it where all examples count alike: one kernel, a loop's own bits."""
    keywords = getattr(loss, "keywords", {})
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss if loss.weight is None and loss.reduction == "mean" else None
    function = loss.func if isinstance(loss, functools.partial) else loss
    plain = function is F.cross_entropy and not {"weight", "reduction", "size_average", "reduce"} & set(
        keywords
    )
    return loss if plain and not getattr(loss, "args", ()) else None


def default_valid(loss: Loss) -> Valid:
    """Which targets count: integer ones other than the loss's ignore_index (-100 where it has none)."""
    ignore = getattr(loss, "ignore_index", getattr(loss, "keywords", {}).get("ignore_index", -100))

    def valid(targets: Any) -> Tensor | None:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return None
        return targets != ignore

    return valid


def _needs_examples(loss: Loss, who: str) -> Loss:
    @functools.wraps(loss)
    def checked(outputs: Any, targets: Any, **options: Any) -> Tensor:
        values = loss(outputs, targets, **options)
        if values.ndim == 0:
            raise ValueError(
                f"{who} needs per-example losses, and this loss gives a scalar; write it to give (N,) values"
            )
        return values

    return checked


def _by_example(share: Tensor, like: Tensor) -> Tensor:
    return share.reshape(-1, *(1,) * (like.ndim - 1))
