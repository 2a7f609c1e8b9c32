"""Which requests compute which tokens in the next step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from engine.errors import RequestError
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import BlockTables
from engine.scheduling.line import Line
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.request import Request, RequestStatus
from engine.scheduling.totals import Totals

MAX_PROMPT_ROWS = 256
"""Rows of logits in a step for the log probabilities of prompts: 150 MB at 150,000 ids, within what is left free."""


class Scheduler:
    """Hands out each step's ``max_num_batched_tokens`` so that *computed* tokens catch up with *wanted* tokens.

    That one rule (vLLM v1's) covers prefill in chunks, decoding, prefix hits and recomputation after preemption.
    Requests are served by priority, and in order of arrival among equals: running ones first, then waiting ones as long
    as there is budget, a place among ``max_num_seqs`` and room in the KV cache. Nobody overtakes a waiting request that
    there is no room for. So among equals ``running + waiting`` is always in order of arrival. When blocks run out, the
    last one running is preempted: of the lowest priority (the highest number) the latest arrived, which goes back to
    its place in the queue. It keeps its output tokens, and its full blocks remain findable, so that most of it is
    usually not computed twice.

    A request most of whose tokens another one computes in the same step waits for that step's end, and those behind it
    with it: so several requests with one new prefix (``n`` choices of a prompt) have it computed once.

    With ``enable_chunked_prefill`` off, a prompt goes whole or not at all. Only a recomputation that has outgrown the
    budget (prompt plus output) is cut then, since it could never go otherwise; and a prompt whose log probabilities are
    asked for, of which a step takes ``max_prompt_rows`` tokens at most, whatever the options.

    A step is: :meth:`schedule`, compute, :meth:`update`, then :meth:`finish` for whoever has all it wanted. Aborts may
    come at any time between.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        max_prompt_rows: int = MAX_PROMPT_ROWS,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_prefix_caching = enable_prefix_caching
        self.enable_chunked_prefill = enable_chunked_prefill
        self.max_prompt_rows = max_prompt_rows
        self.totals = Totals()
        self._tables = BlockTables(pool, enable_prefix_caching=enable_prefix_caching)
        self._arrivals = itertools.count()
        self._requests: dict[str, Request] = {}
        self._waiting = Line()
        self._running = Line()
        self._waiting_tokens = 0  # of held requests too

    # -- requests come and go -----------------------------------------------------------------------------------------

    def add(self, request: Request, *, held: bool = False) -> None:
        """Queue a request.

        Args:
            held: it is not to run before :meth:`release`; its place in line is that of its arrival now.

        Raises:
            RequestError: it could never run (``field`` says whether ``prompt`` or ``max_tokens`` is too large), or its
                id is in use.
        """
        if request.request_id in self:
            raise RequestError(f"request id {request.request_id!r} is in use; ids of requests under way must differ")
        self._check_size(request)
        request.arrival = next(self._arrivals)
        self._requests[request.request_id] = request
        self._waiting_tokens += request.num_tokens
        if held:
            request.status = RequestStatus.HELD
        else:
            self._waiting.add(request)

    def release(self, request: Request) -> None:
        """Let a held request run."""
        request.status = RequestStatus.WAITING
        self._waiting.add(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request, wherever it is; returns False if there is none of that id (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self.finish(request)
        return True

    def finish(self, request: Request) -> None:
        """Forget a request that is held, waiting or running, and let go of its blocks."""
        del self._requests[request.request_id]
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._tables.release(request)
        else:
            if request.status is RequestStatus.WAITING:
                self._waiting.remove(request)
            self._waiting_tokens -= request.num_tokens
        request.status = RequestStatus.FINISHED

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> list[ScheduledRequest]:
        """Choose the next step's tokens and allocate their blocks. Empty only if nobody waits or runs."""
        scheduled: list[ScheduledRequest] = []
        budget, prompt_rows = self.max_num_batched_tokens, self.max_prompt_rows
        for request in list(self._running):
            if budget == 0 or request.status is not RequestStatus.RUNNING:
                break  # the budget is spent, or this request and all after it have just been preempted
            num_new_tokens = min(request.num_remaining_tokens, budget)
            if request.prompt_logprobs is not None and request.wants_prompt_logprobs:
                num_new_tokens = min(num_new_tokens, prompt_rows)
                if num_new_tokens == 0:
                    continue
            if not self._make_room(request, request.num_computed_tokens + num_new_tokens):
                break
            part = ScheduledRequest.next(request, num_new_tokens)
            scheduled.append(part)
            budget -= num_new_tokens
            prompt_rows -= part.num_prompt_rows
        if self._waiting:
            self._admit(scheduled, budget, prompt_rows)
        return scheduled

    def update(self, scheduled: Sequence[ScheduledRequest], sampled: Mapping[str, int]) -> None:
        """Record that a step has been computed: its full blocks become findable, its new tokens wanted.

        Args:
            scheduled: what :meth:`schedule` returned; requests aborted since are passed over.
            sampled: the new token for each request id whose part ``samples``.
        """
        context_tokens = prefill_tokens = 0
        for part in scheduled:
            request = part.request
            context_tokens += part.end
            if part.prefills:
                prefill_tokens += part.num_new_tokens
            if request.status is not RequestStatus.RUNNING:
                continue
            request.num_computed_tokens = part.end
            self._tables.publish(request)
            if part.samples:
                request.append(sampled[request.request_id])
        self.totals.context_tokens += context_tokens
        self.totals.prefill_tokens += prefill_tokens
        self.totals.decode_tokens += len(sampled)

    # -- numbers ------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: whether any request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, held and preempted ones included."""
        return len(self._requests) - len(self._running)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute until every request decodes; what the prefix cache may save waiting ones is included."""
        behind = (request.num_remaining_tokens for request in self._running)
        return self._waiting_tokens + sum(tokens for tokens in behind if tokens > 1)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def check(self) -> None:
        """Check every invariant of the scheduler and its pool; for tests and idle times.

        Raises:
            RuntimeError: one doesn't hold.
        """
        self.pool.check(request.block_table for request in self._running)
        held = [request for request in self._requests.values() if request.status is RequestStatus.HELD]
        behind = [*held, *self._waiting]
        if {*map(id, behind), *map(id, self._running)} != {*map(id, self._requests.values())}:
            raise RuntimeError("a request is in no line, or in a line and forgotten")
        for line, status in ((self._waiting, RequestStatus.WAITING), (self._running, RequestStatus.RUNNING)):
            orders = [request.order for request in line]
            if orders != sorted(set(orders)) or any(request.status is not status for request in line):
                raise RuntimeError(f"the {status.name} requests are out of order, or not all are that")
        for request in behind:
            if request.block_table or request.num_computed_tokens:
                raise RuntimeError(f"waiting request {request.request_id!r} holds blocks")
        for request in self._running:
            if request.num_remaining_tokens < 1:
                raise RuntimeError(f"running request {request.request_id!r} wants no token")
            if len(request.block_table) < self.pool.blocks_for(request.num_computed_tokens):
                raise RuntimeError(f"running request {request.request_id!r} has computed tokens without a block")
        if self._waiting_tokens != sum(request.num_tokens for request in behind):
            raise RuntimeError(f"{self._waiting_tokens} waiting tokens are counted wrongly")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_size(self, request: Request) -> None:
        num_prompt = len(request.prompt_token_ids)
        for limit, whose in (
            (self.max_model_len, "max_model_len is"),
            (self.pool.num_blocks * self.pool.block_size, "the size of the whole KV cache is"),
        ):
            if num_prompt + request.max_tokens > limit:
                raise RequestError.too_long(num_prompt, request.max_tokens, limit=limit, whose=whose)
        if not self.enable_chunked_prefill and num_prompt > self.max_num_batched_tokens:
            raise RequestError(
                f"{num_prompt} prompt tokens exceed max_num_batched_tokens ({self.max_num_batched_tokens}), and "
                "chunked prefill is off: shorten the prompt, or have the server raise the one or turn on the other",
                field="prompt",
                code="context_length_exceeded",
            )

    def _admit(self, scheduled: list[ScheduledRequest], budget: int, prompt_rows: int) -> None:
        """Let waiting requests run, in order, as far as everything suffices."""
        coming = self._tables.coming(scheduled)
        while self._waiting and budget and len(self._running) < self.max_num_seqs:
            request = self._waiting.first
            cached = self._tables.find_prefix(request)
            num_remaining = request.num_tokens - len(cached) * self.pool.block_size
            # Waiting for others can't go on for ever: this step does compute it, so the next finds more cached.
            if coming and self._tables.is_mostly_coming(request, coming, cached):
                break
            num_new_tokens = min(num_remaining, budget)
            if request.wants_prompt_logprobs:
                num_new_tokens = min(num_new_tokens, prompt_rows)
                if num_new_tokens == 0:
                    break
            elif not self.enable_chunked_prefill and budget < num_remaining <= self.max_num_batched_tokens:
                break
            # All its tokens must fit and leave a block for each running request: else it would soon be preempted. Nor
            # can anyone preempted in this very step come back in it: the blocks it gave up were not enough for others.
            if not self._tables.has_room(request, cached, spare=len(self._running)):
                break
            self._start(request, cached, num_new_tokens)
            part = ScheduledRequest.next(request, num_new_tokens)
            scheduled.append(part)
            budget -= num_new_tokens
            prompt_rows -= part.num_prompt_rows
            coming |= self._tables.coming([part])

    def _start(self, request: Request, cached: list[int], num_new_tokens: int) -> None:
        """Move the first waiting request to the running ones, with the blocks of its prefix that were found."""
        self._waiting.remove(request)
        self._waiting_tokens -= request.num_tokens
        request.status = RequestStatus.RUNNING
        self._running.add(request)
        self._tables.start(request, cached, num_new_tokens)
        request.prefill_end = request.num_tokens
        if request.num_preemptions == 0:
            num_prompt_tokens = len(request.prompt_token_ids)
            request.num_cached_tokens = min(request.num_computed_tokens, num_prompt_tokens)
            if self.enable_prefix_caching and not request.wants_prompt_logprobs:
                self.totals.queried_tokens += num_prompt_tokens
                self.totals.cached_tokens += request.num_cached_tokens

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give a running request blocks for its first ``num_tokens`` tokens; False if it had to be preempted itself."""
        while not self._tables.extend(request, num_tokens):
            if self._preempt_latest() is request:
                return False
        return True

    def _preempt_latest(self) -> Request:
        request = self._running.last
        self._running.remove(request)
        self._tables.release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.totals.preemptions += 1
        request.status = RequestStatus.WAITING
        self._waiting.add(request)
        self._waiting_tokens += request.num_tokens
        return request
