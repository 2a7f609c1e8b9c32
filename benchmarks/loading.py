"""Host memory while a quantized checkpoint is loaded, beyond what loading returns.

Writes an ERNIE-4.5 MoE checkpoint of random bytes (attention, dense and shared experts WINT8, routed experts WINT2) to
a temporary folder, once for one card and once cut into two rank folders, and loads each with ``ShardedWeights`` in a
fresh process. A thread of that process reads its resident memory all the time: anonymous pages (what was allocated)
and file pages (what was read of the mapped files). Whatever exceeds the memory before loading plus the weights returned
so far is the cost of loading; it must stay under two layers of the checkpoint. The result is
``benchmarks/results/loading.json``.

    python -m benchmarks.loading
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from engine.checkpoint.header import DTYPE_BITS
from engine.checkpoint.joins import tensors
from engine.checkpoint.loader import ShardedWeights
from engine.checkpoint.partition import MatrixCut, Partition
from engine.config import ModelConfig
from engine.quantization.config import Part, QuantizationConfig
from engine.quantization.wint2 import Wint2
from engine.quantization.wint8 import Wint8
from kernels.operands import Weight

CONFIG: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_k": 8,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "tie_word_embeddings": False,
}
SHARD_BYTES = 500_000_000
CASES = (("one card", None, 1), ("one card", None, 2), ("2 rank folders", 2, 1), ("2 rank folders", 2, 2))
LAYERS_ALLOWED = 2


# --- a checkpoint of random bytes ---


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor to be written; ``dtype`` in safetensors' names."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def layer_tensors(config: ModelConfig, quantization: QuantizationConfig, part: Partition, layer: int) -> list[Stored]:
    """What a rank's folder (or the only one) has of a layer."""
    prefix, hidden, moe = f"ernie.layers.{layer}", config.hidden_size, config.moe
    assert moe is not None
    stored = [Stored(f"{prefix}.{norm}_layernorm.weight", (hidden,), "BF16") for norm in ("input", "post_attention")]

    def add(group: Part, module: str, cut: MatrixCut) -> None:
        n = sum(len(block.part) for block in cut.blocks)
        for suffix, spec in quantization.format(group, layer).tensors(len(cut.rows), n).items():
            stored.append(Stored(f"{prefix}.{module}.{suffix}", spec.shape, spec.dtypes[0]))

    def add_mlp(group: Part, module: str, width: int) -> None:
        add(group, f"{module}.up_gate_proj", part.gate_up(width))
        add(group, f"{module}.down_proj", part.rows(width))

    add("attention", "self_attn.qkv_proj", part.qkv())
    add("attention", "self_attn.o_proj", part.rows(config.num_attention_heads * config.head_dim))
    if not config.is_moe_layer(layer):
        add_mlp("mlp", "mlp", config.intermediate_size)
        return stored
    stored.append(Stored(f"{prefix}.mlp.gate.weight", (hidden, moe.num_experts), "F32"))
    stored.append(Stored(f"{prefix}.mlp.moe_statics.e_score_correction_bias", (1, moe.num_experts), "F32"))
    add_mlp("shared_experts", "mlp.shared_experts", moe.shared_intermediate_size)
    for expert in range(moe.num_experts):
        add_mlp("experts", f"mlp.experts.{expert}", moe.intermediate_size)
    return stored


def checkpoint_tensors(config: ModelConfig, quantization: QuantizationConfig, part: Partition) -> Iterator[Stored]:
    rows = config.vocab_size // part.world_size
    yield Stored("ernie.embed_tokens.weight", (rows, config.hidden_size), "BF16")
    for layer in range(config.num_hidden_layers):
        yield from layer_tensors(config, quantization, part, layer)
    yield Stored("ernie.norm.weight", (config.hidden_size,), "BF16")
    yield Stored("lm_head.weight", (config.hidden_size, rows), "BF16")


