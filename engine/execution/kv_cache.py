"""The paged key-value cache: how many blocks fit, and the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from kernels import ops
from kernels.cache import SCALE_DTYPE, token_bytes


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one rank, in every layer the same number of blocks."""

    layers: list[ops.LayerCache]
    num_blocks: int
    block_size: int

    def clear(self) -> None:
        """As `allocate` made it: what steps of nobody's tokens left is forgotten."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
                if tensor is not None:
                    tensor.zero_()


def block_bytes(model: ModelConfig, num_kv_heads: int, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block on one rank: keys and values of all layers.

    ERNIE-4.5-300B-A47B has 54 layers and 8 kv heads of 128: a token takes 221,184 bytes in bf16, and in int8 half of
    that and 1,728 bytes of scales, 112,320.

    Args:
        model: for its layers and head size.
        num_kv_heads: of the rank.
        block_size: tokens in a block.
        dtype: of the cache, see `cache_dtype`.
    """
    return model.num_hidden_layers * block_size * token_bytes(num_kv_heads, model.head_dim, dtype)


def cache_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept in: the compute dtype `dtype`, or int8."""
    return torch.int8 if config.kv_cache_dtype == "int8" else dtype


def blocks_on_cpu(config: EngineConfig, max_model_len: int, bytes_per_block: int) -> int:
    """As many as ``max_num_seqs`` sequences of ``max_model_len`` need, within ``cpu_kv_cache_bytes``.

    ``min(max_num_seqs * ceil(max_model_len / block_size), cpu_kv_cache_bytes // bytes_per_block)``
    """
    wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(wanted, config.cpu_kv_cache_bytes // bytes_per_block)


def blocks_on_gpu(config: EngineConfig, bytes_per_block: int, *, total: int, used: int, activations: int) -> int:
    """What is left of the share of the GPU's memory this engine may take.

    ``(total * gpu_memory_utilization - used - activations) // bytes_per_block``

    Args:
        config: for ``gpu_memory_utilization``.
        bytes_per_block: see `block_bytes`.
        total: bytes of the GPU.
        used: bytes in use with the weights loaded, by anyone.
        activations: bytes a full step takes on top at its peak, from a profile run.
    """
    return max(0, int(total * config.gpu_memory_utilization) - used - activations) // bytes_per_block


def check_fits(num_blocks: int, max_model_len: int, *, block_size: int, bytes_per_block: int, option: str) -> None:
    """Refuse a cache that can't hold one sequence of the greatest length.

    Args:
        num_blocks: blocks there would be.
        max_model_len: tokens of the longest sequence.
        block_size: tokens in a block.
        bytes_per_block: of one rank.
        option: the option that decides the number of blocks, and its value, for the message.

    Raises:
        ConfigError: it is too small; the message has the numbers and what to change.
    """
    needed = -(-max_model_len // block_size)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache would hold {num_blocks} blocks of {block_size} tokens ({option}), but one sequence of "
            f"max_model_len {max_model_len} needs {needed} ({needed * bytes_per_block / 2**20:,.1f} MiB on each rank); "
            f"lower max_model_len to at most {num_blocks * block_size}, or raise the limit"
        )


def allocate(
    model: ModelConfig,
    num_kv_heads: int,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """Make the tensors, zeroed: what lies behind a context is multiplied by a zero weight, which NaN would survive.

    Args:
        model: for its layers and head size.
        num_kv_heads: of the rank.
        num_blocks: blocks.
        block_size: tokens in a block.
        dtype: of the cache, see `cache_dtype`; an int8 cache gets scales.
        device: where it shall be.

    Raises:
        ConfigError: there is not enough memory.
    """
    pages = (2, num_blocks, block_size, num_kv_heads, model.head_dim)
    scales = (2, num_blocks, num_kv_heads, block_size)
    size = block_bytes(model, num_kv_heads, block_size=block_size, dtype=dtype) * num_blocks
    try:
        layers = [
            ops.LayerCache(
                *_zeros(pages, dtype, device),
                *(_zeros(scales, SCALE_DTYPE, device) if dtype == torch.int8 else ()),
            )
            for _ in range(model.num_hidden_layers)
        ]
    except (MemoryError, RuntimeError) as error:
        raise ConfigError(
            f"no memory for a KV cache of {num_blocks} blocks, {size / 2**30:,.2f} GiB ({error}); lower num_kv_blocks, "
            "cpu_kv_cache_bytes (CPU) or gpu_memory_utilization (GPU), or max_model_len and max_num_seqs"
        ) from error
    return KVCache(layers, num_blocks, block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zeroed pages from the system, which cost memory and time only once they are used.
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
