"""A scheduler driven against a model of the KV cache's memory, with every invariant checked in every step.

Each slot of the memory remembers (token, position, digest of all tokens up to it). A step writes the slots of its new
tokens and then reads, as attention would, the whole context of each request: whatever is stale, overwritten or somebody
else's shows up as a wrong digest. The next token is a function of the digest that was read, so that tokens say too
whether the context was right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from engine.errors import RequestError
from engine.messages import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.prefix import extend_hashes
from engine.scheduling.request import Request, RequestStatus
from engine.scheduling.scheduler import Scheduler

PARAMS = SamplingParams(seed=0)
PROMPT_PARAMS = SamplingParams(seed=0, prompt_logprobs=0)
VOCAB_SIZE = 3

Slot = tuple[int, int, int]


def context_digests(token_ids: Sequence[int], known: list[int]) -> list[int]:
    """Digest of every prefix of ``token_ids``; ``known`` are those of its first tokens and is extended."""
    for token_id in token_ids[len(known) :]:
        known.append(hash((known[-1] if known else 0, token_id)))
    return known


def next_token(digest: int) -> int:
    return digest // 7 % VOCAB_SIZE


def generate_alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What a request generates with a memory of its own."""
    token_ids, digests = list(prompt), []
    for _ in range(max_tokens):
        token_ids.append(next_token(context_digests(token_ids, digests)[-1]))
    return token_ids[len(prompt) :]


