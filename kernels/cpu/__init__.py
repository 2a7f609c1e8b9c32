"""The operations made fast for a CPU: compiled where torch would take many calls, large weights as packed as stored.

What comes from `kernels.reference` is fast enough as it is there, or runs once a step.
"""

from kernels.cpu.activation import silu_and_mul
from kernels.cpu.attention import attention_metadata, decode_metadata, paged_attention
from kernels.cpu.cache import rotary_store_kv, store_kv
from kernels.cpu.linear import embedding, linear
from kernels.cpu.moe import fused_moe, route
from kernels.cpu.norm import add_rms_norm, rms_norm
from kernels.cpu.storage import prepare
from kernels.reference.linear import prepare_embedding
from kernels.reference.rotary import rotary, rotary_table

__all__ = [
    "add_rms_norm",
    "attention_metadata",
    "decode_metadata",
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
