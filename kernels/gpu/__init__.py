"""The operations as Triton kernels; with the names of `kernels.cpu` (`kernels.backend.Kernels`)."""

from kernels.gpu.activation import silu_and_mul
from kernels.gpu.attention import paged_attention
from kernels.gpu.cache import store_kv
from kernels.gpu.embedding import embedding, prepare_embedding
from kernels.gpu.experts import fused_moe
from kernels.gpu.linear import linear, prepare
from kernels.gpu.metadata import attention_metadata, decode_metadata
from kernels.gpu.norm import add_rms_norm, rms_norm
from kernels.gpu.rotary import rotary, rotary_store_kv, rotary_table
from kernels.gpu.routing import route

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
