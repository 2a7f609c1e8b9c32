"""Checkpoints cut for any number of ranks serve any number of ranks, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from baidu_repository import OwnScales, Repository, change_tensors
from flat_batches import all_logits
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError
from kernels.operands import CcqWeight, Int4Weight, Int8Weight, SplitWeight
from kernels.reference.dequantize import dequantize

TOLERANCE = 1e-4
PROMPT = torch.randint(0, 104, (17,), generator=torch.Generator().manual_seed(1)).tolist()
CUTS: dict[str, int | None] = {"one-card": None, "tp1": 1, "tp2": 2, "tp4": 4}


def share(folder: Path, *, rank: int = 0, world: int = 1, **options: Any) -> ShardedWeights:
    config = ModelConfig.from_folder(folder)
    options = {"dtype": torch.float32, "device": torch.device("cpu")} | options
    return ShardedWeights(folder, config, rank=rank, world_size=world, **options)


def logits(rank_pool, folder: Path, size: int) -> Tensor:
    config = EngineConfig(
        model=str(folder), tensor_parallel_size=size, device="cpu", max_model_len=64, max_num_seqs=2, num_threads=1
    )
    with rank_pool.executor(config) as executor:
        return all_logits(executor, PROMPT)


class Folders:
    """One model per row order, in all its forms."""

    def __init__(self, root: Path, row_order: str, **options: Any) -> None:
        repository = Repository(row_order=row_order, **options)
        self.dense = repository.write_dense(root / "dense")
        self.cut = {
            name: repository.write(root / name, ranks=ranks, shards=3 if ranks == 2 else 1)
            for name, ranks in CUTS.items()
        }
        self._expected: dict[int, Tensor] = {}

    def expected(self, rank_pool, size: int) -> Tensor:
        if size not in self._expected:
            self._expected[size] = logits(rank_pool, self.dense, size)
        return self._expected[size]


@pytest.fixture(scope="module", params=["plain", "permuted"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("cut", "size"), list(product(CUTS, [1, 2, 4])))
def test_logits_are_those_of_the_dequantized_model(folders: Folders, rank_pool, cut: str, size: int) -> None:
    found = logits(rank_pool, folders.cut[cut], size)
    assert found.abs().max() > 0.5, "logits near zero compare nothing"
    assert torch.equal(found, folders.expected(rank_pool, size)), "the same weights in the same sums"
    assert (found - folders.expected(rank_pool, 1)).abs().max() <= TOLERANCE


def assert_same_shares(found: ShardedWeights, expected: ShardedWeights, config: ModelConfig) -> None:
    """Every module of two sources means the same."""

    def same(read: Callable[[ShardedWeights], Any]) -> None:
        ours, theirs = (dequantize(read(weights), torch.float32) for weights in (found, expected))
        assert torch.equal(ours, theirs)

    assert torch.equal(found.embedding(), expected.embedding())
    layers = [f"layers.{i}.{n}_layernorm" for i in range(config.num_hidden_layers) for n in ("input", "post_attention")]
    for norm in ("norm", *layers):
        assert torch.equal(found.norm(norm), expected.norm(norm))
    same(lambda weights: weights.head())
    for layer in range(config.num_hidden_layers):
        same(lambda weights, i=layer: weights.qkv(i))
        same(lambda weights, i=layer: weights.attention_output(i))
        if not config.is_moe_layer(layer):
            same(lambda weights, i=layer: weights.gate_up(i))
            same(lambda weights, i=layer: weights.down(i))
            continue
        for ours, theirs in zip(found.router(layer), expected.router(layer), strict=True):
            assert torch.equal(ours, theirs)
        for shared in (
            lambda weights, i=layer: weights.gate_up(i, shared=True),
            lambda weights, i=layer: weights.down(i, shared=True),
            lambda weights, i=layer: weights.expert_gate_up(i),
            lambda weights, i=layer: weights.expert_down(i),
        ):
            same(shared)


@pytest.mark.parametrize(
    ("changes", "cuts", "sizes"),
    [
        # 12 groups of rows: shares of 3 and 6 begin and end inside a pair of scales.
        pytest.param({"moe_intermediate_size": 768}, (1, 2, 4), (1, 2, 4), id="odd groups"),
        # Neither divides the other: the middle rank of three takes from both folders.
        pytest.param(
            {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 192, "intermediate_size": 384,
             "moe_intermediate_size": 384, "vocab_size": 102},
            (2, 3), (1, 2, 3, 6), id="crossing",
        ),
        pytest.param({"num_key_value_heads": 1}, (2, 4), (1, 2, 4), id="one KV head"),
        pytest.param({"tie_word_embeddings": True}, (2,), (1, 4), id="tied"),
    ],
)  # fmt: skip
def test_shares_of_any_cut_are_those_of_the_dequantized_model(
    tmp_path: Path, changes: dict[str, Any], cuts: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    repository = Repository(**changes)
    dense = repository.write_dense(tmp_path / "dense")
    for ranks in cuts:
        folder = repository.write(tmp_path / f"tp{ranks}", ranks=ranks)
        for size in sizes:
            for rank in range(size):
                found, expected = (share(f, rank=rank, world=size) for f in (folder, dense))
                assert_same_shares(found, expected, repository.config)


def test_joined_shares_stay_packed(folders: Folders) -> None:
    for cut in ("tp2", "tp4"):
        weights = share(folders.cut[cut])
        assert isinstance(weights.attention_output(0), Int8Weight)
        assert isinstance(weights.expert_down(1), Int4Weight)
        down = weights.expert_down(2)
        assert isinstance(down, CcqWeight)
        assert down.codes.shape == (3, 64, 128)
        assert down.group_scales.shape == (3, 2, 128)


def test_one_expert_alone_is_that_of_the_stack(folders: Folders) -> None:
    for cut in ("one-card", "tp4"):
        weights = share(folders.cut[cut], rank=1, world=2)
        for layer in (1, 2):
            stack = dequantize(weights.expert_down(layer), torch.float32)
            assert torch.equal(dequantize(weights.expert_down_of(layer, 2), torch.float32), stack[2])


def test_joined_shares_are_the_operand_of_one_card(tmp_path: Path) -> None:
    repository = Repository(moe_intermediate_size=768)
    whole = share(repository.write(tmp_path / "whole")).expert_down(2)
    joined = share(repository.write(tmp_path / "cut", ranks=4)).expert_down(2)
    assert isinstance(whole, CcqWeight)
    assert isinstance(joined, CcqWeight)
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(joined.group_scales, whole.group_scales), "pairs of scales are packed again"


@pytest.mark.parametrize("alike", [(), ("layers.2.mlp.experts.0.down_proj", "layers.1.mlp.experts.1.down_proj")])
def test_ranks_quantized_each_on_its_own(tmp_path: Path, rank_pool, alike: tuple[str, ...]) -> None:
    repository = OwnScales()
    repository.alike = alike
    folder = repository.write(tmp_path / "tp4", ranks=4)
    dense = repository.write_dense(tmp_path / "dense", repository.dense(4))
    for size in (1, 2, 4):
        split = size < 4
        for rank in range(size):
            found, expected = (share(f, rank=rank, world=size) for f in (folder, dense))
            assert_same_shares(found, expected, repository.config)
            for layer in (1, 2):
                assert isinstance(found.expert_down(layer), SplitWeight) == split
            assert isinstance(found.attention_output(0), SplitWeight) == split
            assert isinstance(found.expert_gate_up(2), CcqWeight), "columns have their own scales anyway"
        assert torch.equal(logits(rank_pool, folder, size), logits(rank_pool, dense, size))


def test_progress_counts_the_bytes_of_all_folders_once(folders: Folders) -> None:
    for cut in ("one-card", "tp4"):
        calls: list[tuple[int, int]] = []
        weights = share(
            folders.cut[cut], rank=1, world=2, progress=lambda _, done, total, to=calls: to.append((done, total))
        )
        assert_same_shares(weights, share(folders.dense, rank=1, world=2), ModelConfig.from_folder(folders.dense))
        weights.close()
        done = [call[0] for call in calls]
        files = folders.cut[cut].rglob("*.safetensors")
        total = sum(t.numel() * t.element_size() for file in files for t in load_file(file).values())
        assert done == sorted(done)
        assert calls[-1] == (total, total)


@pytest.mark.parametrize(("rows", "padded"), [(101, True), (101, False), (104, False)])
def test_the_last_rank_s_rows_of_the_vocabulary_may_be_padded_or_fewer(tmp_path: Path, rows: int, padded: bool) -> None:
    repository = Repository()
    expected = repository.write_dense(tmp_path / "dense")
    folder = repository.write(tmp_path / "tp4", ranks=4)
    left = rows - 78

    def shorten(name: str, tensor: Tensor) -> Tensor:
        axis = {"ernie.embed_tokens.weight": 0, "lm_head.weight": 1}.get(name)
        return tensor if axis is None or padded else tensor.narrow(axis, 0, left).contiguous()

    change_tensors(
        folder / "rank3" / "model.safetensors", lambda tensors: ((n, shorten(n, t)) for n, t in tensors.items())
    )
    for path in (folder, expected):
        raw = (path / "config.json").read_text()
        (path / "config.json").write_text(raw.replace('"vocab_size": 104', f'"vocab_size": {rows}'))

    def cut(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            yield name, tensor[:rows].contiguous() if vocabulary else tensor

    change_tensors(expected / "model.safetensors", cut)
    for rank in range(2):
        ours, theirs = (share(path, rank=rank, world=2) for path in (folder, expected))
        assert torch.equal(ours.embedding(), theirs.embedding())
        assert torch.equal(ours.head().weight, theirs.head().weight)


@pytest.fixture
def tp4(folders: Folders, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(folders.cut["tp4"], tmp_path / "tp4")


@pytest.mark.parametrize(("lost", "message"), [(0, "lacks rank0; it has rank1, rank2, rank3"), (2, "lacks rank2; ")])
def test_a_missing_rank_folder_is_named(tp4: Path, lost: int, message: str) -> None:
    shutil.rmtree(tp4 / f"rank{lost}")
    with pytest.raises(CheckpointError, match=message):
        share(tp4)


def test_missing_last_folders_are_suspected(tp4: Path) -> None:
    shutil.rmtree(tp4 / "rank3")
    with pytest.raises(CheckpointError, match=r"has 3 rank folders, but .*num_attention_heads 4.*is a folder missing"):
        share(tp4)
    shutil.rmtree(tp4 / "rank2")
    with pytest.raises(CheckpointError, match=r"qkv_proj.*in one of 2 rank folders; .* some folders are missing"):
        share(tp4).qkv(0)


def test_a_tensor_that_one_rank_lacks_is_named_with_both_folders(tp4: Path) -> None:
    name = "ernie.layers.2.mlp.experts.1.down_proj.code_zp"
    change_tensors(tp4 / "rank2" / "model.safetensors", lambda tensors: (i for i in tensors.items() if i[0] != name))
    with pytest.raises(CheckpointError, match=rf"rank0 has a tensor '{name}', .*rank2 has none"):
        share(tp4)


def test_a_tensor_that_only_one_rank_has_is_named_with_both_folders(tp4: Path) -> None:
    change_tensors(
        tp4 / "rank1" / "model.safetensors", lambda tensors: iter({**tensors, "ernie.extra": torch.ones(1)}.items())
    )
    with pytest.raises(CheckpointError, match=r"rank1 has a tensor 'ernie.extra', .*rank0 has none"):
        share(tp4)


def test_shares_of_different_size_are_named_with_both_folders(tp4: Path, folders: Folders) -> None:
    shutil.copy(folders.cut["one-card"] / "model.safetensors", tp4 / "rank1" / "model.safetensors")
    message = (
        r"tensor 'ernie\..*' is (\w+ \[.*\]) in .*rank0 and (?!\1)\w+ \[.*\] in .*rank1; every rank has an equal share"
    )
    with pytest.raises(CheckpointError, match=message):
        share(tp4)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("ernie.norm.weight", lambda weights: weights.norm("norm")),
        ("ernie.layers.2.mlp.gate.weight", lambda weights: weights.router(2)),
        ("ernie.layers.1.mlp.moe_statics.e_score_correction_bias", lambda weights: weights.router(1)),
    ],
)
def test_repeated_tensors_that_differ_are_named_with_both_folders(tp4: Path, name: str, read: Any) -> None:
    def nudge(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from (tensors | {name: tensors[name] + 1}).items()

    change_tensors(tp4 / "rank3" / "model.safetensors", nudge)
    with pytest.raises(CheckpointError, match=rf"{name}' is not the same in .*rank0 and .*rank3"):
        read(share(tp4))


def test_whole_and_cut_weights_together_are_refused(tp4: Path, folders: Folders) -> None:
    shutil.copy(folders.cut["one-card"] / "model.safetensors", tp4)
    with pytest.raises(CheckpointError, match=r"both model.safetensors and weights cut for ranks \(rank0"):
        share(tp4)


@pytest.mark.parametrize("file", ["model_state.tp03.pdparams", "pytorch_model.bin"])
def test_pickled_weights_of_a_rank_are_refused(tp4: Path, file: str) -> None:
    (tp4 / "rank3" / "model.safetensors").unlink()
    (tp4 / "rank3" / file).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"rank3 holds pickled weights .{file}.*refused, because unpickling"):
        share(tp4)
