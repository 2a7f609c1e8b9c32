"""A pre-norm decoder with rotary positions: what ERNIE-4.5 and Qwen2 do in a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.execution.parallel import TensorParallelGroup
from engine.layers.attention import Attention, AttentionInputs
from engine.layers.embedding import LogitsHead, VocabParallelEmbedding
from engine.layers.linear import GatedMLP
from engine.layers.moe import SparseMoE
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from kernels import ops


class DecoderLayer:
    """Attention and feed-forward, each with one sum over the ranks."""

    def __init__(
        self,
        *,
        input_norm: RMSNorm,
        attention: Attention,
        post_attention_norm: RMSNorm,
        mlp: GatedMLP | SparseMoE,
        group: TensorParallelGroup,
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.mlp = mlp
        self.group = group

    def __call__(
        self, x: Tensor, residual: Tensor | None, kv_cache: ops.LayerCache, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """(output of the layer before, residual stream without it) -> the same for this layer; [T, H] each.

        In the first layer `x` is the embedding and `residual` None. The sum is left to the next norm, which fuses it.
        """
        hidden, residual = (self.input_norm(x), x) if residual is None else self.input_norm.add(x, residual)
        hidden = self.group.all_reduce(self.attention(hidden, kv_cache, inputs))
        hidden, residual = self.post_attention_norm.add(hidden, residual)
        return self.group.all_reduce(self.mlp(hidden)), residual


class Decoder:
    """One rank's share of a decoder, made by an `engine.models.builder.DecoderBuilder`."""

    def __init__(
        self,
        *,
        rotary: RotaryEmbedding,
        embedding: VocabParallelEmbedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: LogitsHead,
    ) -> None:
        self.rotary = rotary
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[ops.LayerCache],
        *,
        slot_mapping: Tensor,
        metadata: ops.AttentionMetadata,
        logits_rows: Tensor,
    ) -> Tensor | None:
        """Run a flat batch; see `engine.models.DecoderModel`."""
        inputs = AttentionInputs(self.rotary.table(positions), slot_mapping, metadata)
        x, residual = self.embedding(token_ids), None  # [T, H]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, kv_cache, inputs)
        x = x.index_select(0, logits_rows)  # only these rows' norm and logits are wanted: [S, H]
        if residual is not None:
            x = x + residual.index_select(0, logits_rows)
        return self.head(self.norm(x))