def write_files(folder: Path, stored: Iterable[Stored], generator: np.random.Generator) -> None:
    """Shards with an index. Bytes are random, floating-point numbers are ones (random ones might be no numbers)."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Stored]] = [[]]
    for tensor in stored:
        if sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, generator)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_file(path: Path, stored: list[Stored], generator: np.random.Generator) -> None:
    header, begin = {}, 0
    for tensor in stored:
        end = begin + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    ones = {"BF16": b"\x80\x3f", "F32": b"\x00\x00\x80\x3f"}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in stored:
            one = ones.get(tensor.dtype)
            file.write(one * math.prod(tensor.shape) if one else generator.bytes(tensor.num_bytes))


def write_repository(folder: Path, ranks: int | None) -> None:
    quantization = QuantizationConfig.of(dense=Wint8(), experts=Wint2("permuted"))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization.to_json()}))
    config = ModelConfig.from_folder(folder)
    generator = np.random.default_rng(0)
    for rank in range(ranks or 1):
        stored = checkpoint_tensors(config, quantization, Partition(config, rank, ranks or 1))
        write_files(folder if ranks is None else folder / f"rank{rank}", stored, generator)


# --- one loading, in a process of its own ---


@dataclass
class Watch:
    """Resident memory of this process, in bytes, as often as it can be read."""

    anonymous: int = 0
    mapped: int = 0
    kept: int = 0
    """Bytes of the weights returned so far."""
    baseline: tuple[int, int] = (0, 0)
    peaks: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        self.baseline = resident()
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def look(self) -> None:
        anonymous, mapped = (now - before for now, before in zip(resident(), self.baseline, strict=True))
        found = {"anonymous_beyond_kept": anonymous - self.kept, "mapped": mapped,
                 "total_beyond_kept": anonymous - self.kept + mapped}  # fmt: skip
        for name, value in found.items():
            self.peaks[name] = max(self.peaks.get(name, 0), value)
        self.samples += 1

    def _run(self) -> None:
        while not self.ended.is_set():
            self.look()
            time.sleep(0.001)


def resident() -> tuple[int, int]:
    """RssAnon and RssFile of this process in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]  # two


def load(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Load one rank's share and keep all of it, as a model does."""
    torch.set_num_threads(1)
    torch.zeros(1).to(torch.bfloat16)  # what torch allocates for itself
    config = ModelConfig.from_folder(folder)
    kept: list[Tensor] = []
    watch = Watch()

    def keep(*weights: Weight | Tensor | None) -> None:
        for weight in weights:
            if weight is not None:
                kept.extend([weight] if isinstance(weight, Tensor) else tensors(weight))
        watch.kept = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        watch.look()

    thread = watch.start()
    started = time.perf_counter()
    source = ShardedWeights(
        folder, config, rank=rank, world_size=world_size, dtype=torch.bfloat16, device=torch.device("cpu"),
        progress=lambda *_: watch.look(),
    )  # fmt: skip
    keep(source.embedding())
    for layer in range(config.num_hidden_layers):
        keep(*(source.norm(f"layers.{layer}.{norm}_layernorm") for norm in ("input", "post_attention")))
        keep(source.qkv(layer))
        keep(source.attention_output(layer))
        shared = config.is_moe_layer(layer)
        keep(source.gate_up(layer, shared=shared))
        keep(source.down(layer, shared=shared))
        if shared:
            keep(*source.router(layer))
            keep(source.expert_gate_up(layer))
            keep(source.expert_down(layer))
    keep(source.norm("norm"), source.head())
    source.close()
    seconds = time.perf_counter() - started
    watch.ended.set()
    thread.join()
    return {"seconds": round(seconds, 2), "kept_bytes": watch.kept, "samples": watch.samples,
            "peak_bytes": watch.peaks}  # fmt: skip


# --- all of it ---


def measure() -> dict[str, Any]:
    result = report.context(["torch", "safetensors"]) | {"model": CONFIG, "cases": []}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, ranks, world_size in CASES:
            folder = Path(temporary) / kind.replace(" ", "-")
            if not folder.exists():
                write_repository(folder, ranks)
            result["cases"].append(case(folder, kind, world_size))
    return result


def case(folder: Path, kind: str, world_size: int) -> dict[str, Any]:
    config = ModelConfig.from_folder(folder)
    quantization = QuantizationConfig.from_json(config.quantization)
    whole = Partition(config, 0, 1)
    layers = [
        sum(tensor.num_bytes for tensor in layer_tensors(config, quantization, whole, layer))
        for layer in range(config.num_hidden_layers)
    ]
    command = [sys.executable, "-m", "benchmarks.loading", "--load", str(folder)]
    command += ["--tensor-parallel-size", str(world_size)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    return {
        "checkpoint": kind,
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        "tensor_parallel_size": world_size,
        "rank": 0,
        "layer_bytes": max(layers),
        **loaded,
        "layers_beyond_kept": round(loaded["peak_bytes"]["total_beyond_kept"] / max(layers), 2),
        "bound_met": loaded["peak_bytes"]["total_beyond_kept"] < LAYERS_ALLOWED * max(layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="load only, and print what it took")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks; with --load, rank 0 is loaded")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, 0, options.tensor_parallel_size)))
        return
    result = measure()
    path = report.RESULTS / "loading.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for found in result["cases"]:
        print(
            f"{found['checkpoint']}, tensor_parallel_size {found['tensor_parallel_size']}: {found['seconds']} s, "
            f"{found['layers_beyond_kept']} layers beyond what is kept"
        )
    print(path)
    if not all(found["bound_met"] for found in result["cases"]):
        sys.exit(f"loading took more than {LAYERS_ALLOWED} layers of memory beyond what it returned")


if __name__ == "__main__":
    main()
