"""Starting models that are larger than a rank's memory: tensors are whole only while something touches them.

The constructor, initialisers and surgery run as ever, on every rank alike, so the values are those of one process,
whatever the model. Between two calls each rank keeps its part of what has not been touched for longest.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from stretto import shards
from stretto.wrapping import unwrap

WINDOW = 1 << 28  # bytes that a rank keeps whole
SMALL = 1 << 14  # bytes of a tensor that stays whole


@dataclass(eq=False)
class Memory:
    """The memory of one tensor and its views."""

    weak: StorageWeakRef
    size: int  # in bytes
    part: Tensor | None = None  # this rank's, (ceil(size / ranks),) uint8; None while whole

    @property
    def storage(self) -> torch.UntypedStorage | None:
        """None where nobody holds it any more."""
        return torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)


class Scattered(TorchFunctionMode):
    """Within it, CPU tensors that are made lie in parts on all ranks, but for the bytes touched last: WINDOW.

    Every rank must call the same. What reads a tensor's memory otherwise than through torch sees nothing there.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device  # of the backend's tensors
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.held = 0  # bytes that are whole
        self._known: dict[int, Memory] = {}  # by address, which another may take once its storage is gone
        # Oldest touch first. Ranks must agree on what is whole, so what is gone stays in it until its turn.
        self._whole: dict[Memory, None] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Gather what the call touches, call, scatter what is too much."""
        kwargs = kwargs or {}
        self.gather(args, kwargs)
        out = function(*args, **kwargs)
        for memory in self._memories((args, kwargs, out)):
            self._touch(memory)
        self._scatter()
        return out

    def gather(self, *touched: Any) -> None:
        """Make the tensors among these whole; a collective where they are not."""
        for memory in self._memories(touched):
            if memory.part is not None:
                self._restore(memory)

    def _touch(self, memory: Memory) -> None:
        if memory in self._whole:
            del self._whole[memory]
        else:
            self.held += memory.size
        self._whole[memory] = None

    def _memories(self, touched: Any) -> Iterator[Memory]:
        for tensor in tree_iter(touched):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                known = self._known.get(storage._cdata)
                if known is not None and not known.weak.expired():
                    yield known
                elif storage.nbytes() > SMALL and storage.resizable():
                    self._known.pop(storage._cdata, None)  # so that they come in the order of making
                    self._known[storage._cdata] = memory = Memory(StorageWeakRef(storage), storage.nbytes())
                    yield memory

    def _scatter(self) -> None:
        while self.held > WINDOW:
            memory = next(iter(self._whole))
            self._drop(memory)
            if (storage := memory.storage) is not None:
                share = -(-memory.size // self.ranks)
                memory.part = _bytes(storage)[self.rank * share : (self.rank + 1) * share].clone()
                storage.resize_(0)

    def _drop(self, memory: Memory) -> None:
        del self._whole[memory]
        self.held -= memory.size

    def release(self) -> None:
        """Forget what is whole, the memory of which its holders give back."""
        for memory in list(self._whole):
            self._drop(memory)

    def gather_rest(self) -> None:
        """Make whole what is still held by somebody."""
        gc.collect()  # so that ranks agree on what that is
        for memory in self._known.values():
            if memory.part is not None and not memory.weak.expired():
                self._restore(memory)

    def _restore(self, memory: Memory) -> None:
        storage, part = memory.storage, memory.part
        assert storage is not None and part is not None
        share = -(-memory.size // self.ranks)
        mine = torch.zeros(share, dtype=torch.uint8, device=self.device)
        mine[: len(part)] = part.to(self.device)
        everything = mine.new_empty(share * self.ranks)
        dist.all_gather(list(everything.chunk(self.ranks)), mine)
        storage.resize_(memory.size)
        _bytes(storage).copy_(everything[: memory.size])
        memory.part = None
        self._touch(memory)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by all their names."""
    yield from itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )


def build_scattered(
    make: Callable[[], nn.Module], spread: Callable[[nn.Module], nn.Module], device: torch.device
) -> nn.Module:
    """`spread(make())` on the device, where `spread` shards a model that is on the meta device.

    Costs up to three gathers of the model, and while it starts twice a rank's share beside the window. Every rank
    calls it; `make` must be the same on each.
    """
    scattered = Scattered(device)
    with scattered:
        model = make()
    values = dict(_tensors(model))
    model = spread(_to_meta(model))
    _give_memory(model, device)
    filled: set[int] = set()  # tied ones once
    with torch.no_grad():
        for name, tensor in _tensors(unwrap(model)):
            value = values.pop(name)
            if id(tensor) not in filled:
                scattered.gather(value)
                shards.write(tensor, value.detach())
                scattered.release()
                filled.add(id(tensor))
    scattered.gather_rest()
    return model


def _to_meta(model: nn.Module) -> nn.Module:
    """The model without memory, ties kept; its tensors stay with whoever holds them."""
    laid: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = laid.setdefault(id(tensor), _empty(tensor, torch.device("meta")))
    return model


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """As `to_empty`, with parameters that stay the same objects, so that they stay tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
