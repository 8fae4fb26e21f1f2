"""Parameters by kind: what optimizers with a rule of their own for matrices share, and what wraps those alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from stretto.core import FactorsMethod, Group, OptimizerMethod, Phase
from stretto.methods._checks import decays
from stretto.models.roles import parameter_kinds, roles

TABLES = ("embedding", "head")  # kinds whose rows belong to tokens or classes


@dataclass(frozen=True)
class MatrixOptimizer(OptimizerMethod, FactorsMethod):
    """An optimizer with a rule of its own for matrices; vectors, norms and biases do not decay."""

    phases = (Phase.UPDATE, Phase.GROUP)

    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        """No decay on vectors."""
        return {} if decays(parameter) else {"weight_decay": 0.0}


def kinds_with_matrices(method: Any, model: nn.Module, instead: str) -> dict[str, str]:
    """Each parameter's kind. Raises ValueError where none is a hidden matrix, saying what to do instead."""
    kinds = parameter_kinds(model)
    if "matrix" not in kinds.values():
        raise ValueError(
            f"{type(method).__name__} looks for hidden matrices and found none in {type(model).__name__}; {instead}"
        )
    return kinds


def by_kind(
    groups: list[Group], kinds: dict[str, str], options: dict[str, dict[str, Any]], others: dict[str, Any]
) -> list[Group]:
    """The groups, each cut into the parameters of kinds that have options of their own, and the others."""
    cut: list[Group] = []
    for group in groups:
        named = list(zip(group["names"], group["params"]))
        for kind, theirs in [*options.items(), (None, others)]:
            pairs = [(n, p) for n, p in named if (kinds[n] if kinds[n] in options else None) == kind]
            if pairs:
                names, params = map(list, zip(*pairs))
                cut.append(group | theirs | {"names": names, "params": params})
    return cut


def with_tables(model: nn.Module, groups: list[Group], tables: dict[str, Any]) -> list[Group]:
    """The groups, with these options for embeddings and heads, and fused projections cut by their heads."""
    fused = {name: f"{parts} parts" for name, parts in heads_of_fused(model).items()}
    options = dict.fromkeys(TABLES, tables) | {
        kind: {"split": int(kind.split()[0])} for kind in fused.values()
    }
    return by_kind(groups, parameter_kinds(model) | fused, options, {})


def heads_of_fused(model: nn.Module) -> dict[str, int]:
    """The weights (parts * heads * size, D) of fused queries, keys and values: name -> parts * heads.

    Layers that hold them as (D, parts * heads * size), as GPT-2's, are passed over.
    """
    queries = (attention.query for attention in roles(model).attentions)
    parts = {
        id(query.layer.weight): query.parts * query.heads
        for query in queries
        if query.parts > 1 and isinstance(query.layer, nn.Linear)
    }
    return {name: parts[id(p)] for name, p in model.named_parameters() if id(p) in parts}


def without_tables(method: Any, hyperparameter: str, model: nn.Module, name: str) -> dict[str, float]:
    """A factor of 0 for embeddings and heads, which leaves them out. Raises ValueError without hidden matrices."""
    kinds = kinds_with_matrices(method, model, f"leave {type(method).__name__} out")
    return {hyperparameter: 0.0} if kinds[name] in TABLES else {}
