"""One rank: its device, its share of the model and of the cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine import row_order
from engine.checkpoint.loader import ShardedWeights
from engine.checkpoint.partition import check_size
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.execution import kv_cache
from engine.execution.batch import StepInput, dummy_step
from engine.execution.parallel import TensorParallelGroup
from engine.execution.runner import ModelRunner
from engine.layers.attention import heads_per_rank
from engine.models import DecoderModel, build_model
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import RowOrder
from engine.quantization.served import as_served

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[str, int, int], None]
"""(what is being loaded, bytes done, bytes in total)."""


class Worker:
    """A rank of an engine, from its folder to logits.

    Args:
        config: how to run.
        model: what to run.
        rank: 0 ... world_size - 1; rank 0 gets the logits.
        world_size: number of ranks.
        rendezvous: "tcp://host:port" on rank 0's machine (`parallel.free_address`); not needed for one rank.
        progress: told how far loading is.

    Raises:
        ConfigError: the options contradict each other, the model or the machine.
        UnsupportedError: the model can't be divided among so many ranks.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        rendezvous: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if world_size > 1 and rendezvous is None:
            raise ConfigError(f"{world_size} ranks need a rendezvous address")
        self.config = config
        self.model = model
        self.group = TensorParallelGroup(rank, world_size)
        self.device = choose_device(config, rank)
        self.dtype = choose_dtype(config, self.device)
        self.max_model_len = choose_max_model_len(config, model)
        self._quantization = as_served(
            QuantizationConfig.from_json(model.quantization), on_load=config.quantization, planes=config.planes
        )
        check_size(model, self._quantization, world_size)
        _, self._num_kv_heads = heads_per_rank(model, world_size)
        self._rendezvous = rendezvous or ""
        self._progress = progress
        self._num_threads = config.num_threads or max(1, available_cores() // world_size)
        self._threads_set_in: int | None = None
        self._decoder: DecoderModel | None = None
        self._runner: ModelRunner | None = None

    def initialize(self) -> None:
        """`load`, then `connect`."""
        self.load()
        self.connect()

    def load(self) -> None:
        """Read this rank's weights; needs no other rank.

        Raises:
            CheckpointError: the folder is not what its config.json says.
            ConfigError: no memory for the weights, or no telling in which row order they are.
        """
        self._limit_threads()
        folder = Path(self.config.model)
        weights = ShardedWeights(
            folder,
            self.model,
            rank=self.group.rank,
            world_size=self.group.world_size,
            dtype=self.dtype,
            device=self.device,
            quantization=self._quantization,
            row_order=self._row_order(folder),
            progress=self._progress,
        )
        try:
            with torch.inference_mode():
                self._decoder = build_model(self.model, weights, self.group, dtype=self.dtype, device=self.device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"the weights of rank {self.group.rank} do not fit into the memory of {self.device} ({error}); "
                f"raise tensor_parallel_size (now {self.group.world_size}), or use a model of fewer bits a weight"
            ) from error
        finally:
            weights.close()

    def connect(self, check: Callable[[], None] | None = None) -> None:
        """Meet the other ranks, and make the KV cache: as many blocks as the rank with the least memory can hold.

        Args:
            check: called while waiting for the others; raises if that is in vain.

        Raises:
            ConfigError: one sequence of max_model_len does not fit into the cache.
            EngineDeadError: another rank did not come.
        """
        self.group.connect(self._rendezvous, self.device, check)
        num_blocks = self.group.minimum(self._num_blocks(), self.device)
        kv_cache.check_fits(
            num_blocks,
            self.max_model_len,
            block_size=self.config.block_size,
            bytes_per_block=self._block_bytes(),
            option=self._blocks_option(),
        )
        self._runner = self._make_runner(num_blocks)

    def execute(self, step: StepInput) -> Tensor | None:
        """Run a flat batch, at the same time on every rank: fp32 logits [S, vocab_size] on rank 0, None elsewhere."""
        if self._runner is None:
            raise RuntimeError("execute() on a worker that is not initialized, or closed")
        if self._threads_set_in != threading.get_ident():
            self._limit_threads()
        return self._runner.run(step)

    def close(self) -> None:
        """Leave the group and let go of the memory; may be called again."""
        self._decoder = None
        self._runner = None
        self.group.close()

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of the KV cache; known once connected."""
        if self._runner is None:
            raise RuntimeError("num_kv_blocks of a worker that is not initialized, or closed")
        return self._runner.cache.num_blocks

    def _row_order(self, folder: Path) -> RowOrder | None:
        if self.config.row_order != "auto":
            return self.config.row_order
        reference = self.config.row_order_reference
        return row_order.resolve(
            folder,
            self.model,
            reference=None if reference is None else Path(reference),
            device=self.device,
            dtype=self.dtype,
        )

    def _limit_threads(self) -> None:
        # OpenMP keeps the number of threads for each thread that starts parallel work.
        torch.set_num_threads(self._num_threads)
        self._threads_set_in = threading.get_ident()

    def _make_runner(self, num_blocks: int) -> ModelRunner:
        if self._decoder is None:
            raise RuntimeError("connect() before load(), or after close()")
        cache = kv_cache.allocate(
            self.model,
            self._num_kv_heads,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return ModelRunner(self._decoder, cache, dtype=self.dtype, device=self.device)

    def _block_bytes(self) -> int:
        return kv_cache.block_bytes(self.model, self._num_kv_heads, block_size=self.config.block_size, dtype=self.dtype)

    def _num_blocks(self) -> int:
        if self.config.num_kv_blocks is not None:
            return self.config.num_kv_blocks
        if self.device.type == "cpu":
            return kv_cache.blocks_on_cpu(self.config, self.max_model_len, self._block_bytes())
        total, used, activations = self._profile()
        return kv_cache.blocks_on_gpu(self.config, self._block_bytes(), total=total, used=used, activations=activations)

    def _blocks_option(self) -> str:
        if self.config.num_kv_blocks is not None:
            return f"num_kv_blocks {self.config.num_kv_blocks}"
        if self.device.type == "cpu":
            return f"cpu_kv_cache_bytes {self.config.cpu_kv_cache_bytes}, max_num_seqs {self.config.max_num_seqs}"
        return f"gpu_memory_utilization {self.config.gpu_memory_utilization}"

    def _profile(self) -> tuple[int, int, int]:
        """(bytes of the GPU, bytes in use before a step, peak bytes of the largest step on top)."""
        free, total = torch.cuda.mem_get_info(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step = dummy_step(self.config.max_num_batched_tokens, self.config.max_num_seqs, self.config.block_size)
        runner = self._make_runner(step.block_tables.size)
        try:
            runner.run(step)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a step of max_num_batched_tokens {self.config.max_num_batched_tokens} does not fit beside the "
                f"weights in {self.device} ({error}); lower it, or raise tensor_parallel_size"
            ) from error
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        activations = peak - runner.cache.num_blocks * self._block_bytes()
        del runner
        torch.cuda.empty_cache()
        return total, total - free, activations


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
        raise ConfigError("device is 'cuda', but torch sees no GPU; use device='cpu' or 'auto'")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


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
