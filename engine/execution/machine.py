"""What an engine makes of the machine it is on, where its options leave the choice."""

from __future__ import annotations

import os

import torch

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: GPU ``rank`` modulo the visible ones (a Ray actor sees one), or the CPU.

    Raises:
        ConfigError: a GPU is asked for, and none is visible.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU (`nvidia-smi` and `dibit env` tell why); "
            "use device='cpu' or 'auto'"
        )
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def check_gpus(world_size: int, available: int) -> None:
    """Refuse ranks of one machine that would share a GPU, which NCCL would do once all have loaded their weights.

    Raises:
        ConfigError: there are more ranks than GPUs.
    """
    if world_size > available:
        raise ConfigError(
            f"tensor_parallel_size is {world_size}, and torch sees {available} GPU(s); each rank needs one of its own: "
            "lower it, or let this process see more (`nvidia-smi`, CUDA_VISIBLE_DEVICES)"
        )


def choose_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The compute dtype: what the config says, else fp32 on a CPU and bf16 on a GPU."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[config.dtype]


def choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of the longest sequence: what the config says, else what the model was made for.

    Raises:
        ConfigError: more than the model was made for.
    """
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {config.max_model_len} exceeds the model's max_position_embeddings "
            f"{model.max_position_embeddings}"
        )
    return config.max_model_len
