"""The step loop of one engine: schedule, compute, sample, append, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineDeadError, RequestError
from engine.execution.batch import build_step_input, sampled_rows
from engine.execution.executor import StepExecutor
from engine.execution.logprobs import report
from engine.execution.sampler import Sampled, Sampler, SamplingRow
from engine.messages import EngineLoad, EngineRequest, FinishReason, StepOutput, TokenDelta
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.structured.compiler import GrammarCompiler
from engine.structured.pending import Pending, dead_end

if TYPE_CHECKING:  # XGrammar takes seconds to import
    from engine.structured.matcher import Matcher


class EngineCore:
    """One model on one group of ranks, advanced by calling :meth:`step`. Not thread-safe: see ``engine.loop``.

    Stops decided here: EOS and ``stop_token_ids`` (neither among the first ``min_tokens`` tokens), ``max_tokens``. Stop
    *strings* belong to the text side, which aborts the request. A grammar ends a request where it can't go on.

    A request with ``structured_outputs`` is held until its grammar is compiled, which others don't wait for; whether
    the grammar is wrong shows then, in :attr:`StepOutput.refused`.

    Args:
        config: how to run; the batch limits and cache switches are read from it.
        model: the model that ``executor`` runs.
        executor: computes logits; the core owns it from now on.
        used_vocab_size: ids from here on are padding and are never sampled.
        eos_token_ids: ids that end a sequence unless its ``ignore_eos`` is set.
        grammars: for ``structured_outputs``, which are refused without; the core owns it from now on.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        executor: StepExecutor,
        *,
        used_vocab_size: int,
        eos_token_ids: Collection[int],
        grammars: GrammarCompiler | None = None,
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
        self._used_vocab_size = used_vocab_size
        self._step_seconds = 0.0
        self._on_ready: Callable[[], None] | None = None
        self._pending = None if grammars is None else Pending(grammars, self._tell)

    def add(self, request: EngineRequest, *, submitted: float | None = None) -> None:
        """Queue a request.

        Args:
            submitted: since when it waits (``time.perf_counter()``); None for now.

        Raises:
            RequestError: it can never be served: it is empty, too long, complete already, has ids that the model
                hasn't, samples without a seed, or its id is in use. Let in, it would fail a step, and everybody's
                requests with it.
        """
        self._check(request)
        added = Request.from_message(request)
        added.submitted = time.perf_counter() if submitted is None else submitted
        if self._pending is not None and request.params.structured_outputs is not None:
            self.scheduler.add(added, held=True)
            self._pending.add(added)
        else:
            self.scheduler.add(added)

    def abort(self, request_ids: Collection[str]) -> None:
        """Forget requests and free their blocks; nothing more is heard of them. Ids not under way are ignored."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)
            if self._pending is not None:
                self._pending.abort(request_id)

    def step(self) -> StepOutput:
        """Advance every scheduled request. Without work, returns at once with no deltas.

        Raises:
            Exception: whatever made the executor or the sampler fail. The core is of no more use then.
        """
        started = time.perf_counter()
        refused: dict[str, RequestError] = {}
        if self._pending is not None and self._pending.is_ready:
            for request, error in self._pending.take():
                if error is None:
                    self.scheduler.release(request)
                else:
                    self._refuse(request, error, refused)
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return StepOutput([], self.load(), refused=refused)
        for part in scheduled:
            if part.request.queued_seconds is None:
                part.request.queued_seconds = started - part.request.submitted
        sampling, sampled = self._compute(scheduled, refused)
        self.scheduler.update(
            scheduled, {request.request_id: one.token_id for request, one in zip(sampling, sampled, strict=True)}
        )
        deltas = [self._delta(request, one) for request, one in zip(sampling, sampled, strict=True)]
        cached, evicted = self.scheduler.pool.changes()
        self._step_seconds = time.perf_counter() - started
        self.scheduler.totals.steps += 1
        self.scheduler.totals.busy_seconds += self._step_seconds
        return StepOutput(deltas, self.load(), cached=cached, evicted=evicted, refused=refused)

    def has_work(self) -> bool:
        """Whether a step would do something; a request whose grammar is not compiled yet is no work."""
        return self.scheduler.has_work or (self._pending is not None and self._pending.is_ready)

    def wait(self) -> None:
        """Block until there is work, if that is to be expected: while grammars are compiled, and nothing else to do."""
        if self._pending is not None and not self.scheduler.has_work:
            self._pending.wait()

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, from any thread, when there is work without a call to :meth:`add`."""
        self._on_ready = callback

    def cached_blocks(self) -> list[bytes]:
        """Hashes of all blocks that can be found; ``cached`` and ``evicted`` of the next steps go on from there."""
        return self.scheduler.pool.published()

    def load(self) -> EngineLoad:
        """How busy the engine is now; ``step_seconds`` is the time that the last step took."""
        pool, totals = self.scheduler.pool, self.scheduler.totals
        return EngineLoad(
            waiting_requests=self.scheduler.num_waiting,
            running_requests=self.scheduler.num_running,
            waiting_prefill_tokens=self.scheduler.num_prefill_tokens,
            free_blocks=pool.num_free,
            total_blocks=pool.num_blocks,
            steps=totals.steps,
            step_seconds=self._step_seconds,
            busy_seconds=totals.busy_seconds,
            prefill_tokens=totals.prefill_tokens,
            decode_tokens=totals.decode_tokens,
            context_tokens=totals.context_tokens,
            queried_tokens=totals.queried_tokens,
            cached_tokens=totals.cached_tokens,
            preemptions=totals.preemptions,
        )

    def check(self) -> None:
        """Check the scheduler's and the block pool's books, in O(blocks); for tests and idle times.

        Raises:
            RuntimeError: an invariant doesn't hold.
        """
        self.scheduler.check()

    def shutdown(self) -> None:
        """Shut the executor down; may be called again."""
        if self._pending is not None:
            self._pending.close()
        self.executor.shutdown()

    def _tell(self) -> None:
        if self._on_ready is not None:
            self._on_ready()

    def _refuse(self, request: Request, error: RequestError, refused: dict[str, RequestError]) -> None:
        self.scheduler.finish(request)
        refused[request.request_id] = error

    def _compute(
        self, scheduled: list[ScheduledRequest], refused: dict[str, RequestError]
    ) -> tuple[list[Request], list[Sampled]]:
        """The requests of ``scheduled`` that get a token, and one token for each."""
        step = build_step_input(scheduled, self.executor.block_size)
        logits = self.executor.execute(step)  # [wanted rows, vocab_size]
        sampling = [part.request for part in scheduled if part.samples]
        if len(sampling) < len(step.logits_rows):
            samples, prompts = sampled_rows(scheduled)
            for part, wanted in zip(scheduled, prompts, strict=True):
                if wanted:
                    self._add_prompt_logprobs(part, logits[wanted.start : wanted.stop])
            logits = logits[samples]
        rows: list[SamplingRow] = []
        for request in sampling:
            row = SamplingRow(
                params=request.params,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=request.output_token_ids,
                position=request.num_tokens,
            )
            if request.grammar is not None:
                row = self._constrained(row, request.grammar)
            rows.append(row)
        stuck = [i for i, request in enumerate(sampling) if request.grammar is not None and rows[i].allowed is None]
        if stuck:
            for i in stuck:
                self._refuse(sampling[i], dead_end(), refused)
            going = [i for i in range(len(sampling)) if i not in stuck]
            sampling, rows, logits = [sampling[i] for i in going], [rows[i] for i in going], logits[going]
        return sampling, self._sampler(logits, rows) if rows else []

    def _constrained(self, row: SamplingRow, grammar: Matcher) -> SamplingRow:
        """The row with the tokens that its grammar allows; stops only if nothing else, before ``min_tokens``."""
        unwelcome: Collection[int] = ()
        if len(row.output_token_ids) < row.params.min_tokens:
            unwelcome = self._eos_token_ids.union(row.params.stop_token_ids)
        return replace(row, allowed=grammar.allowed(unwelcome=unwelcome))

    def _add_prompt_logprobs(self, part: ScheduledRequest, logits: Tensor) -> None:
        """Log probabilities of the tokens after those of ``part`` whose logits these are, [rows, vocab_size]."""
        request = part.request
        if request.prompt_logprobs is None or request.params.prompt_logprobs is None:
            return
        first = part.start + 1
        token_ids = request.prompt_token_ids[first : first + len(logits)]
        used = logits[:, : self._used_vocab_size].float()
        found = report(used, token_ids, [request.params.prompt_logprobs] * len(token_ids))
        request.prompt_logprobs[first:] = found  # what a preempted request computes again is the same

    def _delta(self, request: Request, sampled: Sampled) -> TokenDelta:
        """Report the token just appended to ``request``, and finish it if that was its last."""
        if request.grammar is not None and not request.grammar.accept(sampled.token_id):
            raise EngineDeadError(f"token {sampled.token_id} was sampled, which the grammar doesn't allow")
        finish_reason, stop_token_id = self._stop(request, sampled.token_id)
        if finish_reason is not None:
            self.scheduler.finish(request)
        is_first = len(request.output_token_ids) == request.num_given_tokens + 1
        return TokenDelta(
            request_id=request.request_id,
            token_ids=[sampled.token_id],
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            logprobs=None if sampled.logprobs is None else [sampled.logprobs],
            num_cached_tokens=request.num_cached_tokens,
            prompt_logprobs=request.prompt_logprobs if is_first else None,
            queued_seconds=(request.queued_seconds or 0.0) if is_first else 0.0,
        )

    def _stop(self, request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Whether ``token_id``, the last of the request's tokens, ends it."""
        params = request.params
        num_output_tokens = len(request.output_token_ids)
        if request.grammar is not None and request.grammar.ended:
            return FinishReason.STOP, token_id
        if num_output_tokens > params.min_tokens:
            is_eos = token_id in self._eos_token_ids and not params.ignore_eos
            if is_eos or token_id in params.stop_token_ids:
                return FinishReason.STOP, token_id
        if num_output_tokens >= request.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _check(self, request: EngineRequest) -> None:
        prompt, output = request.prompt_token_ids, request.output_token_ids
        if not prompt:
            raise RequestError("the prompt has no tokens; at least one is needed", field="prompt")
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens is {request.max_tokens}; at least 1 is needed", field="max_tokens")
        if request.params.seed is None and not request.params.greedy:
            raise RequestError("the request samples and has no seed; engine.requests.expand draws one", field="seed")
        for token_ids, what, field in ((prompt, "prompt", "prompt"), (output, "given output", "output_token_ids")):
            for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
                if not 0 <= token_id < self.executor.vocab_size:
                    raise RequestError(
                        f"the {what} has token id {token_id}; the model's ids are 0 to {self.executor.vocab_size - 1}",
                        field=field,
                    )
        if output and self._stop(Request.from_message(request), output[-1])[0] is not None:
            raise RequestError(
                f"the {len(output)} given output tokens are complete (max_tokens is {request.max_tokens}); "
                "there is nothing to go on with",
                field="output_token_ids",
            )
        if request.params.structured_outputs is not None and self._pending is None:
            raise RequestError("structured_outputs are not available on this engine", field="structured_outputs")
