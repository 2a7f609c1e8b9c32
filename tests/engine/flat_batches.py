"""Sequences run through an executor by hand, without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.execution.batch import build_step_input
from engine.execution.executor import Executor
from engine.sampling_params import SamplingParams
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.request import Request


class Cache:
    """Hands out the blocks of an executor's cache, in an order that mixes the requests' blocks."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        order = torch.randperm(executor.num_kv_blocks, generator=torch.Generator().manual_seed(0))
        self.free = order.tolist()

    def request(self, token_ids: Sequence[int]) -> Request:
        request = Request(f"request-{len(self.free)}", list(token_ids), SamplingParams(), 1)
        for _ in range(-(-len(token_ids) // self.executor.block_size)):
            request.block_table.append(self.free.pop())
        return request

    def release(self, *requests: Request) -> None:
        for request in requests:
            self.free += request.block_table
            del request.block_table[:]


def part(request: Request, count: int) -> ScheduledRequest:
    """The next `count` tokens of a request."""
    start = request.num_computed_tokens
    request.num_computed_tokens += count
    return ScheduledRequest(request=request, num_new_tokens=count, start=start, samples=True)


def step(executor: Executor, *parts: ScheduledRequest) -> Tensor:
    """Logits of the last row of every part, [parts, vocab_size]."""
    return executor.execute(build_step_input(parts, executor.block_size)).clone()


def all_logits(executor: Executor, token_ids: Sequence[int], chunks: Sequence[int] | None = None) -> Tensor:
    """Logits of every position of one sequence: chunks of the given sizes, by default one for all tokens."""
    cache = Cache(executor)
    request = cache.request(token_ids)
    rows = []
    for count in chunks or [len(token_ids)]:
        inputs = build_step_input([part(request, count)], executor.block_size)
        rows.append(executor.execute(replace(inputs, logits_rows=np.arange(count, dtype=np.int32))).clone())
    return torch.cat(rows)
