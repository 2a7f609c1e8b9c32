"""Views of mapped files: what they show, and that their pages can be let go of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, read_header
from engine.checkpoint.mapping import MappedFiles
from engine.errors import CheckpointError

MIB = 1 << 20


def mapped_bytes(path: Path) -> int:
    """Resident bytes of this process's mappings of a file."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split(maxsplit=1)[0].endswith(":"):
            total += int(line.split()[1]) * 1024 if ours and line.startswith("Rss:") else 0
        else:
            ours = line.endswith(str(path))
    return total


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "matrix": torch.arange(6).view(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty((0, 4), dtype=dtype),
    }
    save_file(tensors, path)
    files = MappedFiles()
    for name, info in read_header(path).items():
        view = files.view(info)
        assert view.dtype == dtype
        assert torch.equal(view, tensors[name])


def test_every_dtype_of_a_header_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header, begin = {}, 0
    for dtype, bits in DTYPE_BITS.items():
        header[dtype] = {"dtype": dtype, "shape": [1], "data_offsets": [begin, begin + bits // 8]}
        begin += bits // 8
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(begin))
    files = MappedFiles()
    for info in read_header(path).values():  # one byte ones first: most of the others are not aligned
        assert files.view(info).float().item() == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
def test_released_pages_are_gone_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stored = torch.arange(8 * MIB, dtype=torch.int64)
    save_file({"a": stored}, path)
    files = MappedFiles()
    view = files.view(read_header(path)["a"])
    assert view.sum() == stored.sum()
    assert mapped_bytes(path) >= 64 * MIB
    files.release()
    assert mapped_bytes(path) < MIB
    assert torch.equal(view, stored)
    files.close()
    assert torch.equal(view, stored), "a view keeps its file mapped"
    del view
    assert mapped_bytes(path) == 0


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    info = read_header(path)["a"]
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match=r"x\.safetensors became shorter"):
        MappedFiles().view(info)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors can't be read"):
        MappedFiles().view(info)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 8 + MAX_HEADER_BYTES + 1)  # sparse: it takes no room on the disk
    with pytest.raises(CheckpointError, match=f"header of {MAX_HEADER_BYTES + 1} bytes; at most"):
        read_header(path)
