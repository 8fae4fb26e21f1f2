"""What torch.distributed.checkpoint is given: tensors that a rank holds in part, and a reader that runs nothing."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

CONTENTS = {  # what a table of contents is made of, dtypes apart
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    ),
}  # fmt: skip


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write each rank's shards into a folder, on the disk when this returns. Every rank calls it."""
    with _alone_without_warning() as no_dist:
        dcp.save(
            tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=no_dist,
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )  # fmt: skip


def read(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill this rank's shards from a folder. Every rank calls it with the same keys."""
    with _alone_without_warning() as no_dist:
        dcp.load(
            tensors, storage_reader=_Reader(folder), no_dist=no_dist,
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )  # fmt: skip


def contents(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes by key."""
    found: dict[str, Any] = _Reader(folder).read_metadata().state_dict_metadata
    return found


def is_complete(folder: Path) -> bool:
    """Whether all files are there in the length that the table of contents tells."""
    try:
        pieces = _Reader(folder).read_metadata().storage_data.values()
        sizes = {name: (folder / name).stat().st_size for name in {one.relative_path for one in pieces}}
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError):
        return False
    return all(one.offset + one.length <= sizes[one.relative_path] for one in pieces)


@contextmanager
def _alone_without_warning() -> Iterator[bool]:
    """Whether this process is alone, which torch does not take without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield not dist.is_initialized()


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """As torch's, which would run whatever the file says."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in CONTENTS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's table of contents has no place for {module}.{name}")


class Held(Protocol):
    """What a rank holds of a tensor that is no DTensor, as an optimizer's `held(p, key, shape)` tells."""

    whole: tuple[int, ...]
    local: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], int, int]]  # rows start:start+count of the local tensor lie at offsets


class Chunks(Tensor):
    """Rows of a plain tensor that are chunks of a larger one, for torch.distributed.checkpoint alone."""

    tensor: Tensor
    held: Held

    @staticmethod
    def __new__(cls, tensor: Tensor, held: Held) -> Chunks:
        """A tensor in shape only."""
        made: Chunks = Tensor._make_wrapper_subclass(
            cls, held.whole, dtype=tensor.dtype, device=tensor.device
        )
        made.tensor, made.held = tensor, held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        """No arithmetic."""
        raise TypeError(f"{function} of a tensor that is held in part; it can only be saved and loaded")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size((count, *self.tensor.shape[1:])))
            for offsets, _, count in self.held.parts
        ]

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.tensor)
        return [
            WriteItem(
                MetadataIndex(key, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offsets, start, count in self.held.parts:
            if torch.Size(offsets) == index.offset:
                return self.tensor[start : start + count]
        raise KeyError(index)
