"""One rank: its device, its share of the model and of the cache."""

from __future__ import annotations

import logging
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
from engine.execution.batch import StepInput
from engine.execution.experts import ExpertLoad
from engine.execution.graphs import CudaCapture, graph_sizes
from engine.execution.machine import available_cores, choose_device, choose_dtype, choose_max_model_len
from engine.execution.memory import CacheNeed, shortage
from engine.execution.parallel import TensorParallelGroup
from engine.execution.profile import profile
from engine.execution.runner import ModelRunner
from engine.execution.warmup import warm_up
from engine.layers.attention import heads_per_rank
from engine.models import DecoderModel, build_model
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import RowOrder
from engine.quantization.served import as_served
from engine.quantization.vocabulary import savings
from kernels import ops

logger = logging.getLogger(__name__)

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
        self._graph_sizes: tuple[int, ...] = ()
        self._num_kv_blocks = 0
        self._shortage: str | None = None
        self._decoder: DecoderModel | None = None
        self._runner: ModelRunner | None = None
        self._experts: ExpertLoad | None = None

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
        self._enter_thread()
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
                self._decoder = build_model(
                    self.model,
                    weights,
                    self.group,
                    dtype=self.dtype,
                    device=self.device,
                    quantize_embeddings=self.config.quantize_embeddings,
                )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"the weights of rank {self.group.rank} do not fit into the memory of {self.device} "
                f"({self._taken()}{error}); "
                f"raise tensor_parallel_size (now {self.group.world_size}), or use a model of fewer bits a weight"
            ) from error
        finally:
            weights.close()
        if self.config.expert_load and self.group.rank == 0:  # every rank routes every token, so one count will do
            self._experts = ExpertLoad(self._decoder, self.device)

    def connect(self, check: Callable[[], None] | None = None) -> None:
        """Meet the other ranks, and make the KV cache: as many blocks as the rank with the least memory can hold.

        Args:
            check: called while waiting for the others; raises if that is in vain.

        Raises:
            ConfigError: one sequence of max_model_len does not fit into the cache.
            EngineDeadError: another rank did not come.
        """
        self._enter_thread()
        self.group.connect(self._rendezvous, self.device, check)
        self._graph_sizes = graph_sizes(self.config, self.device, self.dtype, self.group.world_size)
        num_blocks = self.group.minimum(self._num_blocks(), self.device)
        # Only now: a rank that gave up before would leave the others waiting for it.
        if self._shortage is not None:
            raise ConfigError(self._shortage)
        kv_cache.check_fits(
            num_blocks,
            self.max_model_len,
            block_size=self.config.block_size,
            bytes_per_block=self._block_bytes(),
            option=self._blocks_option(),
        )
        self._num_kv_blocks = num_blocks
        self._runner = self._make_runner(num_blocks + bool(self._graph_sizes))
        # Before graphs: what they record must be compiled.
        warm_up(self._runner, self.config, self.model, max_model_len=self.max_model_len, num_blocks=num_blocks)
        self._capture(self._runner)
        if self._experts is not None:
            self._experts.reset()  # all the steps until here were nobody's

    def execute(self, step: StepInput) -> Tensor | None:
        """Run a flat batch, at the same time on every rank: fp32 logits [S, vocab_size] on rank 0, None elsewhere."""
        if self._runner is None:
            raise RuntimeError("execute() on a worker that is not initialized, or closed")
        if self._threads_set_in != threading.get_ident():
            self._enter_thread()
        return self._runner.run(step)

    def close(self) -> None:
        """Leave the group and let go of the memory; may be called again."""
        self._decoder = None
        self._runner = None
        self._experts = None
        self.group.close()

    def expert_load(self) -> dict[int, list[int]] | None:
        """By MoE layer, the tokens that each expert has had since the start; None unless rank 0 counts them.

        Waits for the device; may be called from any thread.
        """
        return None if self._experts is None else self._experts.read()

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of the KV cache; known once connected."""
        if self._runner is None:
            raise RuntimeError("num_kv_blocks of a worker that is not initialized, or closed")
        return self._num_kv_blocks

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

    def _enter_thread(self) -> None:
        # OpenMP keeps the number of threads, and CUDA the device that kernels start on, for each thread by itself.
        torch.set_num_threads(self._num_threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._threads_set_in = threading.get_ident()

    def _make_runner(self, num_blocks: int) -> ModelRunner:
        if self._decoder is None:
            raise RuntimeError("connect() before load(), or after close()")
        cache = kv_cache.allocate(
            self.model,
            self._num_kv_heads,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            dtype=kv_cache.cache_dtype(self.config, self.dtype),
            device=self.device,
        )
        return ModelRunner(self._decoder, cache, dtype=self.dtype, device=self.device)

    def _block_bytes(self, dtype: torch.dtype | None = None) -> int:
        """With keys and values in the configured dtype, or in another."""
        dtype = dtype or kv_cache.cache_dtype(self.config, self.dtype)
        return kv_cache.block_bytes(self.model, self._num_kv_heads, block_size=self.config.block_size, dtype=dtype)

    def _num_blocks(self) -> int:
        if self.config.num_kv_blocks is not None:
            return self.config.num_kv_blocks
        if self.device.type == "cpu":
            return kv_cache.blocks_on_cpu(self.config, self.max_model_len, self._block_bytes())
        return self._blocks_on_gpu(self._block_bytes())

    def _blocks_on_gpu(self, block_bytes: int) -> int:
        memory = profile(
            self._make_runner,
            self.config,
            self.device,
            block_bytes=block_bytes,
            graph_sizes=self._graph_sizes,
            max_blocks=self._max_blocks,
            vocab_size=self.model.vocab_size,
        )
        need = CacheNeed(self.max_model_len, block_bytes, self._block_bytes(torch.int8))
        heads = self.model.num_attention_heads
        self._shortage = shortage(
            memory,
            need,
            self.config,
            rank=self.group.rank,
            num_heads=heads,
            embedding_savings=savings(self.model, self.group.world_size, self.config.quantize_embeddings),
        )
        return kv_cache.blocks_on_gpu(
            self.config,
            block_bytes,
            total=memory.total,
            used=memory.weights + memory.other,
            activations=memory.activations + memory.graphs,
        )

    def _capture(self, runner: ModelRunner) -> None:
        if not self._graph_sizes:
            return
        if self.device.type == "cpu":
            try:
                runner.capture(ops.record, self._graph_sizes, max_blocks=self._max_blocks)
            except ConfigError as error:  # a layer that looks at values, as torch's experts do
                logger.info("running without recorded steps: %s", error)
            return
        try:
            runner.capture(CudaCapture(self.device), self._graph_sizes, max_blocks=self._max_blocks)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"no memory for the CUDA graphs of {len(self._graph_sizes)} batch sizes on {self.device} "
                f"({self._taken()}{error}); lower gpu_memory_utilization (now {self.config.gpu_memory_utilization}) or "
                f"max_num_seqs (now {self.config.max_num_seqs}), or set enforce_eager: true"
            ) from error

    @property
    def _max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.config.block_size)

    def _taken(self) -> str:
        if self.device.type == "cpu":
            return ""
        free, total = torch.cuda.mem_get_info(self.device)
        taken = torch.cuda.memory_allocated(self.device)
        return f"{taken / 1e9:,.2f} GB taken by this rank, {free / 1e9:,.2f} of {total / 1e9:,.2f} GB free: "

    def _blocks_option(self) -> str:
        if self.config.num_kv_blocks is not None:
            return f"num_kv_blocks {self.config.num_kv_blocks}"
        if self.device.type == "cpu":
            return f"cpu_kv_cache_bytes {self.config.cpu_kv_cache_bytes}, max_num_seqs {self.config.max_num_seqs}"
        return f"gpu_memory_utilization {self.config.gpu_memory_utilization}"
