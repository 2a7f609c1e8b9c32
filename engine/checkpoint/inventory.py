"""What a checkpoint holds: formats by layer, bytes by part and by rank; and whether all of it is sound."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import names
from engine.checkpoint.folders import Checkpoint
from engine.checkpoint.loader import ShardedWeights
from engine.checkpoint.names import Naming
from engine.compress.modules import layer_matrices
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quantization.config import PARTS, Part, QuantizationConfig
from engine.quantization.format import RowOrder, WeightFormat
from engine.quantization.registry import format_options
from engine.quantization.wint2 import Wint2
from kernels.operands import SplitWeight, Weight

TITLES: dict[str, str] = {
    "attention": "attention",
    "mlp": "dense MLP",
    "shared_experts": "shared experts",
    "experts": "routed experts",
    "router": "router",
    "norms": "norms",
    "embedding": "embedding and head",
    "mtp": "multi-token prediction",
    "other": "other",
}
"""Parts of a model, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class FormatUse:
    """One part in one format: layers ``first`` to ``last``.

    Attributes:
        part: the group of matrices.
        format: name and options.
        first: the first of consecutive layers (among those that have the part).
        last: the last one, inclusive.
        num_weights: weights in them.
        num_bytes: their bytes, scales included.
    """

    part: Part
    format: str
    first: int
    last: int
    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales included."""
        return 8 * self.num_bytes / self.num_weights


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the headers of a checkpoint's files say.

    Attributes:
        folder: where it is.
        naming: "paddle" or "torch".
        formats: by part and range of layers.
        bytes_by_part: by the keys of :data:`TITLES`.
        bytes_by_rank: one number for files that are not cut, else one for each rank's folder.
        row_order: of WINT2 matrices as config.json has it, "unknown" if it does not say it, None without such matrices.
    """

    folder: Path
    naming: str
    formats: list[FormatUse]
    bytes_by_part: dict[str, int]
    bytes_by_rank: list[int]
    row_order: RowOrder | str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, of all ranks."""
        return sum(self.bytes_by_rank)


def take_inventory(folder: Path, config: ModelConfig) -> Inventory:
    """Read the headers of all files.

    Raises:
        CheckpointError: the files are damaged or incomplete.
        UnsupportedError, ConfigError: a quantization that Dibit does not have.
    """
    checkpoint = Checkpoint(folder)
    try:
        naming = names.detect(checkpoint)
        quantization = QuantizationConfig.from_json(config.quantization)
        by_part: Counter[str] = Counter()
        by_module: Counter[str] = Counter()
        for name in checkpoint:
            size = checkpoint.num_bytes(name)
            by_part[_part(name)] += size
            by_module[name.rpartition(".")[0]] += size
        return Inventory(
            folder=folder,
            naming=naming.kind,
            formats=list(_formats(config, quantization, naming, by_module)),
            bytes_by_part={part: by_part[part] for part in TITLES if by_part[part]},
            bytes_by_rank=[sum(reader.info(name).num_bytes for name in reader) for reader in checkpoint.parts],
            row_order=_row_order(quantization),
        )
    finally:
        checkpoint.close()


def verify(folder: Path, config: ModelConfig, progress: Callable[[str, int, int], None] | None = None) -> Iterator[str]:
    """Read every tensor that a server would read; yields one sentence for each thing that is wrong.

    Shapes, dtypes and completeness are checked as at loading; every floating-point value must be finite, and no
    scale negative. Memory holds one module at a time.
    """
    try:
        weights = ShardedWeights(
            folder,
            config,
            rank=0,
            world_size=1,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            row_order="plain",  # the values are the same under either order
            progress=progress,
        )
    except CheckpointError as error:
        yield str(error)
        return
    try:
        for what, read in _reads(weights, config):
            try:
                yield from (f"{what}: {problem}" for problem in _problems(read()))
            except CheckpointError as error:
                yield str(error)
    finally:
        weights.close()


def _reads(
    weights: ShardedWeights, config: ModelConfig
) -> Iterator[tuple[str, Callable[[], Weight | Tensor | tuple[Tensor, Tensor | None] | None]]]:
    """Every module of the model, and how to read it."""
    yield "embed_tokens", weights.embedding
    for i in range(config.num_hidden_layers):
        prefix = f"layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}", partial(weights.norm, f"{prefix}.{norm}")
        yield f"{prefix}.self_attn.qkv_proj", partial(weights.qkv, i)
        yield f"{prefix}.self_attn.qkv_proj.bias", partial(weights.qkv_bias, i)
        yield f"{prefix}.self_attn.o_proj", partial(weights.attention_output, i)
        if config.moe is None or not config.is_moe_layer(i):
            yield f"{prefix}.mlp.up_gate_proj", partial(weights.gate_up, i)
            yield f"{prefix}.mlp.down_proj", partial(weights.down, i)
            continue
        yield f"{prefix}.mlp.gate", partial(weights.router, i)
        yield f"{prefix}.mlp.experts.*.up_gate_proj", partial(weights.expert_gate_up, i)
        yield f"{prefix}.mlp.experts.*.down_proj", partial(weights.expert_down, i)
        if config.moe.num_shared_experts:
            yield f"{prefix}.mlp.shared_experts.up_gate_proj", partial(weights.gate_up, i, shared=True)
            yield f"{prefix}.mlp.shared_experts.down_proj", partial(weights.down, i, shared=True)
    yield "norm", partial(weights.norm, "norm")
    yield "lm_head", weights.head


def _problems(read: Weight | Tensor | tuple[Tensor, Tensor | None] | None) -> Iterator[str]:
    for name, tensor in _tensors(read):
        if not tensor.is_floating_point():
            continue
        wrong = ~tensor.isfinite()
        if wrong.any():
            yield f"{name} holds {int(wrong.sum())} values that are not finite, of {tensor.numel()}"
        elif name in ("scale", "super_scales") and (tensor < 0).any():
            yield f"{name} holds {int((tensor < 0).sum())} negative scales, of {tensor.numel()}"


def _tensors(read: Weight | Tensor | tuple[Tensor, Tensor | None] | None) -> Iterator[tuple[str, Tensor]]:
    match read:
        case None:
            return
        case Tensor():
            yield "weight", read
        case (Tensor() as gate, bias):
            yield "weight", gate
            if bias is not None:
                yield "e_score_correction_bias", bias
        case SplitWeight(parts):
            for part in parts:
                yield from _tensors(part)
        case _:
            for field in dataclasses.fields(read):
                value = getattr(read, field.name)
                if isinstance(value, Tensor):
                    yield field.name, value


def _formats(
    config: ModelConfig, quantization: QuantizationConfig, naming: Naming, by_module: Counter[str]
) -> Iterator[FormatUse]:
    for part in PARTS:
        current: FormatUse | None = None
        for layer in range(config.num_hidden_layers):
            matrices = [matrix for matrix in layer_matrices(config, layer) if matrix.part == part]
            if not matrices:
                continue
            description = _describe(quantization.format(part, layer))
            weights = sum(matrix.num_weights for matrix in matrices)
            size = sum(by_module[stored] for matrix in matrices for stored in naming.parts(matrix.module))
            if current is not None and current.format == description:
                current = dataclasses.replace(
                    current,
                    last=layer,
                    num_weights=current.num_weights + weights,
                    num_bytes=current.num_bytes + size,
                )
                continue
            if current is not None:
                yield current
            current = FormatUse(part, description, layer, layer, weights, size)
        if current is not None:
            yield current


def _describe(weight_format: WeightFormat) -> str:
    options = [f"{name} {value}" for name, value in format_options(weight_format).items() if value not in (None, False)]
    return " ".join([weight_format.name, *([f"({', '.join(options)})"] if options else [])])


def _row_order(quantization: QuantizationConfig) -> RowOrder | str | None:
    orders = {rule.format.row_order for rule in quantization.rules if isinstance(rule.format, Wint2)}
    if not orders:
        return None
    return "unknown" if None in orders else ", ".join(sorted(order for order in orders if order is not None))


def _part(name: str) -> str:
    """The key of :data:`TITLES` that a tensor counts under."""
    if name.startswith(names.MTP):
        return "mtp"
    for fragment, part in (
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.shared_experts.", "shared_experts"),
        (".mlp.gate.", "router"),
        (".mlp.moe_statics.", "router"),
        (".mlp.", "mlp"),
        ("norm.", "norms"),
        ("embed_tokens.", "embedding"),
        ("lm_head.", "embedding"),
    ):
        if fragment in name:
            return part
    return "other"
