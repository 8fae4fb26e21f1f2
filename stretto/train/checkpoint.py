"""Checkpoints through torch.distributed.checkpoint: complete or absent, and loaded by any number of ranks.

One is a folder `step-000123`, written aside and renamed. Each rank writes its shards of the tensors, which lie
there under plain keys: `model.<name>`, `optimizer.<name>.<key>`, `state.<method>.<key>`. All else is JSON under
`numbers`. Nothing is unpickled but torch's own table of contents, and that by a list of what may be in it.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stretto.train import shards_on_disk
from stretto.train.launch import first, rank
from stretto.train.shards_on_disk import Chunks, Held
from stretto.update import Updater

NUMBERS = "numbers"  # the key of all that is no tensor
ASIDE = ".partial"  # the end of a name of what is not complete


class Resumable(Protocol):
    """A Trainer or an Updater."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""


# ------------------------------------------------------------------------------------------------ save, load


def save(run: Resumable, folder: Path, **extra: Any) -> Path:
    """Write the state of a Trainer or an Updater, and `extra` (plain values of rank 0), as a new checkpoint.

    Every rank calls it. A kill at any moment leaves the checkpoint complete or absent. Raises ValueError for
    values in the state that are neither tensors nor plain.
    """
    update = _updater(run)
    final = folder / f"step-{update.step:06d}"
    tensors: dict[str, Tensor] = {}
    content = {"state": _pack(_portable(update, run.state_dict()), (), tensors), "extra": extra}
    if rank() == 0:
        tensors[NUMBERS] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    aside = final.with_name(final.name + ASIDE)
    first(lambda: _empty(aside))
    shards_on_disk.write(tensors, aside)
    first(lambda: _publish(aside, final))
    return final


def load(run: Resumable, path: Path) -> dict[str, Any]:
    """Go on from a checkpoint, saved by whatever number of ranks; returns its `extra`. Every rank calls it.

    Raises ValueError, and changes nothing, for the checkpoint of another model, recipe or number of slices.
    """
    update, stored = _updater(run), shards_on_disk.contents(path)
    numbers = torch.empty(stored[NUMBERS].size, dtype=torch.uint8)
    shards_on_disk.read({NUMBERS: numbers}, path)
    content = json.loads(numbers.numpy().tobytes())
    state = content["state"]
    update.check_state(state)
    _check_model(update.model, state["model"], path)
    wanted = _Wanted(update)
    tensors = {_key(place): wanted.at(place, stored[_key(place)]) for place in _places(state)}
    shards_on_disk.read(tensors, path)
    run.load_state_dict(_own(update, _unpack(state, (), tensors)))
    extra: dict[str, Any] = content["extra"]
    return extra


def find(folder: Path) -> Path | None:
    """The newest complete checkpoint, the same on every rank; newer ones that are torn are named in a warning."""
    return first(lambda: _find(folder))


def prune(folder: Path, keep: int = 2) -> None:
    """Remove all but the newest complete checkpoints, and what saving left behind where it was killed."""
    first(lambda: _prune(folder, keep))


