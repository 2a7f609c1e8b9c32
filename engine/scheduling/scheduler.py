"""Which requests compute which tokens in the next step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from engine.errors import RequestError
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.prefix import extend_hashes
from engine.scheduling.request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: compute ``all_token_ids[start : start + num_new_tokens]``."""

    request: Request
    num_new_tokens: int
    start: int
    samples: bool
    """Whether these are the last tokens known, so that the step yields the next one."""


class Scheduler:
    """Hands out each step's ``max_num_batched_tokens`` so that *computed* tokens catch up with *wanted* tokens.

    That one rule (vLLM v1's) covers prefill in chunks, decoding, prefix hits and recomputation after preemption.
    Requests are served in order of arrival: running ones first, then waiting ones as long as there is budget, a place
    among ``max_num_seqs`` and room in the KV cache. So ``running + waiting`` is always in order of arrival, and when
    blocks run out, the last one running is preempted: it is the latest arrived, and it goes back to the head of the
    queue. It keeps its output tokens, and its full blocks remain findable, so that most of it is usually not computed
    twice.

    With ``enable_chunked_prefill`` off, a prompt goes whole or not at all. Only a recomputation that has outgrown the
    budget (prompt plus output) is cut then, since it could never go otherwise.

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
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_prefix_caching = enable_prefix_caching
        self.enable_chunked_prefill = enable_chunked_prefill
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, Request] = {}
        self._waiting_tokens = 0

    # -- requests come and go -----------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run (``field`` says whether ``prompt`` or ``max_tokens`` is too large), or its
                id is in use.
        """
        if request.request_id in self:
            raise RequestError(f"request id {request.request_id!r} is in use; ids of requests under way must differ")
        self._check_size(request)
        self._waiting[request.request_id] = request
        self._waiting_tokens += request.num_tokens

    def abort(self, request_id: str) -> bool:
        """Forget a request, wherever it is; returns False if there is none of that id (any more)."""
        request = self._waiting.get(request_id) or self._running.get(request_id)
        if request is None:
            return False
        self.finish(request)
        return True

    def finish(self, request: Request) -> None:
        """Forget a request that is waiting or running, and let go of its blocks."""
        if request.status is RequestStatus.WAITING:
            del self._waiting[request.request_id]
            self._waiting_tokens -= request.num_tokens
        else:
            del self._running[request.request_id]
            self._release_blocks(request)
        request.status = RequestStatus.FINISHED

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> list[ScheduledRequest]:
        """Choose the next step's tokens and allocate their blocks. Empty only if there is no work."""
        scheduled: list[ScheduledRequest] = []
        budget = self.max_num_batched_tokens
        for request in list(self._running.values()):
            num_new_tokens = min(request.num_remaining_tokens, budget)
            if num_new_tokens == 0 or request.status is not RequestStatus.RUNNING:
                break  # the budget is spent, or this request and all after it have just been preempted
            if not self._make_room(request, request.num_computed_tokens + num_new_tokens):
                break
            scheduled.append(_part(request, num_new_tokens))
            budget -= num_new_tokens
        self._admit(scheduled, budget)
        return scheduled

    def update(self, scheduled: Sequence[ScheduledRequest], sampled: Mapping[str, int]) -> None:
        """Record that a step has been computed: its full blocks become findable, its new tokens wanted.

        Args:
            scheduled: what :meth:`schedule` returned; requests aborted since are passed over.
            sampled: the new token for each request id whose part ``samples``.
        """
        for part in scheduled:
            request = part.request
            if request.status is not RequestStatus.RUNNING:
                continue
            request.num_computed_tokens += part.num_new_tokens
            if self.enable_prefix_caching:
                self._publish(request)
            if part.samples:
                request.append(sampled[request.request_id])

    # -- numbers ------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute until every request decodes; what the prefix cache may save waiting ones is included."""
        behind = (request.num_remaining_tokens for request in self._running.values())
        return self._waiting_tokens + sum(tokens for tokens in behind if tokens > 1)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting or request_id in self._running

    def check(self) -> None:
        """Check every invariant of the scheduler and its pool; for tests and idle times.

        Raises:
            RuntimeError: one doesn't hold.
        """
        self.pool.check(request.block_table for request in self._running.values())
        for request in self._waiting.values():
            if request.status is not RequestStatus.WAITING or request.block_table or request.num_computed_tokens:
                raise RuntimeError(f"waiting request {request.request_id!r} is {request.status} or holds blocks")
        for request in self._running.values():
            if request.status is not RequestStatus.RUNNING or request.num_remaining_tokens < 1:
                raise RuntimeError(f"running request {request.request_id!r} is {request.status} or wants no token")
            if len(request.block_table) < self.pool.blocks_for(request.num_computed_tokens):
                raise RuntimeError(f"running request {request.request_id!r} has computed tokens without a block")
        if self._waiting_tokens != sum(request.num_tokens for request in self._waiting.values()):
            raise RuntimeError(f"{self._waiting_tokens} waiting tokens are counted wrongly")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_size(self, request: Request) -> None:
        num_prompt, wanted = len(request.prompt_token_ids), len(request.prompt_token_ids) + request.max_tokens
        for limit, name in (
            (self.max_model_len, "max_model_len"),
            (self.pool.num_blocks * self.pool.block_size, "the size of the whole KV cache"),
        ):
            if wanted > limit:
                too_long = num_prompt >= limit
                raise RequestError(
                    f"{num_prompt} prompt tokens and max_tokens={request.max_tokens} make {wanted}; {name} is {limit} "
                    f"tokens: {'shorten the prompt' if too_long else f'ask for at most {limit - num_prompt} tokens'}",
                    field="prompt" if too_long else "max_tokens",
                    code="context_length_exceeded",
                )
        if not self.enable_chunked_prefill and num_prompt > self.max_num_batched_tokens:
            raise RequestError(
                f"{num_prompt} prompt tokens exceed max_num_batched_tokens ({self.max_num_batched_tokens}), and "
                "chunked prefill is off: shorten the prompt, or have the server raise the one or turn on the other",
                field="prompt",
                code="context_length_exceeded",
            )

    def _admit(self, scheduled: list[ScheduledRequest], budget: int) -> None:
        """Let waiting requests run, in order, as far as everything suffices."""
        while self._waiting and budget and len(self._running) < self.max_num_seqs:
            request = next(iter(self._waiting.values()))
            cached = self._find_prefix(request)
            num_cached_tokens = len(cached) * self.pool.block_size
            num_remaining = request.num_tokens - num_cached_tokens
            if not self.enable_chunked_prefill and budget < num_remaining <= self.max_num_batched_tokens:
                break
            # All its tokens must fit and leave a block for each running request: else it would soon be preempted. Nor
            # can anyone preempted in this very step come back in it: the blocks it gave up were not enough for others.
            num_blocks = self.pool.blocks_for(request.num_tokens) - len(cached) + self.pool.count_free(cached)
            if num_blocks + len(self._running) > self.pool.num_free:
                break
            del self._waiting[request.request_id]
            self._waiting_tokens -= request.num_tokens
            self._running[request.request_id] = request
            request.status = RequestStatus.RUNNING
            self.pool.take(cached)
            request.num_computed_tokens = num_cached_tokens
            request.num_published_blocks = len(cached)
            if request.num_preemptions == 0:
                request.num_cached_tokens = num_cached_tokens
            num_new_tokens = min(num_remaining, budget)
            num_blocks = self.pool.blocks_for(num_cached_tokens + num_new_tokens) - len(cached)
            request.block_table.extend(cached + self.pool.allocate(num_blocks))
            scheduled.append(_part(request, num_new_tokens))
            budget -= num_new_tokens

    def _find_prefix(self, request: Request) -> list[int]:
        """The cached blocks of a request's tokens but the last, which is always computed: its logits are wanted."""
        if not self.enable_prefix_caching:
            return []
        extend_hashes(request.block_hashes, request.all_token_ids, self.pool.block_size)
        return self.pool.find(islice(request.block_hashes, (request.num_tokens - 1) // self.pool.block_size))

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give a running request blocks for its first ``num_tokens`` tokens; False if it had to be preempted itself."""
        num_blocks = self.pool.blocks_for(num_tokens) - len(request.block_table)
        while num_blocks > self.pool.num_free:
            if self._preempt_latest() is request:
                return False
        request.block_table.extend(self.pool.allocate(num_blocks))
        return True

    def _preempt_latest(self) -> Request:
        _, request = self._running.popitem()
        self._release_blocks(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._waiting[request.request_id] = request
        self._waiting.move_to_end(request.request_id, last=False)
        self._waiting_tokens += request.num_tokens
        return request

    def _release_blocks(self, request: Request) -> None:
        self.pool.release(request.block_table)
        del request.block_table[:]

    def _publish(self, request: Request) -> None:
        num_full = request.num_computed_tokens // self.pool.block_size
        if num_full > len(request.block_hashes):
            extend_hashes(request.block_hashes, request.all_token_ids, self.pool.block_size)
        for i in range(request.num_published_blocks, num_full):
            request.block_table[i] = self.pool.publish(request.block_table[i], request.block_hashes[i])
        request.num_published_blocks = num_full


def _part(request: Request, num_new_tokens: int) -> ScheduledRequest:
    start = request.num_computed_tokens
    return ScheduledRequest(request, num_new_tokens, start, samples=start + num_new_tokens == request.num_tokens)
