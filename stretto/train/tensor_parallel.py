"""Tensor parallelism by roles: attention is cut by heads, MLPs by inner units, all else is the same on each rank.

Shoeybi et al. 2019, arXiv:1909.08053, on torch's ColwiseParallel and RowwiseParallel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from stretto.models.roles import nothing_found, roles


class Pair(NamedTuple):
    """Layers that are cut together: each rank has some outputs of the first ones, and those inputs of the last."""

    first: tuple[nn.Module, ...]
    last: nn.Module


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, blocks: Sequence[nn.Module]) -> None:
    """Cut the layers that roles know, in place; every parameter becomes a DTensor on this 1-D mesh.

    Attention needs separate projections for queries, keys and values; a fused one stays whole, and so does a
    part that surgery changed, as by taps on its projections. Every rank gives the same model, and no rank sends
    anything. Dropout inside of cut layers draws for its own units, so not as one process does.
    Raises ValueError for models of no known family, and for heads or inner units that cannot be shared equally.
    """
    pairs = list(_pairs(model, mesh.size()))
    names = {module: name for name, module in model.named_modules()}
    plan: dict[str, ParallelStyle] = {names[layer]: Columns() for pair in pairs for layer in pair.first}
    plan |= {names[pair.last]: Rows() for pair in pairs}
    parallelize_module(model, mesh, plan)
    for part in (*blocks, model):
        parallelize_module(part, mesh, Replicated())


WAY_OUT = 'give Execution(tensor=) a divisor, or use parallel="fsdp"'


def _pairs(model: nn.Module, ranks: int) -> Iterator[Pair]:
    parts = roles(model)
    if not parts.attentions:
        raise ValueError(f'{nothing_found("tensor parallelism", "attention", model)}; use parallel="fsdp"')
    for attention in parts.attentions:
        pair = Pair((attention.query.layer, attention.key.layer, attention.value.layer), attention.output)
        if attention.query.parts == 1 and _is_as_built(attention.module) and _are_plain(pair):
            for section in (attention.query, attention.key):
                _check(section.heads, f"{section.name} heads", ranks)
            yield pair
    inner = [Pair((mlp.input.module,), mlp.output.module) for mlp in parts.mlps]
    inner += [Pair((mlp.gate.module, mlp.input.module), mlp.output.module) for mlp in parts.gated_mlps]
    for pair in inner:
        if _are_plain(pair):
            _check(_inputs(pair.last), "inner units", ranks)
            yield pair


def _check(count: int, what: str, ranks: int) -> None:
    if count % ranks:
        raise ValueError(
            f"{count} {what} cannot be shared equally by {ranks} tensor-parallel ranks; {WAY_OUT}"
        )


def _is_as_built(attention: nn.Module) -> bool:
    """Whether nothing is attached that may count heads: only torch's layers and those of its own file."""
    files = {type(module).__module__ for module in attention.modules()} - {type(attention).__module__}
    return all(file.startswith("torch.nn") for file in files) and all(map(_is_free, attention.modules()))


def _are_plain(pair: Pair) -> bool:
    layers: tuple[nn.Module, ...] = (*pair.first, pair.last)
    return all((type(layer) is nn.Linear or _is_conv1d(layer)) and _is_free(layer) for layer in layers)


def _is_free(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's, a Linear that holds its weight transposed."""
    return type(layer).__module__ == "transformers.pytorch_utils" and type(layer).__name__ == "Conv1D"


def _input_dim(layer: nn.Module) -> int:
    return 0 if _is_conv1d(layer) else 1


def _inputs(layer: Any) -> int:
    return layer.weight.shape[_input_dim(layer)]


# -- styles


class Columns(ColwiseParallel):
    """torch's ColwiseParallel, for Hugging Face's Conv1D too: each rank has some outputs."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return _cut(self, module, mesh, 1 - _input_dim(module), Shard(0))


class Rows(RowwiseParallel):
    """torch's RowwiseParallel, for Hugging Face's Conv1D too: each rank has some inputs."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        self.desired_input_layouts = (Shard(-1),)
        return _cut(self, module, mesh, _input_dim(module), Replicate())


def _cut(style: Any, module: nn.Module, mesh: DeviceMesh, dim: int, bias: Placement) -> nn.Module:
    def partition(name: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        for key, p in list(layer._parameters.items()):
            if p is not None:
                layer._parameters[key] = _lay(p, mesh, Shard(dim) if key == "weight" else bias)

    before = functools.partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts)
    after = functools.partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
    return distribute_module(module, mesh, partition, before, after)


def _lay(p: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None), p.requires_grad)


class Replicated(ParallelStyle):
    """Parameters that no other style took are the same on each rank, and plain tensors within the forward.

    So that no layer has to know DTensors, while optimizers see all parameters as DTensors of one mesh. The
    gradients are equal on each rank, since activations are.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        laid: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        places: list[Place] = []
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and not isinstance(p, DTensor):
                    part._parameters[name] = laid.setdefault(id(p), _lay(p, mesh, Replicate()))
                    places.append((part._parameters, name))
        if places:
            module.forward = functools.partial(_run_local, places, module.forward)
        return module


Place = tuple[dict[str, Any], str]


def _run_local(places: list[Place], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call forward with the local tensors of these parameters in their places."""
    held = [parameters[name] for parameters, name in places]
    local = {id(p): p.to_local() for p in held}
    try:
        for (parameters, name), p in zip(places, held):
            parameters[name] = local[id(p)]
        return forward(*args, **kwargs)
    finally:
        for (parameters, name), p in zip(places, held):
            parameters[name] = p