def _check_model(model: nn.Module, theirs: dict[str, Any], path: Path) -> None:
    """Raise ValueError where the checkpoint's tensors are not this model's in name and shape."""
    owners = _owners(model)
    ours = {
        name: _shape(value) for name, value in model.state_dict().items() if owners.get(name, name) == name
    }
    has = {name: _shape(value) for name, value in theirs.items()}
    differences = (
        ("it has no", [name for name in ours if name not in has]),
        ("this model has no", [name for name in has if name not in ours]),
        ("shapes differ:", [
            f"{name} {has[name]} there, {ours[name]} here"
            for name in ours if name in has and has[name] != ours[name]
        ]),
    )  # fmt: skip
    if found := [f"{what} {_some(names)}" for what, names in differences if names]:
        raise ValueError(
            f"{path} is the checkpoint of another model: {'; '.join(found)}; load it into the model it was "
            "saved from, or begin in another folder"
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a tensor, packed or not."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(value["$tensor"]) if isinstance(value, dict) and "$tensor" in value else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------- folders, on rank 0


def _find(folder: Path) -> Path | None:
    for path in _newest_first(folder):
        if _is_complete(path):
            return path
        warnings.warn(
            f"{path} is torn, so an older checkpoint is looked for: saving it was interrupted, or files of it "
            "are gone",
            stacklevel=3,
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    """All that begins as a checkpoint, by step; of one step what is complete before what was left aside."""

    def age(path: Path) -> tuple[int, bool]:
        step = path.name.removeprefix("step-").partition(".")[0]
        return int(step), path.suffix != ASIDE

    return sorted(folder.glob("step-[0-9]*"), key=age, reverse=True)


def _is_complete(path: Path) -> bool:
    return path.suffix != ASIDE and shards_on_disk.is_complete(path)


def _prune(folder: Path, keep: int) -> None:
    found = _newest_first(folder)
    kept = [path for path in found if _is_complete(path)][:keep]
    for path in found:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    if path.suffix != ASIDE:  # a kill while removing must not leave half of it under a good name
        path = path.rename(path.with_name(f"{path.name}.old{ASIDE}"))
    shutil.rmtree(path)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(aside: Path, final: Path) -> None:
    """Rename what is complete and on the disk; torch has synced the files."""
    _sync(aside)
    if final.exists():  # it is torn, or another run's
        _remove(final)
    os.replace(aside, final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------- states without ranks' numbers


Place = tuple[str, ...]  # where something lies in a state, whose key is its parts joined by dots


def _key(place: Place) -> str:
    return ".".join(place)


def _updater(run: Any) -> Updater:
    return getattr(run, "update", run)


def _portable(update: Updater, state: dict[str, Any]) -> dict[str, Any]:
    """A state with the optimizer's entries by parameter, what is held in part described, ties once."""
    owners, optimizer = _owners(update.model), state["optimizer"]
    by_index = {
        index: (name, p)
        for group, names, saved in zip(
            update.optimizer.param_groups, _names(update), optimizer["param_groups"]
        )
        for p, name, index in zip(group["params"], names, saved["params"])
    }
    entries = {}
    for index, entry in optimizer["state"].items():
        name, p = by_index[index]
        entries[name] = {key: _described(update.optimizer, p, key, value) for key, value in entry.items()}
    groups = [dict(group, params=names) for group, names in zip(optimizer["param_groups"], _names(update))]
    rest = {key: value for key, value in optimizer.items() if key != "state"}
    model = {name: value for name, value in state["model"].items() if owners.get(name, name) == name}
    return {**state, "model": model, "optimizer": entries, "groups": {**rest, "param_groups": groups}}


def _own(update: Updater, state: dict[str, Any]) -> dict[str, Any]:
    """A state as this run's own `load_state_dict` takes it: the way back from `_portable`."""
    names, rest = _names(update), state.pop("groups")
    indices = {name: index for index, name in enumerate(chain.from_iterable(names))}
    stored = {frozenset(group["params"]): group for group in rest["param_groups"]}
    if set(stored) == set(map(frozenset, names)):  # equal but for the order
        rest["param_groups"] = [
            stored[frozenset(mine)] | {k: group[k] for k in ("names", "param_names") if k in group}
            | {"params": [indices[name] for name in mine]}
            for mine, group in zip(names, update.optimizer.param_groups)
        ]  # fmt: skip
    optimizer = {indices.get(name, name): entry for name, entry in state["optimizer"].items()}
    owners = _owners(update.model)
    model = {name: state["model"][owners.get(name, name)] for name in update.model.state_dict()}
    return {**state, "model": model, "optimizer": {**rest, "state": optimizer}}


def _owners(model: nn.Module) -> dict[str, str]:
    """Each name of a parameter or buffer, and the first name that the same tensor has."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    found: dict[int, str] = {}
    return {name: found.setdefault(id(tensor), name) for name, tensor in named}


def _names(update: Updater) -> list[list[str]]:
    """The names of each group's parameters; numbers for those that the model does not have."""
    known = {id(p): name for name, p in update.model.named_parameters()}
    return [
        [known.get(id(p), f"{number}.{position}") for position, p in enumerate(group["params"])]
        for number, group in enumerate(update.optimizer.param_groups)
    ]


def _keeper(optimizer: Any, key: str) -> Any:
    """The innermost optimizer that tells what it holds in part, if this key is its own; else None."""
    while not hasattr(optimizer, "held"):
        inner = getattr(optimizer, "optimizer", None)
        if key in getattr(optimizer, "kept", ()) or not isinstance(inner, Optimizer):
            return None
        optimizer = inner
    return optimizer


def _described(optimizer: Any, p: Tensor, key: str, value: Any) -> Any:
    """A tensor with what it is of a larger one; anything else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not (keeper := _keeper(optimizer, key)):
        return value
    held: Held | None = keeper.held(p, key, tuple(value.shape))
    return value if held is None else Chunks(value, held)


# ---------------------------------------------------------------------------------------------- tensors, JSON


def _pack(value: Any, place: Place, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a state, whose tensors are put into `tensors` by their keys."""
    if isinstance(value, Tensor):
        key = _key(place)
        if key in tensors or key == NUMBERS:
            raise ValueError(f"two tensors of this run would be stored as {key}; give one another name")
        tensors[key] = value
        return {"$tensor": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(k): _pack(v, (*place, str(k)), tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_pack(v, (*place, str(i)), tensors) for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{_key(place)} is {value!r}, a {type(value).__name__}; checkpoints hold tensors, numbers and text"
    )


def _unpack(value: Any, place: Place, tensors: Mapping[str, Tensor]) -> Any:
    """The way back from `_pack`."""
    if isinstance(value, list):
        return [_unpack(v, (*place, str(i)), tensors) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        found = tensors[_key(place)]
        return found.tensor if isinstance(found, Chunks) else found
    if "$tuple" in value:
        return tuple(_unpack(value["$tuple"], place, tensors))
    return {k: _unpack(v, (*place, k), tensors) for k, v in value.items()}


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where the tensors of a packed state lie."""
    if isinstance(value, dict) and "$tensor" in value:
        yield place
    elif isinstance(value, dict) and "$tuple" in value:
        yield from _places(value["$tuple"], place)
    elif isinstance(value, dict | list):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(v, (*place, str(k)))


class _Wanted:
    """What this rank wants of each stored tensor: its shard where it holds the like of a parameter."""

    def __init__(self, update: Updater) -> None:
        self.optimizer = update.optimizer
        self.model = update.model.state_dict()
        self.parameters = dict(update.model.named_parameters())
        self.longest = sorted(self.parameters, key=len, reverse=True)

    def at(self, place: Place, stored: TensorStorageMetadata) -> Tensor:
        """An empty tensor to read into."""
        like: Tensor | None = None
        match place:
            case ("model", name):
                like = self.model[name]
            case ("optimizer", name, key) if name in self.parameters:
                if keeper := _keeper(self.optimizer, key):
                    return self._part(keeper.held(self.parameters[name], key, tuple(stored.size)), stored)
                like = None if key == "step" else self.parameters[name]
            case ("state", _, key):
                named = (name for name in self.longest if key == name or key.endswith(f".{name}"))
                like = self.parameters.get(next(named, ""))
        if isinstance(like, DTensor) and like.shape == stored.size:
            return torch.zeros_like(like.detach(), dtype=stored.properties.dtype)
        return self._part(None, stored)

    def _part(self, held: Held | None, stored: TensorStorageMetadata) -> Tensor:
        """What is held in part, or the whole plain tensor."""
        empty = torch.empty(stored.size if held is None else held.local, dtype=stored.properties.dtype)
        return empty if held is None else Chunks(empty, held)
