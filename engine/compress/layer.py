"""One decoder layer in memory: its weights, and whole sequences through it as the engine computes them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engine.compress.modules import Matrix
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedError
from engine.execution.parallel import TensorParallelGroup
from engine.layers.attention import AttentionInputs
from engine.layers.rotary import RotaryEmbedding
from engine.layers.weights import WeightSource
from engine.models import model_builder
from engine.models.decoder import DecoderLayer
from engine.quantization.format import WeightFormat
from kernels import ops
from kernels.operands import DenseWeight, Weight


class LayerWeights:
    """The weights of one layer, read once and kept; a `WeightSource` for that layer.

    :meth:`decode` writes quantized values over a matrix, so that a layer built afterwards is what a server runs.

    Args:
        source: unquantized weights in the compute dtype, on the compute device.
        config: the model.
        layer: which layer.

    Raises:
        UnsupportedError: the source is quantized.
    """

    def __init__(self, source: WeightSource, config: ModelConfig, layer: int) -> None:
        self._source = source
        self._layer = layer
        prefix = f"layers.{layer}"
        self._norms = {
            name: source.norm(name) for name in (f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm")
        }
        self._qkv_bias = source.qkv_bias(layer)
        self._router: tuple[Tensor, Tensor | None] | None = None
        self._matrices = {
            "self_attn.qkv_proj": unquantized(source.qkv(layer)),
            "self_attn.o_proj": unquantized(source.attention_output(layer)),
        }
        moe = config.moe if config.is_moe_layer(layer) else None
        if moe is None:
            self._matrices["mlp.up_gate_proj"] = unquantized(source.gate_up(layer))
            self._matrices["mlp.down_proj"] = unquantized(source.down(layer))
            return
        self._router = source.router(layer)
        self._matrices["mlp.experts.up_gate_proj"] = unquantized(source.expert_gate_up(layer))  # [E, 2I, H]
        self._matrices["mlp.experts.down_proj"] = unquantized(source.expert_down(layer))  # [E, H, I]
        if moe.num_shared_experts:
            self._matrices["mlp.shared_experts.up_gate_proj"] = unquantized(source.gate_up(layer, shared=True))
            self._matrices["mlp.shared_experts.down_proj"] = unquantized(source.down(layer, shared=True))

    def matrix(self, matrix: Matrix) -> Tensor:
        """The weights [N, K] of a matrix of this layer; a view.

        Raises:
            CheckpointError: there are values in it that are not finite.
        """
        weight = self._view(matrix)
        if not weight.isfinite().all():
            raise CheckpointError(f"{matrix.module} holds values that are not finite; it can't be quantized")
        return weight

    def decode(self, matrix: Matrix, weight_format: WeightFormat, tensors: Mapping[str, Tensor]) -> None:
        """Replace a matrix by what ``tensors`` mean in the compute dtype."""
        weight = self._view(matrix)
        here = {suffix: tensor.to(weight.device) for suffix, tensor in tensors.items()}
        decoded = dataclasses.replace(weight_format, dtype=weight.dtype).dequantize(here)  # [K, N]
        weight.copy_(decoded.T)

    def copy(self) -> LayerWeights:
        """The same, with matrices of its own to decode into."""
        other = copy.copy(self)
        other._matrices = {name: weight.clone() for name, weight in self._matrices.items()}
        return other

    def experts(self) -> tuple[Tensor, Tensor]:
        """The routed experts' first and second projections, [E, 2I, H] and [E, H, I]."""
        return self._matrices["mlp.experts.up_gate_proj"], self._matrices["mlp.experts.down_proj"]

    def _view(self, matrix: Matrix) -> Tensor:
        if matrix.expert is None:
            return self._matrices[matrix.name]
        return self._matrices[f"mlp.experts.{matrix.name.rpartition('.')[2]}"][matrix.expert]

    # What follows is `WeightSource`, for the one layer.

    def embedding(self) -> Tensor:
        """The source's."""
        return self._source.embedding()

    def head(self) -> Weight:
        """The source's."""
        return self._source.head()

    def norm(self, name: str) -> Tensor:
        """[H]."""
        return self._norms[name]

    def qkv(self, layer: int) -> Weight:
        """(H, (heads + 2 kv_heads) D)."""
        return self._operand(layer, "self_attn.qkv_proj")

    def qkv_bias(self, layer: int) -> Tensor | None:
        """[N] of `qkv`, or None."""
        self._check(layer)
        return self._qkv_bias

    def attention_output(self, layer: int) -> Weight:
        """(heads D, H)."""
        return self._operand(layer, "self_attn.o_proj")

    def gate_up(self, layer: int, *, shared: bool = False) -> Weight:
        """(H, 2I)."""
        return self._operand(layer, "mlp.shared_experts.up_gate_proj" if shared else "mlp.up_gate_proj")

    def down(self, layer: int, *, shared: bool = False) -> Weight:
        """(I, H)."""
        return self._operand(layer, "mlp.shared_experts.down_proj" if shared else "mlp.down_proj")

    def router(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Gate fp32 [E, H] and bias fp32 [E]."""
        self._check(layer)
        if self._router is None:
            raise ValueError(f"layer {layer} has no router")
        return self._router

    def expert_gate_up(self, layer: int) -> Weight:
        """(E, H, 2I)."""
        return self._operand(layer, "mlp.experts.up_gate_proj")

    def expert_down(self, layer: int) -> Weight:
        """(E, I, H)."""
        return self._operand(layer, "mlp.experts.down_proj")

    def close(self) -> None:
        """The source stays open for the other layers."""

    def _operand(self, layer: int, name: str) -> DenseWeight:
        self._check(layer)
        return DenseWeight(self._matrices[name])

    def _check(self, layer: int) -> None:
        if layer != self._layer:
            raise ValueError(f"weights of layer {self._layer}, asked for layer {layer}")


class SequenceRunner:
    """Whole sequences of one length through single layers: a prefill, with a cache of one block for each sequence.

    Args:
        config: the model.
        length: L, tokens of every sequence.
        dtype: compute dtype.
        device: compute device.
    """

    def __init__(self, config: ModelConfig, *, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._length = length
        self._dtype = dtype
        self._device = device
        self._rotary = RotaryEmbedding(config.head_dim, config.rope_theta, device)
        self._prepared: tuple[ops.LayerCache, AttentionInputs] | None = None
        self._sequences = 0

    def build(self, weights: LayerWeights, layer: int) -> DecoderLayer:
        """The layer as the model's own builder makes it; dense weights are shared, not copied."""
        group = TensorParallelGroup(0, 1)
        return model_builder(self._config, weights, group, dtype=self._dtype, device=self._device).layer(layer)

    def run(self, layer: DecoderLayer, states: Tensor) -> Tensor:
        """Residual stream before the layer -> after it, [sequences, L, H] each; the result is on the device."""
        cache, inputs = self.inputs(len(states))
        with torch.no_grad():
            x, residual = layer(states.to(self._device).flatten(0, 1), None, cache, inputs)
            return (x + residual).view(states.shape)

    def inputs(self, sequences: int) -> tuple[ops.LayerCache, AttentionInputs]:
        """A layer's cache, and what its attention needs to know, for so many sequences; used again and again."""
        if self._prepared is None or self._sequences != sequences:
            config, length = self._config, self._length
            shape = (sequences, length, config.num_key_value_heads, config.head_dim)
            cache = ops.LayerCache(
                torch.zeros(shape, dtype=self._dtype, device=self._device),
                torch.zeros(shape, dtype=self._dtype, device=self._device),
            )
            metadata = ops.attention_metadata(
                np.arange(sequences, dtype=np.int32)[:, None],
                np.arange(sequences + 1, dtype=np.int32) * np.int32(length),
                np.full(sequences, length, dtype=np.int32),
                block_size=length,
                dtype=self._dtype,
                device=self._device,
            )
            positions = torch.arange(length, device=self._device).repeat(sequences)
            slots = torch.arange(sequences * length, device=self._device)
            inputs = AttentionInputs(self._rotary.table(positions), slots, metadata)
            self._prepared, self._sequences = (cache, inputs), sequences
        return self._prepared


def unquantized(weight: Weight) -> Tensor:
    """The matrix [..., N, K] of an unquantized operand. Raises UnsupportedError for any other."""
    if not isinstance(weight, DenseWeight):
        raise UnsupportedError(f"expected unquantized weights, found {type(weight).__name__}")
    return weight.weight
