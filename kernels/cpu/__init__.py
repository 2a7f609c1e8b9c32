"""The operations made fast for a CPU: few torch calls, no Python loop over tokens.

What is missing here is already fast as `kernels.reference` has it.
"""

from kernels.cpu.attention import attention_metadata, paged_attention, store_kv
from kernels.cpu.linear import embedding
from kernels.cpu.moe import fused_moe, route, silu_and_mul
from kernels.cpu.norm import add_rms_norm, rms_norm
from kernels.cpu.rotary import rotary, rotary_table
from kernels.reference import linear, prepare

__all__ = [
    "add_rms_norm",
    "attention_metadata",
    "embedding",
    "fused_moe",
    "linear",
    "paged_attention",
    "prepare",
    "rms_norm",
    "rotary",
    "rotary_table",
    "route",
    "silu_and_mul",
    "store_kv",
]
