"""A step's arrays say where every token belongs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.execution.batch import build_step_input, dummy_step
from engine.sampling_params import SamplingParams
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.request import Request


@st.composite
def schedules(draw):
    block_size = draw(st.sampled_from([1, 3, 16]))
    parts, next_block = [], 5
    for r in range(draw(st.integers(1, 6))):
        tokens = draw(st.integers(1, 60))
        start = draw(st.integers(0, tokens - 1))
        count = draw(st.integers(1, tokens - start))
        request = Request(f"r{r}", [1000 * r + i for i in range(tokens)], SamplingParams(), 1)
        # As after a prefix hit or with room for more: blocks may go beyond what this step needs.
        for _ in range(-(-(start + count) // block_size) + draw(st.integers(0, 2))):
            request.block_table.append(next_block)
            next_block = next_block * 7 % 1009
        parts.append(
            ScheduledRequest(request=request, num_new_tokens=count, start=start, samples=start + count == tokens)
        )
    return parts, block_size


@settings(deadline=None)
@given(schedules())
def test_every_token_stands_where_its_request_says(schedule):
    parts, block_size = schedule
    step = build_step_input(parts, block_size)
    row, wanted = 0, []
    for r, part in enumerate(parts):
        assert step.query_start[r] == row
        assert step.context_lens[r] == part.start + part.num_new_tokens
        for position in range(part.start, part.start + part.num_new_tokens):
            block = part.request.block_table[position // block_size]
            assert step.token_ids[row] == part.request.all_token_ids[position]
            assert step.positions[row] == position
            assert step.slot_mapping[row] == block * block_size + position % block_size
            assert step.block_tables[r, position // block_size] == block
            row += 1
        blocks = -(-int(step.context_lens[r]) // block_size)
        assert step.block_tables[r, :blocks].tolist() == list(part.request.block_table[:blocks])
        assert not step.block_tables[r, blocks:].any()
        if part.samples:
            wanted.append(row - 1)
    assert step.query_start[-1] == row == len(step.token_ids)
    assert step.logits_rows.tolist() == wanted


def test_dtypes_are_those_of_the_wire():
    request = Request("r", [1, 2, 3], SamplingParams(), 1)
    request.block_table.append(2)
    step = build_step_input([ScheduledRequest(request=request, num_new_tokens=3, start=0, samples=True)], 4)
    assert step.slot_mapping.dtype == np.int64
    others = (step.token_ids, step.positions, step.block_tables, step.query_start, step.context_lens, step.logits_rows)
    assert {array.dtype for array in others} == {np.dtype(np.int32)}


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 16]))
def test_the_dummy_step_is_full_and_uses_each_slot_once(tokens, seqs, block_size):
    step = dummy_step(tokens, seqs, block_size)
    assert len(step.token_ids) == tokens
    assert len(step.context_lens) == len(step.logits_rows) == min(tokens, seqs)
    assert len(set(step.slot_mapping.tolist())) == tokens
    assert step.slot_mapping.max() < step.block_tables.size * block_size
    owners = np.repeat(np.arange(len(step.context_lens)), np.diff(step.query_start))
    assert (step.slot_mapping // block_size == step.block_tables[owners, step.positions // block_size]).all()
