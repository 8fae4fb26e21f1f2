"""What wrapping makes of a model, and what of it the Updater steers: torch.compile, DDP, fully_shard."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer


def unwrap(model: nn.Module) -> nn.Module:
    """The model with the names it was built with: out of DDP (`module`) and torch.compile (`_orig_mod`).

    `fully_shard` changes no names. Where parts inside were compiled on their own, a shallow copy of what holds
    them: its parameters, buffers, hooks and other parts are the model's.
    """
    while isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module) or isinstance(
        model, DistributedDataParallel | DataParallel
    ):
        model = inner if inner is not None else model.module  # type: ignore[assignment]
    children = {name: None if child is None else unwrap(child) for name, child in model._modules.items()}
    if any(child is not model._modules[name] for name, child in children.items()):
        model = copy.copy(model)
        model.__dict__["_modules"] = children
    return model


class Wrapping:
    """The parts of a model that DDP or `fully_shard` wrapped; without them, all of this is nothing."""

    def __init__(self, model: nn.Module) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, in vain where nothing is sharded
        modules = list(model.modules())
        self.replicated = [module for module in modules if isinstance(module, DistributedDataParallel)]
        self.sharded: list[Any] = [m for m in modules if fsdp is not None and isinstance(m, fsdp.FSDPModule)]
        inner = {id(child) for root in self.sharded for child in root.modules() if child is not root}
        self.roots = [module for module in self.sharded if id(module) not in inner]

    def __bool__(self) -> bool:
        return bool(self.replicated or self.sharded)

    def sync(self, now: bool) -> None:
        """Whether the next backward pass reduces gradients over ranks, or only adds to them."""
        for module in self.replicated:
            module.require_backward_grad_sync = now
        for root in self.roots:
            root.set_requires_gradient_sync(now)
            root.set_is_last_backward(now)

    def keep_buffers(self) -> None:
        """Let each rank have its own buffers, where DDP would overwrite them by rank 0's in each forward."""
        for module in self.replicated:
            module.broadcast_buffers = False

    def reshard(self) -> None:
        """Drop what was gathered for a forward without backward, so that weights may change underneath."""
        for module in self.sharded:
            module.reshard()

    def abandon(self) -> None:
        """After a pass that was left midway: nothing gathered, no gradient half added up, no pass under way."""
        for root in self.roots:
            root.reset_iter_state()
        for module in self.sharded:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for p in group.fsdp_params:
                    p.unsharded_accumulated_grad = None
                    if hasattr(p, "_unsharded_param"):  # since the first forward
                        p._unsharded_param.grad = None
        self.sync(True)

    def share(self, optimizer: Optimizer) -> None:
        """Let an optimizer that can divide its work among the ranks of a DDP model do so."""
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        share = getattr(optimizer, "share", None)
        if share is not None and self.replicated:
            share(self.replicated[0].process_group)
