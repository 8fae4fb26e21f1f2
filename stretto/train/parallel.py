"""How a run is spread over ranks and what it computes in: one visible order around torch's own parallelisms."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from stretto.core import nearest
from stretto.methods.bfloat16 import Autocast
from stretto.models.roles import roles

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Parallel = Literal["none", "ddp", "fsdp", "hsdp", "tp", "tp+fsdp"]
Precision = Literal["float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Execution:
    """How a run is executed. Alone, without a process group, nothing is shared out, whatever `parallel` says.

    Raises ValueError for unknown words, and for numbers that `parallel` has no use for.
    """

    parallel: Parallel = "none"
    precision: Precision = "float32"  # "float32": the type that the model was built in
    compile: bool = False
    checkpointing: bool = False  # activations of blocks are computed again in the backward pass
    device: Device = "auto"  # cuda where there is one
    replicas: int | None = None  # hsdp: copies of the model; None: one a machine
    tensor: int | None = None  # tp: ranks that share each layer; None: all, with fsdp those of a machine
    meta: bool = False  # start sharded, for models that are larger than a rank's memory

    def __post_init__(self) -> None:
        for name, words in (("parallel", Parallel), ("precision", Precision), ("device", Device)):
            if (word := getattr(self, name)) not in get_args(words):
                raise ValueError(f"{name} {word!r} is unknown; {nearest(str(word), get_args(words))}")
        for name, users in (("replicas", ("hsdp",)), ("tensor", ("tp", "tp+fsdp"))):
            if (count := getattr(self, name)) is not None and (count < 1 or self.parallel not in users):
                raise ValueError(
                    f"{name} is {count} with parallel={self.parallel!r}; it is 1 or more, and for "
                    f"{' or '.join(users)} alone"
                )
        if self.meta and self.parallel in ("none", "ddp"):
            raise ValueError(
                f"meta=True starts a model in shards, and with parallel={self.parallel!r} every rank holds all "
                "of it; use 'fsdp'"
            )

    @property
    def place(self) -> torch.device:
        """The device of this rank."""
        if self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def mesh(self) -> DeviceMesh | None:
        """The ranks by dims: "replicate", "shard", "dp", "tp", those that `parallel` asks for; None when alone.

        Raises ValueError on every rank where ranks are not in a process group, or not as many as the mesh has.
        """
        grouped = dist.is_available() and dist.is_initialized()
        ranks = dist.get_world_size() if grouped else int(os.environ.get("WORLD_SIZE", 1))
        sides = self.sides(ranks)
        if ranks > 1 and not grouped:
            raise ValueError(
                f"parallel={self.parallel!r} and WORLD_SIZE={ranks}, but there is no process group; call "
                "torch.distributed.init_process_group first"
            )
        if not grouped or not sides:
            return None
        from torch.distributed.device_mesh import init_device_mesh  # late, as in all of this file: it is slow

        return init_device_mesh(self.place.type, tuple(sides.values()), mesh_dim_names=tuple(sides))

    def sides(self, ranks: int) -> dict[str, int]:
        """The mesh's dims and their lengths, for so many ranks. Raises ValueError where it does not fit them."""
        machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        match self.parallel:
            case "none":
                if ranks > 1:
                    raise ValueError(
                        f"parallel='none' with {ranks} ranks, each of which would train a model of its own; "
                        "use 'ddp' or 'fsdp', or one process"
                    )
                return {}
            case "ddp":
                return {"replicate": ranks}
            case "fsdp":
                return {"shard": ranks}
            case "hsdp":
                replicas = self.replicas or ranks // machine
                _check_divides("replicas", replicas, ranks)
                return {"replicate": replicas, "shard": ranks // replicas}
            case "tp":
                if self.tensor not in (None, ranks):
                    raise ValueError(
                        f"tensor={self.tensor} with {ranks} ranks and parallel='tp', which takes all ranks; "
                        "use 'tp+fsdp' for several groups"
                    )
                return {"tp": ranks}
            case "tp+fsdp":
                tensor = self.tensor or machine
                _check_divides("tensor", tensor, ranks)
                return {"dp": ranks // tensor, "tp": tensor}


def _check_divides(name: str, count: int, ranks: int) -> None:
    if ranks % count:
        raise ValueError(f"{name}={count} does not divide the {ranks} ranks that there are; choose a divisor")


def start(
    make: Callable[[], nn.Module],
    execution: Execution,
    mesh: DeviceMesh | None,
    *,
    leaves_unused: bool = False,
) -> nn.Module:
    """make(), which builds the model and does surgery, parallelized; with `execution.meta` never whole on a rank."""
    spread = functools.partial(parallelize, execution=execution, mesh=mesh, leaves_unused=leaves_unused)
    if mesh is None or not execution.meta:
        return spread(make())
    from stretto.train.scattered import build_scattered

    return build_scattered(make, spread, execution.place)


def parallelize(
    model: nn.Module, execution: Execution, mesh: DeviceMesh | None, *, leaves_unused: bool = False
) -> nn.Module:
    """The model as `execution` runs it, after surgery: `recipe.model` comes first. Changed in place.

    All ranks call it, with the same model. Blocks are those that `roles` knows; of a model that it does not know,
    the whole is compiled, checkpointed and sharded as one. From the inside out: what is compiled is layers alone,
    what is computed again for the backward pass is what was computed, tensor parallelism included, and a block is
    gathered around both. leaves_unused: in some steps parameters get no gradient, for which DDP has to look.
    Raises ValueError for a model that cannot be cut as the mesh asks, and on every rank for models that differ.
    """
    if mesh is not None:
        check_alike(model)
    blocks = block_boundaries(model)
    if not any(p.is_meta for p in model.parameters()):
        model.to(execution.place)
    set_precision(model, execution, mesh)
    if execution.compile:
        compile_blocks(model, blocks)
    if mesh is not None and "tp" in _dims(mesh):
        cut_layers(model, mesh["tp"], blocks)
    if execution.checkpointing:
        checkpoint_blocks(model, blocks)
    if mesh is not None and execution.parallel == "ddp":
        return replicate(model, mesh, leaves_unused)
    if mesh is not None and execution.parallel != "tp":
        shard_blocks(model, blocks, mesh, execution)
    return model


def check_alike(model: nn.Module) -> None:
    """Raise ValueError on every rank where one has parameters of other names or shapes than rank 0 has."""
    mine = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    theirs: list[Any] = [mine]
    dist.broadcast_object_list(theirs, src=0)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _difference(theirs[0], mine))
    if told := [f"rank {rank} has {difference}" for rank, difference in enumerate(found) if difference]:
        more = f" (and {len(told) - 1} more ranks)" if len(told) > 1 else ""
        raise ValueError(f"ranks have different models: {told[0]}{more}; build the same one on each")


def _difference(first: list[tuple[str, Any]], mine: list[tuple[str, Any]]) -> str | None:
    """What the first parameter is that is not that of rank 0."""
    for theirs, own in itertools.zip_longest(first, mine):
        if theirs != own:
            known, has = (f"{pair[0]} {pair[1]}" if pair else "no more parameters" for pair in (theirs, own))
            return f"{has} where rank 0 has {known}"
    return None


def block_boundaries(model: nn.Module) -> list[nn.Module]:
    """The blocks that roles know, each once, outermost only, without those that share parameters with others."""
    blocks = list(dict.fromkeys(roles(model).blocks))
    nested = {inner for block in blocks for inner in block.modules() if inner is not block}
    blocks = [block for block in blocks if block not in nested]
    everyone = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return [block for block in blocks if not _shares(block, everyone)]


def _shares(block: nn.Module, everyone: Counter[int]) -> bool:
    """Whether a parameter of the block stands outside of it too."""
    mine = Counter(id(p) for module in block.modules() for p in module._parameters.values() if p is not None)
    return any(everyone[key] > count for key, count in mine.items())


def set_precision(model: nn.Module, execution: Execution, mesh: DeviceMesh | None) -> None:
    """float64: parameters, buffers and inputs. bfloat16: the policy of `fully_shard` where it shards, else autocast.

    Under autocast matrix products are in 16 bits, weights and norms in the model's type. The policy gathers
    weights and computes in bfloat16, norms too, and sums gradients in float32; models with batch norms stay
    under autocast. Outputs, gradients and what the optimizer steps keep their type.
    """
    if execution.precision == "float64":
        model.double()
        model.register_forward_pre_hook(_to_float64, with_kwargs=True)
    elif execution.precision == "bfloat16" and not _has_policy(model, mesh):
        model.forward = Autocast(model)


def _has_policy(model: nn.Module, mesh: DeviceMesh | None) -> bool:
    """Whether `fully_shard` is to cast; batch norms want weights in the type of their statistics."""
    sharded = mesh is not None and not {"shard", "dp"}.isdisjoint(_dims(mesh))
    return sharded and not any(isinstance(module, _BatchNorm) for module in model.modules())


def _to_float64(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
    )


def _dims(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def compile_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Compile the forward of each block, so that no name changes and equal blocks share a graph.

    The forward, not the call: what is put around it, hooks of `fully_shard` too, needs no graph.
    """
    for block in blocks or [model]:
        block.forward = torch.compile(block.forward)


def cut_layers(model: nn.Module, mesh: DeviceMesh, blocks: list[nn.Module]) -> None:
    """Tensor parallelism: see `tensor_parallel`."""
    from stretto.train.tensor_parallel import tensor_parallel

    tensor_parallel(model, mesh, blocks)


def checkpoint_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Keep the inputs of each block for the backward pass, and compute the rest again.

    By the blocks' forwards, so that no name changes. Statistics of batch norm move once. Caches of Hugging Face's
    models, which a second forward would fill twice, are switched off.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    for block in blocks or [model]:
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        options: dict[str, Any] = {"use_reentrant": False}
        if norms:
            options["context_fn"] = functools.partial(_contexts, norms)
        block.forward = functools.partial(checkpoint, block.forward, **options)


def _contexts(norms: list[_BatchNorm]) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _unmoved(norms)


@contextlib.contextmanager
def _unmoved(norms: list[_BatchNorm]) -> Iterator[None]:
    """Within it, batch norms normalise by the batch and leave their statistics alone."""
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, kept):
            buffer.copy_(value)


def replicate(model: nn.Module, mesh: DeviceMesh, leaves_unused: bool) -> nn.Module:
    """DDP."""
    return DistributedDataParallel(
        model, process_group=mesh.get_group(), find_unused_parameters=leaves_unused
    )


def shard_blocks(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, execution: Execution) -> None:
    """`fully_shard` of each block, then of what is left; what tensor parallelism cut is cut once more."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    inner = outer = MixedPrecisionPolicy()
    if execution.precision == "bfloat16" and _has_policy(model, mesh):
        output = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inner = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        outer = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=output)
    mesh = mesh["dp"] if "tp" in _dims(mesh) else mesh
    for p in model.parameters():
        if not p.is_contiguous():  # kernels in channels last, which it refuses
            p.data = p.data.contiguous()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=outer)
