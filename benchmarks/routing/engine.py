"""One simulated engine: the scheduler's rules, a block pool with prefix cache, and a step time.

The rules are those of :class:`engine.scheduling.scheduler.Scheduler`: a step hands out ``max_num_batched_tokens``,
running requests first; a waiting one runs once all its tokens fit and leave a block for each that runs, unless most of
them are just being computed for another; if blocks run out, the latest is preempted and computed again. Steps that only
decode are alike, so they are simulated many at a time, and cut short at the end of the step under way when a request
comes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from benchmarks.routing.blocks import Blocks
from benchmarks.routing.hardware import Timing
from deployments.routing.types import Replica
from engine.messages import EngineLoad

STEPS_AT_ONCE = 32
"""Decode steps that are simulated as one event at most, so that loads are reported that often."""


@dataclass(eq=False, slots=True)
class Running:
    """A request in an engine."""

    prompt_tokens: int
    output_tokens: int
    """Tokens that it will get."""
    hashes: Sequence[bytes]
    """Chain of the full blocks of prompt and output."""
    tag: object = None
    """The caller's."""
    computed: int = 0
    """Tokens in the KV cache."""
    known: int = field(default=0)
    """Tokens that are wanted there: the prompt and the output so far."""
    prefill_end: int = 0
    """Tokens that were known when it last began to run; later ones are decoded."""
    blocks: int = 0
    published: int = 0
    cached_tokens: int = 0
    first_token_s: float = math.nan
    finished_s: float = math.nan
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.known = self.prompt_tokens