class Simulation:
    def __init__(self, *, num_blocks: int, block_size: int, **options: int | bool) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, **options)  # type: ignore[arg-type]
        self.memory: dict[int, Slot] = {}
        self.live: dict[str, Request] = {}  # in order of arrival
        self.digests: dict[str, list[int]] = {}
        self.claims: dict[bytes, list[Slot]] = {}  # what a block published under this hash must hold
        self.num_added = 0
        self.num_finished = 0
        self.num_preemptions = 0
        self.num_prefix_hits = 0
        self.num_merged_blocks = 0
        self.were_held: set[str] = set()
        self.findable: set[bytes] = set()  # as told by the pool's changes

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        priority: int = 0,
        given: int = 0,
        prompt_logprobs: bool = False,
        held: bool = False,
    ) -> Request | None:
        """Add a request; it must be refused exactly if it could never run. Returns None then.

        Args:
            given: so many of its tokens have been generated elsewhere.
        """
        given = min(given, max_tokens - 1)
        request = Request(
            f"r{self.num_added}",
            prompt,
            PROMPT_PARAMS if prompt_logprobs else PARAMS,
            max_tokens,
            output_token_ids=generate_alone(prompt, given),
            priority=priority,
        )
        self.num_added += 1
        scheduler = self.scheduler
        size = len(prompt) + max_tokens
        fits = size <= scheduler.max_model_len and size <= self.pool.num_blocks * self.pool.block_size
        if not scheduler.enable_chunked_prefill:
            fits = fits and len(prompt) <= scheduler.max_num_batched_tokens
        if not fits:
            with pytest.raises(RequestError) as refusal:
                scheduler.add(request)
            assert refusal.value.field in ("prompt", "max_tokens")
            return None
        scheduler.add(request, held=held)
        if held:
            self.were_held.add(request.request_id)
        self.live[request.request_id] = request
        self.digests[request.request_id] = []
        return request

    def release(self, request_id: str) -> None:
        """Let a held request go, if it is."""
        if self.live[request_id].status is RequestStatus.HELD:
            self.scheduler.release(self.live[request_id])

    def abort(self, request_id: str) -> None:
        known = self.live.pop(request_id, None) is not None
        assert self.scheduler.abort(request_id) == known
        assert request_id not in self.scheduler

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """One step; ``before_update`` runs while it is under way."""
        before = {request.request_id: request.status for request in self.live.values()}
        preemptions_before = sum(request.num_preemptions for request in self.live.values())
        scheduled = self.scheduler.schedule()
        self._check_schedule(scheduled, before, preemptions_before)
        self._write(scheduled)
        sampled = self._read(scheduled)
        self._note_prompt_logprobs(scheduled)
        before_update()
        tables = {part.request.request_id: list(part.request.block_table) for part in scheduled}
        self.scheduler.update(scheduled, sampled)
        for part in scheduled:
            request = part.request
            if request.request_id not in self.live:
                assert request.status is RequestStatus.FINISHED
                assert not request.block_table
                continue
            pairs = zip(tables[request.request_id], request.block_table, strict=True)
            self.num_merged_blocks += sum(before != after for before, after in pairs)
            assert request.num_computed_tokens == part.start + part.num_new_tokens
            if len(request.output_token_ids) == request.max_tokens:
                assert request.prompt_logprobs is None or not request.wants_prompt_logprobs
                alone = generate_alone(request.prompt_token_ids, request.max_tokens)
                assert request.output_token_ids == alone
                self.scheduler.finish(request)
                del self.live[request.request_id]
                self.num_finished += 1

    def drain(self) -> None:
        """Run until all is done. The first running request advances in each step, which bounds their number: all of
        its work may be done again once for each request that takes its place."""
        for request_id in self.live:
            self.release(request_id)
        bound = sum(len(request.prompt_token_ids) + request.max_tokens for request in self.live.values())
        bound *= max(1, len(self.live))
        for _ in range(bound):
            if not self.live:
                break
            self.step()
            self.check()
        assert not self.live
        assert not self.scheduler.has_work
        assert self.scheduler.schedule() == []
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler.num_prefill_tokens == 0
        self.check()

    def check(self) -> None:
        """What must hold between any two calls."""
        self.scheduler.check()
        requests = list(self.live.values())
        running = [request for request in requests if request.status is RequestStatus.RUNNING]
        for priority in {request.priority for request in requests}:
            # One that was held has its place before those that ran meanwhile.
            equals = [r for r in requests if r.priority == priority and r.request_id not in self.were_held]
            status = [request.status is RequestStatus.RUNNING for request in equals]
            assert status == sorted(status, reverse=True), "an older request waits while a younger one runs"
        assert len(running) == self.scheduler.num_running <= self.scheduler.max_num_seqs
        assert len(requests) - len(running) == self.scheduler.num_waiting
        for request in running:
            assert 0 <= request.num_computed_tokens < request.num_tokens
        cached, evicted = self.pool.changes()
        assert not self.findable & set(cached)
        assert self.findable >= set(evicted)
        self.findable = self.findable.union(cached).difference(evicted)
        assert self.findable == set(self.pool.published()) == set(self.pool._published)
        for block_hash, block_id in self.pool._published.items():
            first = block_id * self.pool.block_size
            content = [self.memory[first + i] for i in range(self.pool.block_size)]
            assert content == self.claims[block_hash], "a published block holds other tokens than it claims"

    def _check_schedule(
        self, scheduled: list[ScheduledRequest], before: dict[str, RequestStatus], preemptions_before: int
    ) -> None:
        ready = [self.live[request_id] for request_id, was in before.items() if was is not RequestStatus.HELD]
        if ready:
            assert scheduled, "work, but nothing scheduled"
            running = [request for request in ready if before[request.request_id] is RequestStatus.RUNNING]
            first = min(running or ready, key=lambda request: request.order)
            assert scheduled[0].request is first, "the request whose turn it is doesn't advance"
            stayed = [request.order for request in running if request.status is RequestStatus.RUNNING]
            preempted = [request.order for request in running if request.status is RequestStatus.WAITING]
            assert not preempted or max(stayed) < min(preempted), "preempted out of order"
            waiting = [request.order for request in ready if before[request.request_id] is RequestStatus.WAITING]
            admitted = [part.request.order for part in scheduled if part.request.order in waiting]
            assert admitted == sorted(waiting)[: len(admitted)] or preempted, "admitted out of order"
        assert sum(part.num_prompt_rows for part in scheduled) <= self.scheduler.max_prompt_rows
        assert sum(part.num_new_tokens for part in scheduled) <= self.scheduler.max_num_batched_tokens
        assert len(scheduled) <= self.scheduler.max_num_seqs
        for part in scheduled:
            request = part.request
            assert part.num_new_tokens >= 1
            assert part.start == request.num_computed_tokens
            assert part.start + part.num_new_tokens <= request.num_tokens
            assert part.samples == (part.start + part.num_new_tokens == request.num_tokens)
            assert len(request.block_table) == self.pool.blocks_for(part.start + part.num_new_tokens)
            if before[request.request_id] is RequestStatus.WAITING:
                assert part.start % self.pool.block_size == 0
                self.num_prefix_hits += part.start > 0
                if not self.scheduler.enable_chunked_prefill and not request.wants_prompt_logprobs:
                    whole = part.start + part.num_new_tokens == request.num_tokens
                    assert whole or request.num_tokens - part.start > self.scheduler.max_num_batched_tokens
            if not self.scheduler.enable_prefix_caching:
                assert request.num_cached_tokens == 0
        num_moved_back = sum(
            was is RequestStatus.RUNNING and self.live[request_id].status is RequestStatus.WAITING
            for request_id, was in before.items()
        )
        num_preemptions = sum(request.num_preemptions for request in self.live.values()) - preemptions_before
        assert num_preemptions == num_moved_back, "a request was preempted and came back in the same step"
        self.num_preemptions += num_preemptions

    def _note_prompt_logprobs(self, scheduled: list[ScheduledRequest]) -> None:
        for part in scheduled:
            request = part.request
            if part.num_prompt_rows:
                assert request.prompt_logprobs is not None
                assert part.start < len(request.prompt_logprobs), "positions were skipped"
                rows = range(part.start + 1, part.start + 1 + part.num_prompt_rows)
                request.prompt_logprobs[part.start + 1 :] = [
                    TokenLogprobs(request.prompt_token_ids[row], 0.0, 1) for row in rows
                ]
            if part.samples and request.prompt_logprobs is not None:
                tokens = [entry.token_id for entry in request.prompt_logprobs if entry is not None]
                assert [request.prompt_token_ids[0], *tokens] == request.prompt_token_ids

    def _slot(self, request: Request, position: int) -> int:
        return request.block_table[position // self.pool.block_size] * self.pool.block_size + (
            position % self.pool.block_size
        )

    def _write(self, scheduled: list[ScheduledRequest]) -> None:
        holders: dict[int, int] = {}
        for request in self.live.values():
            for block_id in request.block_table:
                holders[block_id] = holders.get(block_id, 0) + 1
        published = set(self.pool._published.values())
        for part in scheduled:
            request = part.request
            digests = context_digests(request.all_token_ids, self.digests[request.request_id])
            for position in range(part.start, part.start + part.num_new_tokens):
                slot = self._slot(request, position)
                block_id = slot // self.pool.block_size
                assert holders[block_id] == 1, "a write into somebody else's block"
                assert block_id not in published, "a write into a published block"
                self.memory[slot] = (request.all_token_ids[position], position, digests[position])
            self._claim(request)

    def _claim(self, request: Request) -> None:
        digests, hashes = self.digests[request.request_id], []
        extend_hashes(hashes, request.all_token_ids, self.pool.block_size)
        for i, block_hash in enumerate(hashes):
            positions = range(i * self.pool.block_size, (i + 1) * self.pool.block_size)
            self.claims[block_hash] = [(request.all_token_ids[p], p, digests[p]) for p in positions]

    def _read(self, scheduled: list[ScheduledRequest]) -> dict[str, int]:
        sampled = {}
        for part in scheduled:
            request = part.request
            digests = self.digests[request.request_id]
            for position in range(part.start + part.num_new_tokens):
                expected = (request.all_token_ids[position], position, digests[position])
                assert self.memory[self._slot(request, position)] == expected, "attention reads another's context"
            if part.samples:
                sampled[request.request_id] = next_token(digests[-1])
        return sampled
