"""Writing a model folder: all of it or none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint.reader import INDEX, CheckpointReader
from engine.checkpoint.writer import FolderWriter
from engine.errors import CheckpointError

TENSORS = {f"t{i}": torch.full((4, 8), float(i)) for i in range(5)}  # 128 bytes each


def write(folder: Path, *, max_shard_bytes: int = 1000, overwrite: bool = False) -> None:
    with FolderWriter(folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.write_json("config.json", {"a": "ü"})
        writer.commit()


@pytest.mark.parametrize(("limit", "shards"), [(1000, 1), (300, 3), (128, 5), (1, 5)])
def test_shards_keep_to_the_limit_and_read_back(tmp_path: Path, limit: int, shards: int) -> None:
    folder = tmp_path / "model"
    write(folder, max_shard_bytes=limit)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) == shards
    assert (folder / INDEX).exists() == (shards > 1)
    if shards == 1:
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{shards:05d}.safetensors"
        assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == 5 * 128
    reader = CheckpointReader(folder)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name, shape=(4, 8), dtypes=["F32"]), tensor)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with FolderWriter(tmp_path / "model", max_shard_bytes=1) as writer:
            writer.add("a", torch.zeros(4))
            writer.add("b", torch.zeros(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwriting(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(CheckpointError, match="exists"):
        write(folder)
    assert (folder / "precious").exists()
    write(folder, overwrite=True)
    assert not (folder / "precious").exists()
    assert sorted(tmp_path.iterdir()) == [folder]


def test_a_name_is_given_once(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "model") as writer:
        writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match="'a' was added twice"):
            writer.add("a", torch.zeros(1))