class SimulatedEngine:
    """Advance it by :meth:`begin` and :meth:`end`; between the two, a step (or a row of equal ones) is computed."""

    def __init__(self, replica: Replica, timing: Timing) -> None:
        self.replica = replica
        self.timing = timing
        self.blocks = Blocks(replica.total_blocks)
        self.waiting: deque[Running] = deque()
        self.waiting_tokens = 0
        self.running: list[Running] = []
        self.steps = 0
        self.busy_s = 0.0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.context_tokens = 0
        self.queried_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.last_step_s = 0.0
        self.started_s = 0.0
        self.busy = False
        self._parts: list[tuple[Running, int]] = []
        self._decoding = 0  # steps in the row that is computed; 0 for a single mixed step
        self._first_s = self._growth_s = 0.0  # of a row: time of its first step, and what each is longer than the last

    def add(self, request: Running) -> None:
        self.waiting.append(request)
        self.waiting_tokens += request.known

    def begin(self, now: float) -> float | None:
        """Begin a step; returns when it ends, or None if there is nothing to do."""
        parts = self._schedule()
        if not parts:
            return None
        self.busy = True
        self.started_s = now
        self._parts = parts
        num = len(parts)
        if all(request.known > request.prompt_tokens and tokens == 1 for request, tokens in parts):
            context = sum(request.computed for request, _ in parts) + num
            self._first_s = self.timing.step_s(num, context, 0.0)
            self._growth_s = self.timing.context_s * num
            self._decoding = self._row()
            return now + self._row_s(self._decoding)
        self._decoding = 0
        context = tokens = 0
        pairs = 0.0
        for request, new in parts:
            end = request.computed + new
            context += end
            tokens += new
            if new > 1:
                pairs += new * (request.computed + 0.5 * new)
        self._first_s = self.timing.step_s(tokens, context, pairs)
        return now + self._first_s

    def cut(self, now: float) -> float | None:
        """A request has come: end the row after the step under way. Returns the new end, None if it stays as it is."""
        if self._decoding <= 1:
            return None
        steps = 1
        while steps < self._decoding and self.started_s + self._row_s(steps) < now:
            steps += 1
        if steps == self._decoding:
            return None
        self._decoding = steps
        return self.started_s + self._row_s(steps)

    def end(self, now: float) -> tuple[list[Running], list[Running]]:
        """Finish the step or row; returns who got a first token and who is complete (their times are set)."""
        first: list[Running] = []
        done: list[Running] = []
        steps = self._decoding or 1
        size = self.replica.block_size
        self.steps += steps
        self.busy_s += now - self.started_s
        self.last_step_s = self._first_s if steps == 1 else self._first_s + self._growth_s * (steps - 1)
        self.busy = False
        for request, tokens in self._parts:
            if self._decoding:
                self.context_tokens += steps * request.computed + steps * (steps + 1) // 2
                request.computed += steps
                self.decode_tokens += steps
                request.known += steps
                unused = request.blocks - -(-request.computed // size)  # the row was cut
                if unused:
                    self.blocks.anonymous -= unused
                    request.blocks -= unused
            else:
                request.computed += tokens
                self.context_tokens += request.computed
                if request.computed <= request.prefill_end:
                    self.prefill_tokens += tokens
                if request.computed == request.known:
                    self.decode_tokens += 1
                    request.known += 1
                    if request.first_token_s != request.first_token_s:  # NaN: none yet
                        request.first_token_s = now
                        first.append(request)
            full = request.computed // size
            if full > request.published:
                for i in range(request.published, min(full, len(request.hashes))):
                    self.blocks.publish(request.hashes[i])
                request.published = min(full, len(request.hashes))
            if request.known - request.prompt_tokens >= request.output_tokens:
                request.finished_s = now
                done.append(request)
        if done:
            for request in done:
                self.blocks.release(request.hashes, request.published, request.blocks)
            ended = set(map(id, done))
            self.running = [request for request in self.running if id(request) not in ended]
        return first, done

    def load(self) -> EngineLoad:
        behind = sum(tokens for r in self.running if (tokens := r.known - r.computed) > 1)
        return EngineLoad(
            waiting_requests=len(self.waiting),
            running_requests=len(self.running),
            waiting_prefill_tokens=behind + self.waiting_tokens,
            free_blocks=self.blocks.num_free,
            total_blocks=self.blocks.num_blocks,
            steps=self.steps,
            step_seconds=self.last_step_s,
            busy_seconds=self.busy_s,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            context_tokens=self.context_tokens,
            queried_tokens=self.queried_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
        )

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes that have become findable, and those that can't be found any more, since this was last called."""
        new, gone = self.blocks.new, self.blocks.gone
        self.blocks.new, self.blocks.gone = [], []
        if new and gone:  # what came and went in one step is not there
            lost = {name for name in gone if name not in self.blocks.held and name not in self.blocks.unheld}
            new = [name for name in new if name not in lost]
            gone = list(lost)
        return new, gone

    def _row_s(self, steps: int) -> float:
        return steps * self._first_s + self._growth_s * (steps * (steps - 1) // 2)

    def _row(self) -> int:
        """Equal decode steps from here on; their blocks are allocated."""
        size = self.replica.block_size
        steps = min([STEPS_AT_ONCE, *(r.output_tokens - (r.known - r.prompt_tokens) for r, _ in self._parts)])
        while steps > 1:
            needed = sum(-(-(r.computed + steps) // size) - r.blocks for r, _ in self._parts)
            if needed <= self.blocks.num_free:
                for request, _ in self._parts:
                    count = -(-(request.computed + steps) // size) - request.blocks
                    if count:
                        self.blocks.allocate(count)
                        request.blocks += count
                break
            steps //= 2
        return max(steps, 1)

    def _schedule(self) -> list[tuple[Running, int]]:
        parts: list[tuple[Running, int]] = []
        size = self.replica.block_size
        budget = self.replica.max_num_batched_tokens
        blocks = self.blocks
        position = 0
        while position < len(self.running):
            request = self.running[position]
            new = min(request.known - request.computed, budget)
            if new == 0:
                break
            count = -(-(request.computed + new) // size) - request.blocks
            if count > 0:
                preempted = False
                while count > blocks.num_free and not preempted:
                    preempted = self._preempt() is request
                if preempted:
                    break
                blocks.allocate(count)
                request.blocks += count
            parts.append((request, new))
            budget -= new
            position += 1
        coming: set[bytes] | None = None
        while self.waiting and budget and len(self.running) < self.replica.max_num_seqs:
            request = self.waiting[0]
            found = blocks.find(request.hashes, (request.known - 1) // size)
            if coming is None:
                coming = {name for part in parts for name in self._coming(*part)}
            if coming and self._mostly_coming(request, coming, found):
                break
            count = -(-request.known // size) - found + blocks.count_unheld(request.hashes, found)
            if count + len(self.running) > blocks.num_free:
                break
            self.waiting.popleft()
            self.waiting_tokens -= request.known
            self.running.append(request)
            blocks.take(request.hashes, found)
            request.computed = found * size
            request.published = found
            request.prefill_end = request.known
            if request.preemptions == 0:
                request.cached_tokens = request.computed
                self.queried_tokens += request.prompt_tokens
                self.cached_tokens += request.computed
            new = min(request.known - request.computed, budget)
            count = -(-(request.computed + new) // size) - found
            blocks.allocate(count)
            request.blocks = found + count
            parts.append((request, new))
            coming.update(self._coming(request, new))
            budget -= new
        return parts

    def _coming(self, request: Running, new: int) -> Sequence[bytes]:
        """Hashes of the blocks that can be found after a step that computes so many tokens of a prompt."""
        if request.computed >= request.prefill_end:
            return ()
        size = self.replica.block_size
        return request.hashes[request.computed // size : (request.computed + new) // size]

    def _mostly_coming(self, request: Running, coming: set[bytes], found: int) -> bool:
        """Whether the step computes half of what is new in a waiting request for others: then it waits for that."""
        size = self.replica.block_size
        wanted = islice(request.hashes, found, (request.known - 1) // size)
        count = sum(1 for _ in takewhile(coming.__contains__, wanted)) * size
        return 2 * count >= request.known - found * size

    def _preempt(self) -> Running:
        request = self.running.pop()
        self.blocks.release(request.hashes, request.published, request.blocks)
        request.computed = request.blocks = request.published = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)
        self.waiting_tokens += request.known
        return request
