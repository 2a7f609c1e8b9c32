"""The operations made fast for a CPU: few torch calls, no Python loop over tokens, large weights as packed as stored.

What is missing here is already fast as `kernels.reference` has it.
"""

from kernels.cpu.attention import attention_metadata, decode_metadata, paged_attention
from kernels.cpu.cache import rotary_store_kv, store_kv
from kernels.cpu.linear import embedding, linear
from kernels.cpu.moe import fused_moe, route, silu_and_mul
from kernels.cpu.norm import add_rms_norm, rms_norm
from kernels.cpu.rotary import rotary, rotary_table
from kernels.cpu.storage import prepare

__all__ = [
    "add_rms_norm",
    "attention_metadata",
    "decode_metadata",
    "embedding",
    "fused_moe",
    "linear",
    "paged_attention",
    "prepare",
    "rms_norm",
    "rotary",
    "rotary_store_kv",
    "rotary_table",
    "route",
    "silu_and_mul",
    "store_kv",
]
