"""The step loop of one engine: schedule, compute, sample, append, stop."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.errors import RequestError
from engine.execution.batch import StepInput, build_step_input
from engine.execution.sampler import Sampled, Sampler, SamplingRow
from engine.messages import EngineLoad, EngineRequest, FinishReason, StepOutput, TokenDelta
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import Request
from engine.scheduling.scheduler import ScheduledRequest, Scheduler


class StepExecutor(Protocol):
    """What the core needs of :class:`engine.execution.executor.Executor`."""

    @property
    def num_kv_blocks(self) -> int:
        """Pages in the KV cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a page."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding ids included."""

    @property
    def max_model_len(self) -> int:
        """Tokens in a sequence at most, prompt and output."""

    def execute(self, step: StepInput) -> Tensor:
        """Run one flat batch; fp32 logits [len(step.logits_rows), vocab_size]."""

    def shutdown(self) -> None:
        """Let go of the model and of the other ranks; may be called again."""


class EngineCore:
    """One model on one group of ranks, advanced by calling :meth:`step`. Not thread-safe: see ``engine.loop``.

    Stops decided here: EOS and ``stop_token_ids`` (neither among the first ``min_tokens`` tokens), ``max_tokens``. Stop
    *strings* belong to the text side, which aborts the request.

    Args:
        config: how to run; the batch limits and cache switches are read from it.
        model: the model that ``executor`` runs.
        executor: computes logits; the core owns it from now on.
        used_vocab_size: ids from here on are padding and are never sampled.
        eos_token_ids: ids that end a sequence unless its ``ignore_eos`` is set.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        executor: StepExecutor,
        *,
        used_vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self.config = config
        self.model = model
        self.executor = executor
        self.scheduler = Scheduler(
            BlockPool(executor.num_kv_blocks, executor.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=executor.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sampler = Sampler(executor.vocab_size, used_vocab_size, self._eos_token_ids)
        self._steps = 0
        self._step_seconds = 0.0

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served: it is empty, too long, has ids that the model hasn't, samples without
                a seed, or its id is in use. Let in, it would fail a step, and everybody's requests with it.
        """
        self._check(request)
        self.scheduler.add(Request.from_message(request))

    def abort(self, request_ids: Collection[str]) -> None:
        """Forget requests and free their blocks; nothing more is heard of them. Ids not under way are ignored."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """Advance every scheduled request. Without work, returns at once with no deltas.

        Raises:
            Exception: whatever made the executor or the sampler fail. The core is of no more use then.
        """
        started = time.perf_counter()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return StepOutput([], self.load())
        sampling = [part.request for part in scheduled if part.samples]
        sampled = self._compute(scheduled, sampling)
        self.scheduler.update(
            scheduled, {request.request_id: one.token_id for request, one in zip(sampling, sampled, strict=True)}
        )
        deltas = [self._delta(request, one) for request, one in zip(sampling, sampled, strict=True)]
        self._steps += 1
        self._step_seconds = time.perf_counter() - started
        return StepOutput(deltas, self.load())

    def has_work(self) -> bool:
        """Whether any request is under way."""
        return self.scheduler.has_work

    def load(self) -> EngineLoad:
        """How busy the engine is now; ``step_seconds`` is the time that the last step took."""
        pool = self.scheduler.pool
        return EngineLoad(
            waiting_requests=self.scheduler.num_waiting,
            running_requests=self.scheduler.num_running,
            waiting_prefill_tokens=self.scheduler.num_prefill_tokens,
            free_blocks=pool.num_free,
            total_blocks=pool.num_blocks,
            steps=self._steps,
            step_seconds=self._step_seconds,
        )

    def check(self) -> None:
        """Check the scheduler's and the block pool's books, in O(blocks); for tests and idle times.

        Raises:
            RuntimeError: an invariant doesn't hold.
        """
        self.scheduler.check()

    def shutdown(self) -> None:
        """Shut the executor down; may be called again."""
        self.executor.shutdown()

    def _compute(self, scheduled: list[ScheduledRequest], sampling: list[Request]) -> list[Sampled]:
        """One token for each of ``sampling``, the requests of ``scheduled`` that are due one."""
        step = build_step_input(scheduled, self.executor.block_size)
        logits = self.executor.execute(step)  # [len(sampling), vocab_size]
        if not sampling:
            return []
        rows = [
            SamplingRow(
                params=request.params,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=request.output_token_ids,
                position=request.num_tokens,
            )
            for request in sampling
        ]
        return self._sampler(logits, rows)

    def _delta(self, request: Request, sampled: Sampled) -> TokenDelta:
        """Report the token just appended to ``request``, and finish it if that was its last."""
        finish_reason, stop_token_id = self._stop(request, sampled.token_id)
        if finish_reason is not None:
            self.scheduler.finish(request)
        return TokenDelta(
            request_id=request.request_id,
            token_ids=[sampled.token_id],
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            logprobs=None if sampled.logprobs is None else [sampled.logprobs],
            num_cached_tokens=request.num_cached_tokens,
        )

    def _stop(self, request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
        params = request.params
        num_output_tokens = len(request.output_token_ids)
        if num_output_tokens > params.min_tokens:
            is_eos = token_id in self._eos_token_ids and not params.ignore_eos
            if is_eos or token_id in params.stop_token_ids:
                return FinishReason.STOP, token_id
        if num_output_tokens >= request.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _check(self, request: EngineRequest) -> None:
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt has no tokens; at least one is needed", field="prompt")
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens is {request.max_tokens}; at least 1 is needed", field="max_tokens")
        if request.params.seed is None and not request.params.greedy:
            raise RequestError("the request samples and has no seed; engine.requests.expand draws one", field="seed")
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < self.executor.vocab_size:
                raise RequestError(
                    f"the prompt has token id {token_id}; the model's ids are 0 to {self.executor.vocab_size - 1}",
                    field="prompt",
                )
