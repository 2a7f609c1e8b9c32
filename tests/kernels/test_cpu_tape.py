"""Recorded work on a CPU does again what it did, with what is in its tensors now."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu.layout import POSITIONS
from kernels.cpu.packed import pack
from kernels.cpu.tape import UnrecordableError
from kernels.operands import CcqWeight, Int4Weight
from kernels.prepared import DensePrepared

BLOCK = 16


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wint2(generator, k, n, experts):
    shape = (experts, k // 128, n)
    return CcqWeight(
        codes=torch.randint(0, 256, (experts, k // 4, n), dtype=torch.uint8, generator=generator),
        group_scales=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        super_scales=torch.full((experts, n), 1e-3, dtype=torch.bfloat16),
        code_scale=torch.full((experts, n), 128.5),
        code_zp=torch.zeros(experts, n),
        row_order="plain",
    )


def int4(generator, k, n):
    return Int4Weight(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator), torch.full((n,), 1e-2)
    )


class Layer:
    """Norm, a packed product, attention over a cache, and experts: what a decode step is made of."""

    hidden, experts, width, kv_heads, heads, head_dim = 128, 4, 128, 2, 4, 64

    def __init__(self, tokens: int, max_blocks: int, seed: int) -> None:
        generator = rng(seed)
        self.table = torch.randn(50, self.hidden, generator=generator)
        self.norm = torch.ones(self.hidden)
        self.qkv = pack(int4(generator, self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim))
        self.out = DensePrepared.of(torch.randn(self.hidden, self.heads * self.head_dim, generator=generator) / 16)
        self.gate = torch.randn(self.experts, self.hidden, generator=generator)
        self.up = pack(wint2(generator, self.hidden, 2 * self.width, self.experts))
        self.down = pack(wint2(generator, self.width, self.hidden, self.experts))
        shape = (tokens * max_blocks, BLOCK, self.kv_heads, self.head_dim)
        self.cache = ops.LayerCache(*(torch.randn(shape, generator=generator) for _ in range(2)))
        self.frequencies = 10000.0 ** -(torch.arange(self.head_dim // 2) / (self.head_dim // 2))
        self.ids, self.slots = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int64)
        self.contexts = torch.ones(tokens, dtype=torch.int32)
        self.blocks = torch.arange(tokens * max_blocks, dtype=torch.int32).view(tokens, max_blocks)
        self.starts = torch.arange(tokens + 1, dtype=torch.int32)
        self.result = torch.zeros(tokens, self.hidden)

    def set(self, generator: torch.Generator) -> None:
        """Other tokens at the ends of other contexts."""
        tokens, longest = len(self.ids), self.blocks.shape[1] * BLOCK
        self.ids.copy_(torch.randint(0, 50, (tokens,), generator=generator))
        self.contexts.copy_(torch.randint(1, longest + 1, (tokens,), generator=generator))
        last = (self.contexts - 1).long()
        self.slots.copy_(self.blocks.gather(1, (last // BLOCK).unsqueeze(1)).squeeze(1).long() * BLOCK + last % BLOCK)

    def run(self) -> None:
        metadata = ops.decode_metadata(
            self.blocks, self.starts, self.contexts, block_size=BLOCK, dtype=torch.float32
        )  # fmt: skip
        x = ops.embedding(self.ids, self.table, 0)
        hidden = ops.rms_norm(x, self.norm, 1e-5)
        qkv = ops.linear(hidden, self.qkv).view(len(self.ids), -1, self.head_dim)
        angles = ops.rotary_table(self.contexts - 1, self.frequencies)
        q = ops.rotary_store_kv(qkv, angles, self.cache, self.slots, num_heads=self.heads, interleaved=True)
        hidden = ops.linear(ops.paged_attention(q, self.cache, metadata, scale=0.125).flatten(1), self.out)
        hidden, x = ops.add_rms_norm(hidden, x, self.norm, 1e-5)
        weights, ids = ops.route(hidden, self.gate, None, top_k=2, norm_min=1e-6)
        self.result.copy_(ops.fused_moe(hidden, self.up, self.down, weights, ids).add_(x))


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_recorded_step_is_the_step(tokens, threads, seed):
    layer, before = Layer(tokens, 2 + POSITIONS // BLOCK, seed), torch.get_num_threads()
    generator = rng(seed)
    play = ops.record(layer.run)
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            layer.set(generator)
            play()
            played = layer.result.clone()
            layer.run()
            assert torch.equal(played, layer.result)
    finally:
        torch.set_num_threads(before)


def test_a_slot_beyond_the_cache_is_an_error_then_too():
    layer = Layer(2, 1, 0)
    play = ops.record(layer.run)
    layer.slots[1] = 10**6
    with pytest.raises(IndexError, match="1 of 2 tokens go to a slot beyond the 32 of the cache"):
        play()
    layer.set(rng(0))
    play()


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, int, bool, float])
def test_what_asks_for_a_value_can_not_be_recorded(read):
    x = torch.ones(1)

    def run() -> None:
        read(x + 1)

    with pytest.raises(UnrecordableError, match="tells a value"):
        ops.record(run)


def test_dense_experts_can_not_be_recorded():
    layer = Layer(2, 1, 0)
    up, down = (DensePrepared.of(torch.randn(4, n, 128)) for n in (256, 128))
    x, weights, ids = torch.randn(2, 128), torch.ones(2, 2), torch.tensor([[0, 1], [2, 3]])

    def run() -> None:
        layer.result.copy_(ops.fused_moe(x, up, down, weights, ids))

    with pytest.raises(RuntimeError, match="tells a value"):
        ops.record(run)


def test_other_threads_are_not_recorded():
    layer, other = Layer(1, 1, 0), Layer(1, 1, 1)

    def with_another() -> None:
        thread = threading.Thread(target=other.run)
        thread.start()
        thread.join()
        layer.run()

    play = ops.record(with_another)
    other.result.zero_()
    play()
    assert not other.result.any()
