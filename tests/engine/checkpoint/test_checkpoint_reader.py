"""Reading safetensors folders: what is in them, and a clear error for everything that can be wrong with them."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.checkpoint.header import read_header
from engine.checkpoint.reader import FLOATS, INDEX, CheckpointReader
from engine.errors import CheckpointError

A, B = torch.arange(12.0).view(3, 4), torch.arange(5, dtype=torch.uint8)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and an index: "a" fp32 [3, 4] in the first, "b" uint8 [5] in the second."""
    for file, tensors in zip(SHARDS, ({"a": A}, {"b": B}), strict=True):
        save_file(tensors, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    return tmp_path


def test_tensors_of_all_shards(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    assert sorted(reader) == ["a", "b"]
    assert torch.equal(reader.read("a", shape=(3, 4), dtypes=FLOATS), A)
    assert torch.equal(reader.read("b", shape=(5,), dtypes=("U8",)), B)
    assert reader.info("a").num_bytes == 48


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert sorted(CheckpointReader(sharded)) == ["a", "b"]


def test_a_view_outlives_the_reader(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    view = reader.read("a", shape=(3, 4), dtypes=FLOATS)
    reader.close()
    assert torch.equal(view, A)
    assert torch.equal(reader.read("a", shape=(3, 4), dtypes=FLOATS), A), "reading again opens the file again"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SHARDS[1]}, which {INDEX} names"):
        CheckpointReader(sharded)


def test_a_missing_shard_without_an_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SHARDS[0]}"):
        CheckpointReader(sharded)


def test_a_renamed_shard_is_suspected(sharded: Path) -> None:
    (sharded / SHARDS[1]).rename(sharded / "second.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks {SHARDS[1]}.*second.safetensors.*renamed\?"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("left", [0, 4, 8, 60, -1])
def test_a_truncated_shard_is_named(sharded: Path, left: int) -> None:
    path = sharded / SHARDS[0]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]} is truncated"):
        CheckpointReader(sharded)


def test_swapped_shards_are_noticed(sharded: Path) -> None:
    first, second = (sharded / name for name in SHARDS)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"places tensor 'a' in {SHARDS[0]}, which does not hold it"):
        CheckpointReader(sharded)


@pytest.mark.parametrize(
    ("shape", "dtypes", "message"),
    [
        ((4, 3), ("F32",), r"'a' is F32 \[3, 4\]; expected F32 \[4, 3\]"),
        ((3, 4), ("I8", "U8"), r"'a' is F32 \[3, 4\]; expected I8 or U8 \[3, 4\]"),
    ],
)
def test_a_wrong_shape_or_dtype_says_file_tensor_expected_and_found(
    sharded: Path, shape: tuple[int, ...], dtypes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}: tensor {message}"):
        CheckpointReader(sharded).read("a", shape=shape, dtypes=dtypes)


def test_an_unknown_tensor(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        CheckpointReader(sharded).read("c", shape=(1,), dtypes=FLOATS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_state.pdparams", "consolidated.pth"])
def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"{name}.*refused, because unpickling.*safetensors"):
        CheckpointReader(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        CheckpointReader(tmp_path / "absent")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": 3}', "\xff", "[" * 100_000])
def test_a_malformed_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="can't be read as an index"):
        CheckpointReader(sharded)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "", "..", "x" * 9999]
)
def test_an_index_stays_inside_its_folder(sharded: Path, file: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"expected NAME\.safetensors without a folder"):
        CheckpointReader(sharded)


def test_one_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    for file in ("x.safetensors", "y.safetensors"):
        save_file({"a": A}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"'a' is in both x.safetensors and y.safetensors"):
        CheckpointReader(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HOSTILE: dict[str, Any] = {
    "not an object": [1, 2],
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "an entry that is text": {"a": "dtype"},
    "unknown dtype": {"a": entry(dtype="F99")},
    "dtype of another type": {"a": entry(dtype=["F32"])},
    "negative size": {"a": entry(shape=[-2])},
    "size that is no number": {"a": entry(shape=["2"])},
    "huge size": {"a": entry(shape=[2**62, 2**62])},
    "too many dimensions": {"a": entry(shape=[1] * 100_000)},
    "boolean size": {"a": entry(shape=[True], data_offsets=[0, 4])},
    "offsets backwards": {"a": entry(data_offsets=[8, 0])},
    "negative offset": {"a": entry(data_offsets=[-8, 0])},
    "three offsets": {"a": entry(data_offsets=[0, 4, 8])},
    "beyond the file": {"a": entry(shape=[2**40], data_offsets=[0, 2**42])},
    "overlapping tensors": {"a": entry(), "b": entry(data_offsets=[4, 12])},
    "a hole": {"a": entry(shape=[1], data_offsets=[0, 4]), "b": entry(shape=[0], data_offsets=[8, 8])},
    "undescribed data": {"a": entry(shape=[1], data_offsets=[0, 4])},
}


def write(path: Path, header: bytes, *, length: int | None = None, data: bytes = bytes(8)) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "x.safetensors", json.dumps(header).encode())
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 1000])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", json.dumps({"a": entry()}).encode(), length=length)
    with pytest.raises(CheckpointError, match=f"its header should take {length} bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": ' + b"9" * 9999 + b"}"]
)
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(write(tmp_path / "x.safetensors", text))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), keep=st.integers(0, 10_000))
def test_no_damage_escapes_as_another_error(tmp_path: Path, position: int, byte: int, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": A, "b": B}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content[: max(1, keep % (2 * len(content)))])
    with contextlib.suppress(CheckpointError):
        for name, info in read_header(path).items():
            tensor = CheckpointReader(tmp_path).read(name, shape=info.shape, dtypes=[info.dtype])
            assert tensor.shape == info.shape
