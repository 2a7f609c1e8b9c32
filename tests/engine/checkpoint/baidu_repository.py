"""A small ERNIE-4.5 MoE in the formats of Baidu's 2-bit repositories, written whole or cut into rank folders.

Cutting and decoding here are written from the published description, on integers in logical order, and use nothing of
what they test but Paddle's byte layout (which has golden files of its own).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import paddle_layout
from engine.config import ModelConfig

CONFIG: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "vocab_size": 104,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "moe_num_experts": 3,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def quantization(row_order: str) -> dict[str, Any]:
    """Dense parts WINT8, experts of layer 1 WINT4, of the layers from 2 on WINT2."""
    w4 = {"quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 1}
    w2 = {"quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64, "quant_start_layer": 2,
          "quant_end_layer": -1, "row_order": row_order}  # fmt: skip
    parts = {"moe_w4_quant_config": w4, "moe_w2_quant_config": w2}
    return {"dense_quant_type": "wint8", "moe_quant_type": "w4w2", "quantization": "wint2", "moe_quant_config": parts}


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [K, N] as integers in the order of rows (WINT2: of stored rows) and columns."""

    kind: str
    values: Tensor
    """wint8, wint4: int8 [K, N]; wint2: codes uint8 [K/4, N]."""
    columns: dict[str, Tensor]
    """Scales, [N] each."""
    groups: Tensor | None = None
    """wint2: scales of the groups of rows, uint8 [K/64, N], 0..15."""

    @property
    def rows(self) -> int:
        return self.values.shape[0] * (4 if self.kind == "wint2" else 1)

    def take_columns(self, index: Tensor) -> Matrix:
        groups = None if self.groups is None else self.groups[:, index]
        columns = {name: scale[index] for name, scale in self.columns.items()}
        return replace(self, values=self.values[:, index], columns=columns, groups=groups)

    def take_rows(self, start: int, stop: int) -> Matrix:
        if self.kind == "wint2":
            assert self.groups is not None
            groups = self.groups[start // 64 : stop // 64]
            return replace(self, values=self.values[start // 4 : stop // 4], groups=groups)
        return replace(self, values=self.values[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """As files have it."""
        if self.kind == "wint8":
            return {"quant_weight": paddle_layout.encode_int8(self.values), **self.columns}
        if self.kind == "wint4":
            return {"quant_weight": paddle_layout.encode_int4(self.values), **self.columns}
        assert self.groups is not None
        count, n = self.groups.shape
        packed = torch.zeros((-(-count // 2), n), dtype=torch.uint8)
        for group in range(count):
            packed[group // 2] |= self.groups[group] << (0 if group % 2 else 4)  # the even group in the high nibble
        return {"quant_weight": self.values.contiguous(), "weight_scale": packed, **self.columns}

    def dense(self, row_order: str) -> Tensor:
        """fp32 [K, N], exact."""
        if self.kind != "wint2":
            return self.values.float() * self.columns["weight_scale"].float()
        assert self.groups is not None
        words = torch.floor(self.values.float() * self.columns["code_scale"] + self.columns["code_zp"] + 0.5).int()
        stored = torch.stack([((words >> shift) & 63) - 32 for shift in (9, 6, 3, 0)], dim=1).flatten(0, 1)  # [K, N]
        scales = self.groups.repeat_interleave(64, dim=0)
        weights = stored.float() * scales.float() * self.columns["super_scales"].float()
        if row_order == "plain":
            return weights
        logical = torch.empty_like(weights)
        for i in range(self.rows):
            a, b, c = i % 64 // 16, i % 16 // 2, i % 2
            logical[i // 64 * 64 + 8 * b + 2 * a + c] = weights[i]
        return logical


class Repository:
    """A random model; ``matrices`` by module, ``vectors`` (everything that is not quantized) by name."""

    def __init__(self, *, row_order: str = "permuted", seed: int = 0, **changes: Any) -> None:
        self.raw = CONFIG | changes
        self.config = ModelConfig.from_json(self.raw)
        self.row_order = row_order
        self.generator = torch.Generator().manual_seed(seed)
        self.matrices: dict[str, Matrix] = {}
        hidden = self.config.hidden_size
        self.vectors = {"embed_tokens.weight": self._normal(self.config.vocab_size, hidden),
                        "norm.weight": 1 + self._normal(hidden)}  # fmt: skip
        if not self.config.tie_word_embeddings:
            self.vectors["lm_head.weight"] = self._normal(self.config.vocab_size, hidden)
        for layer in range(self.config.num_hidden_layers):
            self._add_layer(layer)

    def write(self, folder: Path, *, ranks: int | None = None, shards: int = 1) -> Path:
        """Write the repository: for one card, or cut into ``ranks`` folders."""
        raw = self.raw | {"is_quantized": True, "quantization_config": quantization(self.row_order)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw))
        if ranks is None:
            write_shards(folder, self.tensors(0, 1), shards)
        else:
            for rank in range(ranks):
                write_shards(folder / f"rank{rank}", self.tensors(rank, ranks), shards)
        return folder

    def write_dense(self, folder: Path, replaced: dict[str, Tensor] | None = None) -> Path:
        """Write the same weights, dequantized to fp32, under torch names.

        ``replaced``: dense matrices [K, N] to take instead of this repository's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.raw))
        tensors = {f"{'' if name.startswith('lm_head') else 'model.'}{name}": t for name, t in self.vectors.items()}
        config = self.config
        kv_width = config.num_key_value_heads * config.head_dim
        widths = {"qkv_proj": [config.num_attention_heads * config.head_dim, kv_width, kv_width]}
        names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}
        for module, matrix in self.matrices.items():
            dense = (replaced or {}).get(module, matrix.dense(self.row_order)).T  # [N, K]
            parent, _, last = module.rpartition(".")
            if last not in names:
                tensors[f"model.{module}.weight"] = dense.contiguous()
                continue
            pieces = dense.split(widths.get(last, len(dense) // 2))
            for name, piece in zip(names[last], pieces, strict=True):
                tensors[f"model.{parent}.{name}.weight"] = piece.contiguous()
        save_file(tensors, folder / "model.safetensors")
        return folder

    def tensors(self, rank: int, ranks: int) -> dict[str, Tensor]:
        """Paddle's tensors of one rank."""
        tensors = {}
        for name, tensor in self.vectors.items():
            rows = self.config.vocab_size // ranks
            if name == "lm_head.weight":
                tensors[name] = tensor.T[:, rank * rows : (rank + 1) * rows].contiguous()
            elif name == "embed_tokens.weight":
                tensors[f"ernie.{name}"] = tensor[rank * rows : (rank + 1) * rows].contiguous()
            elif name.endswith("mlp.gate.weight"):
                tensors[f"ernie.{name}"] = tensor.T.contiguous()
            else:
                tensors[f"ernie.{name}"] = tensor
        for module, matrix in self.matrices.items():
            for suffix, tensor in self.cut(module, matrix, rank, ranks).tensors().items():
                tensors[f"ernie.{module}.{suffix}"] = tensor.contiguous()
        return tensors

    def cut(self, module: str, matrix: Matrix, rank: int, ranks: int) -> Matrix:
        """What Baidu's tool gives to one rank."""
        if module.endswith("qkv_proj"):
            return matrix.take_columns(self._head_columns(rank, ranks))
        if module.endswith("up_gate_proj"):
            half = matrix.values.shape[1] // 2
            gate = torch.arange(rank * half // ranks, (rank + 1) * half // ranks)
            return matrix.take_columns(torch.cat((gate, half + gate)))
        return matrix.take_rows(rank * matrix.rows // ranks, (rank + 1) * matrix.rows // ranks)

    def _head_columns(self, rank: int, ranks: int) -> Tensor:
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        queries = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        served = sorted({query * kv_heads // heads for query in queries})  # the KV heads that these queries look at
        chosen = [*queries, *(heads + head for head in served), *(heads + kv_heads + head for head in served)]
        return torch.cat([torch.arange(head * size, (head + 1) * size) for head in chosen])

    def _normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.2) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype)

    def _uniform(self, n: int, low: float, high: float) -> Tensor:
        return torch.rand(n, generator=self.generator) * (high - low) + low

    def _matrix(self, kind: str, k: int, n: int) -> Matrix:
        def integers(low: int, high: int, rows: int) -> Tensor:
            return torch.randint(low, high, (rows, n), generator=self.generator)

        if kind == "wint2":
            columns = {
                "super_scales": self._uniform(n, 2e-4, 6e-4).bfloat16(),
                "code_scale": self._uniform(n, 60, 140),
                "code_zp": self._uniform(n, -300, 300),
            }
            codes, groups = integers(0, 256, k // 4), integers(0, 16, k // 64)
            return Matrix(kind, codes.to(torch.uint8), columns, groups.to(torch.uint8))
        limit = {"wint8": 127, "wint4": 7}[kind]
        scale = {"weight_scale": (self._uniform(n, 0.08, 0.2) / limit).bfloat16()}
        return Matrix(kind, integers(-limit, limit + 1, k).to(torch.int8), scale)

    def _add_layer(self, layer: int) -> None:
        config, prefix = self.config, f"layers.{layer}"
        hidden, moe = config.hidden_size, config.moe
        assert moe is not None
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.vectors[f"{prefix}.{norm}.weight"] = 1 + self._normal(hidden)
        q_width = config.num_attention_heads * config.head_dim
        qkv_width = q_width + 2 * config.num_key_value_heads * config.head_dim
        self.matrices[f"{prefix}.self_attn.qkv_proj"] = self._matrix("wint8", hidden, qkv_width)
        self.matrices[f"{prefix}.self_attn.o_proj"] = self._matrix("wint8", q_width, hidden)
        widths = {"mlp": ("wint8", config.intermediate_size)}
        if config.is_moe_layer(layer):
            kind = "wint4" if layer == 1 else "wint2"
            widths = {f"mlp.experts.{i}": (kind, moe.intermediate_size) for i in range(moe.num_experts)}
            widths["mlp.shared_experts"] = ("wint8", moe.shared_intermediate_size)
            gate = self._normal(moe.num_experts, hidden, dtype=torch.float32)
            bias = self._normal(1, moe.num_experts, dtype=torch.float32)
            self.vectors[f"{prefix}.mlp.gate.weight"] = gate
            self.vectors[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = bias
        for module, (kind, width) in widths.items():
            self.matrices[f"{prefix}.{module}.up_gate_proj"] = self._matrix(kind, hidden, 2 * width)
            self.matrices[f"{prefix}.{module}.down_proj"] = self._matrix(kind, width, hidden)


class OwnScales(Repository):
    """Its rank folders were quantized each on its own: matrices cut along K have per-column scales of each rank.

    ``alike``: modules whose scales happen to be equal in all ranks.
    """

    alike: tuple[str, ...] = ()

    def cut(self, module: str, matrix: Matrix, rank: int, ranks: int) -> Matrix:
        share = super().cut(module, matrix, rank, ranks)
        if module.endswith(("o_proj", "down_proj")) and module not in self.alike:
            return replace(share, columns={name: scale * (1 + rank) for name, scale in share.columns.items()})
        return share

    def dense(self, ranks: int) -> dict[str, Tensor]:
        """The matrices [K, N] that ``ranks`` folders together mean, where that depends on the cut."""
        return {
            module: torch.cat([self.cut(module, matrix, r, ranks).dense(self.row_order) for r in range(ranks)])
            for module, matrix in self.matrices.items()
            if module.endswith(("o_proj", "down_proj"))
        }


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """One file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_tensors(file: Path, change: Callable[[dict[str, Tensor]], Iterator[tuple[str, Tensor]]]) -> None:
    """Rewrite a safetensors file."""
    save_file(dict(change(load_file(file))), file)
