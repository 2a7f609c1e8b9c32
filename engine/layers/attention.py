"""Grouped-query attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.config import ModelConfig
from engine.layers.linear import Linear
from kernels import ops


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the attention of every layer needs to know of a step.

    Attributes:
        rotary_table: from `RotaryEmbedding.table`.
        slot_mapping: int64 [T], where the step's keys and values go.
        metadata: from `ops.attention_metadata`.
    """

    rotary_table: Tensor
    slot_mapping: Tensor
    metadata: ops.AttentionMetadata


class Attention:
    """Self-attention of one layer, with a rank's share of the heads.

    Args:
        qkv: H -> (heads + 2 kv_heads) D.
        output: heads D -> H.
        num_heads: query heads of this rank.
        num_kv_heads: key-value heads of this rank.
        head_dim: D.
        rope_interleaved: which features of a head turn together; see `ops.rotary`.
    """

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_interleaved: bool,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_interleaved = rope_interleaved
        self.scale = head_dim**-0.5

    def __call__(self, x: Tensor, kv_cache: ops.LayerCache, inputs: AttentionInputs) -> Tensor:
        """[T, H] -> [T, H], a partial sum; `kv_cache` is this layer's keys and values, written and read."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [T, heads + 2 kv_heads, D]
        q = ops.rotary_store_kv(
            qkv,
            inputs.rotary_table,
            kv_cache,
            inputs.slot_mapping,
            num_heads=self.num_heads,
            interleaved=self.rope_interleaved,
        )
        out = ops.paged_attention(q, kv_cache, inputs.metadata, scale=self.scale)
        return self.output(out.flatten(1))


def heads_per_rank(config: ModelConfig, world_size: int) -> tuple[int, int]:
    """(query heads, key-value heads) of each rank; fewer key-value heads than ranks are replicated."""
    return config.num_attention_heads // world_size, max(1, config.num_key_value_heads // world_size)
