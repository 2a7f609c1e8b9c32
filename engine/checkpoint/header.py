"""The header of a safetensors file, checked against the file's size before anything in it is believed.

Format: 8 bytes (little endian) length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

MAX_DIMENSIONS = 8

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor. ``dtype`` is safetensors' name for it ("BF16", "I8", ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Where its data begin in the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file can't be read, is truncated, or its header contradicts itself or the file's size.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: its header should take {length} bytes, "
                    f"the file has {size}; fetch it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        raw = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(raw).__name__}; expected an object")
    raw.pop("__metadata__", None)
    return _check(path, raw, data_begin=8 + length, data_bytes=size - 8 - length)


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name appears twice")
    return keys


def _check(path: Path, raw: dict[str, Any], *, data_begin: int, data_bytes: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in raw.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise CheckpointError(
                f"{path}: the header's entry for {name!r} lacks dtype, shape or two data_offsets"
            ) from None
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the unknown dtype {dtype!r:.40}; known: {', '.join(DTYPE_BITS)}"
            )
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, (*shape, begin, end))):
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {shape!r:.80} and data_offsets {[begin, end]!r:.80}; "
                f"expected at most {MAX_DIMENSIONS} sizes, and two positions"
            )
        info = tensors[name] = TensorInfo(path, dtype, tuple(shape), data_begin + begin)
        if end - begin != info.num_bytes:
            raise CheckpointError(
                f"{path}: tensor {name!r}, {dtype} {shape}, needs {info.num_bytes} bytes; "
                f"its data_offsets [{begin}, {end}] hold {end - begin}"
            )
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name!r} begins at byte {begin} of the data; expected {position}")
        position = end
    if position > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header describes {position} bytes of data, "
            f"{data_bytes} are there; fetch it again"
        )
    if position < data_bytes:
        raise CheckpointError(f"{path} holds {data_bytes - position} bytes that its header does not describe")
    return tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
