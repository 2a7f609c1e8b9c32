"""A stand-in for a model that is exact: its logits are a function of the whole context, read from its own KV cache."""

from __future__ import annotations

import random
import threading
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import RequestError
from engine.execution.batch import StepInput
from engine.messages import EngineRequest, StepOutput, TokenDelta
from engine.sampling_params import SamplingParams
from engine.structured.compiler import GrammarCompiler

VOCAB_SIZE = 32
USED_VOCAB_SIZE = 30
EOS = 2

MODEL = ModelConfig(
    architecture="ernie4_5",
    vocab_size=VOCAB_SIZE,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=8,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    eos_token_ids=(EOS,),
)


class ToyExecutor:
    """Stores each token and its position in the slot it is told, and reads whole contexts back through block tables.

    ``gate`` (open at first) holds up steps while it is closed; ``failure`` is raised by the next step.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, *, num_kv_blocks: int, block_size: int, max_model_len: int = 128) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.tokens = np.full(num_kv_blocks * block_size, -1)
        self.positions = np.full(num_kv_blocks * block_size, -1)
        self.steps = 0
        self.shutdowns = 0
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def execute(self, step: StepInput) -> Tensor:
        self.entered.set()
        assert self.gate.wait(timeout=30)
        if self.failure is not None:
            raise self.failure
        self.steps += 1
        self.tokens[step.slot_mapping] = step.token_ids
        self.positions[step.slot_mapping] = step.positions
        logits = torch.zeros(len(step.logits_rows), VOCAB_SIZE)
        owners = np.searchsorted(step.query_start, step.logits_rows, side="right") - 1
        for out, (row, request) in enumerate(zip(step.logits_rows, owners, strict=True)):
            logits[out] = toy_logits(self._context(step, int(request), int(step.positions[row]) + 1))
        return logits

    def _context(self, step: StepInput, request: int, length: int) -> np.ndarray:
        positions = np.arange(length)
        blocks = step.block_tables[request][positions // self.block_size]
        slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        assert (self.positions[slots] == positions).all()
        return self.tokens[slots]

    def shutdown(self) -> None:
        self.shutdowns += 1


def toy_logits(context: np.ndarray) -> Tensor:
    """Pseudo-random logits [VOCAB_SIZE] for a context; EOS is unlikely but possible, padding ids are the likeliest."""
    seed = int.from_bytes(blake2b(np.asarray(context, dtype=np.int64).tobytes(), digest_size=4).digest(), "little")
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    logits[EOS] -= 1.0
    logits[USED_VOCAB_SIZE:] = 9.0
    return logits


def make_core(executor: ToyExecutor, grammars: GrammarCompiler | None = None, **options: int | bool) -> EngineCore:
    config = EngineConfig.model_validate({"model": "toy", "max_num_seqs": 4, "max_num_batched_tokens": 16} | options)
    return EngineCore(config, MODEL, executor, used_vocab_size=USED_VOCAB_SIZE, eos_token_ids=[EOS], grammars=grammars)


def make_request(name: str, prompt: list[int], max_tokens: int = 8, **params: object) -> EngineRequest:
    options = {"temperature": 0.0, "seed": 0, "ignore_eos": True} | params
    return EngineRequest(name, prompt, SamplingParams.parse(**options), max_tokens)


class Collector:
    """Gathers the deltas of each request, and counts steps after which more requests wait than before."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.token_ids: dict[str, list[int]] = {}
        self.last: dict[str, TokenDelta] = {}
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.refused: dict[str, RequestError] = {}

    def __call__(self, output: StepOutput) -> None:
        self.refused |= output.refused
        for delta in output.deltas:
            name = delta.request_id
            if name in self.last:
                assert self.last[name].finish_reason is None, "a delta after the last"
            self.token_ids.setdefault(name, []).extend(delta.token_ids)
            self.last[name] = delta
            self.deltas.setdefault(name, []).append(delta)


def run(core: EngineCore, requests: list[EngineRequest]) -> Collector:
    """Add all at once and step until nothing is left."""
    collector = Collector()
    for request in requests:
        core.add(request)
    while core.load().waiting_requests + core.load().running_requests:
        core.wait()
        waiting = core.load().waiting_requests
        collector(core.step())
        collector.preemptions += core.load().waiting_requests > waiting
        core.check()
    assert core.load().free_blocks == core.load().total_blocks
    return collector


def mixed_requests(count: int, seed: int = 0) -> list[EngineRequest]:
    """Requests with shared prefixes, greedy and sampled, with and without EOS."""
    draw = random.Random(seed)
    stems = [[draw.randrange(3, USED_VOCAB_SIZE) for _ in range(24)] for _ in range(2)]
    return [
        make_request(
            f"r{i}",
            draw.choice(stems)[: draw.randrange(1, 24)]
            + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(4))],
            draw.randrange(1, 24),
            temperature=draw.choice([0.0, 0.0, 1.5]),
            seed=draw.randrange(100),
            ignore_eos=draw.random() < 0.7,
            min_tokens=draw.choice([0, 0, 5]),
        )
        for i in range(count)
    ]


def alone(request: EngineRequest) -> list[int]:
    """The tokens a request gets with an engine of its own, a large cache and no prefix caching."""
    core = make_core(ToyExecutor(num_kv_blocks=64, block_size=4), enable_prefix_caching=False)
    return run(core, [request]).token_ids[request.request_id]
