"""Writing a model folder: safetensors shards with an index, and the JSON around them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.reader import INDEX
from engine.errors import CheckpointError

MAX_SHARD_BYTES = 2_000_000_000


class FolderWriter:
    """Writes a model folder under a temporary name beside it, and renames it when everything is there.

    A context manager; leaving it by an exception, or without :meth:`commit`, removes what was written. Memory holds one
    shard at most.

    Args:
        folder: where the model folder shall be.
        overwrite: replace a folder that is there.
        max_shard_bytes: a shard is written when the next tensor would take it over this size.
        temporary: the folder to write in, on the same file system; beside ``folder`` by default.

    Raises:
        CheckpointError: ``folder`` exists and ``overwrite`` is false.
    """

    def __init__(
        self,
        folder: Path,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        temporary: Path | None = None,
    ) -> None:
        if folder.exists() and not overwrite:
            raise CheckpointError(f"{folder} exists; choose another folder, or allow overwriting it")
        folder = folder.absolute()
        self._folder = folder
        self._temporary = temporary or folder.with_name(f".{folder.name}.{os.getpid()}.new")
        self._max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self.num_bytes = 0
        """Bytes of tensor data added so far."""

    def __enter__(self) -> Self:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; it is kept until its shard is written."""
        if name in self._names:
            raise ValueError(f"tensor {name!r} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self._max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._shard[name] = tensor.detach().cpu().contiguous()
        self._shard_bytes += size
        self.num_bytes += size

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file into the folder."""
        (self._temporary / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy(self, file: Path) -> None:
        """Copy a file into the folder under its own name."""
        shutil.copyfile(file, self._temporary / file.name)

    def commit(self) -> None:
        """Write the last shard and the index, and put the folder in its place."""
        self._flush()
        self._name_shards()
        if not self._folder.exists():
            self._temporary.rename(self._folder)
            return
        replaced = self._temporary.with_name(f"{self._temporary.name}.replaced")
        self._folder.rename(replaced)
        self._temporary.rename(self._folder)
        shutil.rmtree(replaced)

    def _flush(self) -> None:
        if self._shard:
            write_tensors(self._temporary / _unnamed(len(self._shards)), self._shard, metadata={"format": "pt"})
            self._shards.append(list(self._shard))
            self._shard, self._shard_bytes = {}, 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            (self._temporary / _unnamed(0)).rename(self._temporary / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self._temporary / _unnamed(i)).rename(self._temporary / file)
            weight_map |= dict.fromkeys(names, file)
        self.write_json(INDEX, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map})


def write_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str]) -> None:
    """Write a safetensors file and bring it to the disk.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        system = re.search(r"\(os error (\d+)\)", str(error))  # the library tells the system's error in words alone
        if system is None:
            raise
        raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from None
    path.chmod(0o644)  # the library makes it readable by its owner only
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _unnamed(shard: int) -> str:
    return f"shard-{shard}"
