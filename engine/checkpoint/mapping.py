"""Tensors as views of memory-mapped safetensors files, whose pages can be let go of at any time."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.header import TensorInfo
from engine.errors import CheckpointError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


class MappedFiles:
    """Files mapped when a tensor of theirs is first asked for.

    The safetensors library maps files as well, but holds every page that was touched until the file is closed; with
    ``release`` a checkpoint of any size is read with the pages of one matrix in memory.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor that a checked header (``engine.checkpoint.header``) describes; not to be written to.

        Raises:
            CheckpointError: the file can't be opened, or is shorter than when its header was read.
        """
        dtype, count = _DTYPES[info.dtype], math.prod(info.shape)
        mapped = self._map(info)
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.begin % dtype.itemsize:  # the library never writes this, others may
            stored = torch.frombuffer(mapped, dtype=torch.uint8, count=info.num_bytes, offset=info.begin)
            return stored.clone().view(dtype).view(info.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.begin).view(info.shape)

    def release(self) -> None:
        """Give the pages read so far back to the system. Views stay valid: a page they touch is mapped again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Forget the files; each stays mapped until its last view is gone."""
        self._maps.clear()

    def _map(self, info: TensorInfo) -> mmap.mmap:
        mapped = self._maps.get(info.file)
        if mapped is None:
            try:
                with info.file.open("rb") as file:
                    # A private mapping: torch wants memory that may be written, and the file must never be.
                    mapped = self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{info.file} can't be read: {error}") from None
        if info.begin + info.num_bytes > len(mapped):
            raise CheckpointError(f"{info.file} became shorter while it was read; fetch it again")
        return mapped
