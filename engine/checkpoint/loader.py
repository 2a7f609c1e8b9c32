"""One rank's share of a checkpoint, module by module."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import names
from engine.checkpoint.folders import Checkpoint
from engine.checkpoint.matrices import Cut, MatrixReader
from engine.checkpoint.partition import Partition, check_size, obstacle
from engine.checkpoint.reader import FLOATS
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from engine.quantization.bf16 import Bf16
from engine.quantization.config import Part, QuantizationConfig
from engine.quantization.format import RowOrder, Span, WeightFormat
from engine.quantization.wint2 import ROW_ORDER_ADVICE
from kernels.operands import DenseWeight, Weight

logger = logging.getLogger(__name__)

_COPIED_AT_ONCE = 1 << 26
"""Bytes of the vocabulary's tables in flight; a table may be larger than a layer."""


class ShardedWeights:
    """The share of one rank of one checkpoint, pulled by the model layer by layer.

    Each call reads one module from the mapped files, cuts it, and puts it on ``device``; beyond what it returns, host
    memory holds one matrix. Unquantized weights come in ``dtype``, quantized ones packed as ``kernels.operands``.

    Args:
        folder: a ``-PT`` (torch names) or ``-Paddle`` model folder, whole or cut into rank folders for any number of
            ranks.
        config: its config.
        rank: which of ``world_size`` tensor-parallel ranks.
        world_size: the tensor-parallel size.
        dtype: of unquantized weights.
        device: where the weights go.
        quantization: the formats to read; by default what config.json says (see ``engine.quantization.served``).
        row_order: of WINT2 experts, where the checkpoint does not say it.
        progress: called after each module with its name, the bytes of the checkpoint done and all of them.

    Raises:
        CheckpointError: files are missing or damaged, or a tensor is not what the config says.
        UnsupportedError: an unknown quantization, or a size that the model or a format can't be cut for.
        ConfigError: the row order of WINT2 experts is not known.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: QuantizationConfig | None = None,
        row_order: RowOrder | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._config = config
        self._quantization = quantization or QuantizationConfig.from_json(config.quantization)
        if row_order is not None:
            self._quantization = self._quantization.with_row_order(row_order)
        check_size(config, self._quantization, world_size)
        self._partition = Partition(config, rank, world_size)
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._checkpoint = Checkpoint(folder)
        self._naming = names.detect(self._checkpoint)
        self._unread = {name for name in self._checkpoint if not names.is_extra(name)}
        self._bytes_total = sum(self._checkpoint.num_bytes(name) for name in self._unread)
        self._bytes_done = 0
        self._matrices = MatrixReader(self._checkpoint, self._naming, self._partition, device, on_read=self._count)
        self._tied_table: Tensor | None = None
        self._check_parts()
        self._check_quantization()

    def embedding(self) -> Tensor:
        """The token table: this rank's rows of the vocabulary [V/world_size, H], zeros beyond its end."""
        if self._tied_table is not None:
            return self._tied_table
        table = self._vocabulary_rows(self._naming.name("embed_tokens.weight"), out_in=True)
        if self._config.tie_word_embeddings:
            self._tied_table = table
        self._report("embed_tokens")
        return table

    def head(self) -> DenseWeight:
        """The logits projection, N = the rows of :meth:`embedding`; shares its memory where they are tied."""
        if self._config.tie_word_embeddings:
            return DenseWeight(self.embedding())
        name = self._naming.name("lm_head.weight")
        if name not in self._checkpoint:
            raise CheckpointError(
                f"{self._checkpoint.folder} has no tensor {name!r}, and tie_word_embeddings is false in its "
                "config.json; set it to true if the embedding is the head"
            )
        rows = self._vocabulary_rows(name, out_in=self._naming.out_in)
        self._report("lm_head")
        return DenseWeight(rows)

    def norm(self, name: str) -> Tensor:
        """The weight [H] of a norm: "layers.3.input_layernorm", "layers.3.post_attention_layernorm" or "norm"."""
        weight = self._read(self._naming.name(f"{name}.weight"), (self._config.hidden_size,))
        self._report(name)
        return self._arrive(weight, self._dtype)

    def qkv(self, layer: int) -> Weight:
        """The joint projection of attention, N = [q | k | v] of this rank's heads."""
        return self._matrix("attention", layer, "self_attn.qkv_proj", Partition.qkv)

    def qkv_bias(self, layer: int) -> Tensor | None:
        """The bias [N] of :meth:`qkv`, in ``dtype``; None where the checkpoint has none."""
        bias = self._matrices.bias(f"layers.{layer}.self_attn.qkv_proj", Partition.qkv)
        if bias is None:
            return None
        bias = self._arrive(bias, self._dtype)
        self._report(f"layers.{layer}.self_attn.qkv_proj.bias")
        return bias

    def attention_output(self, layer: int) -> Weight:
        """The output projection of attention, K cut to this rank's heads."""
        heads_width = self._config.num_attention_heads * self._config.head_dim
        return self._matrix("attention", layer, "self_attn.o_proj", lambda part: part.rows(heads_width))

    def gate_up(self, layer: int, *, shared: bool = False) -> Weight:
        """The first projection of the dense MLP (or of the shared experts), N = [gate | up] of this rank."""
        width = self._width(shared)
        return self._mlp(layer, "up_gate_proj", shared, lambda part: part.gate_up(width))

    def down(self, layer: int, *, shared: bool = False) -> Weight:
        """The second projection of the dense MLP (or of the shared experts), K cut."""
        width = self._width(shared)
        return self._mlp(layer, "down_proj", shared, lambda part: part.rows(width))

    def router(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """The router's gate, fp32 [E, H], and its correction bias, fp32 [E], where the checkpoint has one."""
        experts = self._experts()
        gate_name = self._naming.name(f"layers.{layer}.mlp.gate.weight")
        gate = self._arrive(self._read_linear(gate_name, experts, self._config.hidden_size), torch.float32)
        bias = None
        bias_name = self._naming.name(f"layers.{layer}.mlp.moe_statics.e_score_correction_bias")
        if bias_name in self._checkpoint:
            flat = self._checkpoint.parts[0].info(bias_name).shape == (experts,)
            stored = self._read(bias_name, (experts,) if flat else (1, experts))
            bias = self._arrive(stored.reshape(experts), torch.float32)
        self._report(f"layers.{layer}.mlp.gate")
        return gate, bias

    def expert_gate_up(self, layer: int) -> Weight:
        """The routed experts' first projections, stacked [E, ...], N = [gate | up] of this rank."""
        return self._stacked(layer, "up_gate_proj", lambda part: part.gate_up(self._expert_width()))

    def expert_down(self, layer: int) -> Weight:
        """The routed experts' second projections, stacked [E, ...], K cut."""
        return self._stacked(layer, "down_proj", lambda part: part.rows(self._expert_width()))

    def expert_down_of(self, layer: int, expert: int) -> Weight:
        """What :meth:`expert_down` holds of one expert, alone."""
        width = self._expert_width()
        return self._matrix("experts", layer, f"mlp.experts.{expert}.down_proj", lambda part: part.rows(width))

    def close(self) -> None:
        """Close the files; logs the tensors that nobody asked for, if any."""
        if self._unread:
            logger.info(
                "%s: %d tensors were not read, among them %s",
                self._checkpoint.folder,
                len(self._unread),
                ", ".join(sorted(self._unread)[:5]),
            )
        self._tied_table = None
        self._checkpoint.close()

    def _check_parts(self) -> None:
        count = len(self._checkpoint.parts)
        reason = obstacle(self._config, self._quantization, count)
        if reason is not None:
            raise CheckpointError(
                f"{self._checkpoint.folder} has {count} rank folders, but the model can't be cut for {count} ranks: "
                f"{reason}; is a folder missing, or of another model?"
            )

    def _check_quantization(self) -> None:
        formats = {rule.format.name for rule in self._quantization.rules} - {Bf16.name}
        if formats and not self._naming.fused:
            raise UnsupportedError(
                f"{self._checkpoint.folder}: quantized weights ({', '.join(sorted(formats))}) under "
                f"{self._naming.kind} names; quantized checkpoints are supported under Paddle names"
            )
        if not self._quantization.row_order_known:
            raise ConfigError(
                f"{self._checkpoint.folder} holds WINT2 experts and its config.json does not say their row order. "
                f"{ROW_ORDER_ADVICE}"
            )

    def _matrix(self, part: Part, layer: int, projection: str, cut: Cut) -> Weight:
        module = f"layers.{layer}.{projection}"
        weight = self._matrices.matrix(module, self._format(part, layer), cut)
        self._report(module)
        return weight

    def _mlp(self, layer: int, projection: str, shared: bool, cut: Cut) -> Weight:
        if shared:
            return self._matrix("shared_experts", layer, f"mlp.shared_experts.{projection}", cut)
        return self._matrix("mlp", layer, f"mlp.{projection}", cut)

    def _stacked(self, layer: int, projection: str, cut: Cut) -> Weight:
        weight_format = self._format("experts", layer)
        prefix = f"layers.{layer}.mlp.experts"
        modules = [f"{prefix}.{expert}.{projection}" for expert in range(self._experts())]
        weight = self._matrices.stack(modules, weight_format, cut)
        self._report(f"{prefix}.{projection}")
        return weight

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._checkpoint.read_replicated(name, shape=shape, dtypes=FLOATS)
        self._count(name)
        return tensor

    def _count(self, name: str) -> None:
        if name in self._unread:
            self._unread.remove(name)
            self._bytes_done += self._checkpoint.num_bytes(name)

    def _read_linear(self, name: str, out_features: int, in_features: int) -> Tensor:
        """A view [out, in] of an unquantized linear's weight."""
        if self._naming.out_in:
            return self._read(name, (out_features, in_features))
        return self._read(name, (in_features, out_features)).T

    def _vocabulary_rows(self, name: str, *, out_in: bool) -> Tensor:
        """This rank's rows [V/world_size, H] of the embedding or head; each part of the checkpoint holds some."""
        vocab, hidden = self._config.vocab_size, self._config.hidden_size
        wanted = self._partition.vocabulary()
        rows = torch.zeros((len(wanted), hidden), dtype=self._dtype, device=self._device)
        for i, part in enumerate(self._matrices.held):
            held = part.vocabulary()
            end = min(held.stop, vocab)
            stored = self._checkpoint.parts[i].info(name).shape[0 if out_in else -1 :][:1]
            count = len(held) if stored == (len(held),) else end - held.start  # the last part is padded, or short
            shape = (count, hidden) if out_in else (hidden, count)
            table = self._checkpoint.read(i, name, shape=shape, dtypes=FLOATS)
            both = Span(max(wanted.start, held.start), min(wanted.stop, end))
            if both.start < both.stop:
                target = rows[both.start - wanted.start : both.stop - wanted.start]
                source = slice(both.start - held.start, both.stop - held.start)
                if out_in:
                    self._copy(table[source], target)
                else:
                    self._copy(table[:, source], target.T)
        self._count(name)
        return rows

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a mapped table in the order of its file, letting go of it on the way."""
        rows = max(1, _COPIED_AT_ONCE // (source.shape[1] * source.element_size()))
        for start in range(0, source.shape[0], rows):
            target[start : start + rows].copy_(source[start : start + rows])
            self._checkpoint.release()

    def _arrive(self, view: Tensor, dtype: torch.dtype) -> Tensor:
        return view.to(self._device, dtype, copy=True).contiguous()

    def _format(self, part: Part, layer: int) -> WeightFormat:
        return dataclasses.replace(self._quantization.format(part, layer), dtype=self._dtype)

    def _width(self, shared: bool) -> int:
        if not shared:
            return self._config.intermediate_size
        return self._config.moe.shared_intermediate_size if self._config.moe else 0

    def _expert_width(self) -> int:
        return self._config.moe.intermediate_size if self._config.moe else 0

    def _experts(self) -> int:
        return self._config.moe.num_experts if self._config.moe else 0

    def _report(self, what: str) -> None:
        self._checkpoint.release()
        if self._progress is not None:
            self._progress(what, self._bytes_done, self._bytes_total)
