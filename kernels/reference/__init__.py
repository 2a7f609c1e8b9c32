"""Each operation in plain torch: its meaning, what tests compare with, and what a device without kernels runs."""

from kernels.reference.attention import attention_metadata, decode_metadata, paged_attention
from kernels.reference.cache import rotary_store_kv, store_kv
from kernels.reference.dequantize import dequantize
from kernels.reference.linear import embedding, linear, prepare, prepare_embedding
from kernels.reference.moe import fused_moe, route, silu_and_mul
from kernels.reference.norm import add_rms_norm, rms_norm
from kernels.reference.rotary import rotary, rotary_table

__all__ = [
    "add_rms_norm",
    "attention_metadata",
    "decode_metadata",
    "dequantize",
    "embedding",
    "fused_moe",
    "linear",
    "paged_attention",
    "prepare",
    "prepare_embedding",
    "rms_norm",
    "rotary",
    "rotary_store_kv",
    "rotary_table",
    "route",
    "silu_and_mul",
    "store_kv",
]
