"""What `benchmarks.kernels` measures: operations of `kernels.ops` at a model's shapes, and torch's own beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_weights import random_weight
from engine.config import ModelConfig
from kernels import ops
from kernels.cache import LayerCache, token_bytes
from kernels.prepared import dense

FORMATS = ("wint2", "wint2 by column", "wint4", "wint8", "bitplane2", "bitplane4", "grouped4", "bf16")
"""Of weights; "by column" has a codebook for each column, as Baidu's files may; "grouped4" is GPTQ's, groups of 128."""
BLOCK_SIZE = 16
INT4_GROUP = 64
MAX_CACHE_BYTES = 24 * 10**9


@dataclass(frozen=True, slots=True)
class Entry:
    """One implementation of a case.

    Attributes:
        name: a format of `FORMATS`, a dtype, or "torch ..." for torch's own.
        run: the work.
        moved: bytes that have to come from or go to memory.
    """

    name: str
    run: Callable[[], object]
    moved: int


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape and batch; the entries compute the same thing, "torch dense" first if there is one."""

    operation: str
    shape: str
    batch: int
    entries: list[Entry]


class Cases:
    """Makes the cases of a model one after the other, so that only one's weights are in memory at a time.

    Args:
        model: for the shapes.
        formats: of `FORMATS`.
        batches: tokens.
        device: where to run.
        dtype: compute dtype.
        contexts: keys of each request, for attention.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        formats: Sequence[str],
        batches: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        contexts: Sequence[int],
    ) -> None:
        self.model = model
        self.formats = formats
        self.batches = batches
        self.device = device
        self.dtype = dtype
        self.contexts = contexts
        torch.manual_seed(0)

    def all(self, only: Sequence[str] = ()) -> Iterator[Case]:
        """Every case, or those of operations whose names contain one of `only`."""
        model, hidden = self.model, self.model.hidden_size
        width = model.num_attention_heads * model.head_dim
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        groups = {
            "linear": [
                self.linear("qkv", hidden, heads * model.head_dim),
                self.linear("attention output", width, hidden),
                self.linear("dense gate and up", hidden, 2 * model.intermediate_size),
                self.linear("dense down", model.intermediate_size, hidden),
                self.linear("head", hidden, model.vocab_size),
            ],
            "fused_moe": [self.experts()],
            "paged_attention": [self.attention()],
            "add_rms_norm silu_and_mul rotary_store_kv route": [self.small()],
        }
        for operations, cases in groups.items():
            if not only or any(part in operations for part in only):
                yield from chain.from_iterable(cases)

    def linear(self, what: str, k: int, n: int) -> Iterator[Case]:
        """``ops.linear`` in every format, torch's product in the compute dtype, and torch's int4 kernel."""
        dense = torch.randn(n, k, dtype=self.dtype, device=self.device)
        prepared = {name: self._prepare(name, k, n) for name in self.formats}
        torch_int4 = _torch_int4(k, n, self.device)
        for batch in self.batches:
            x = self._randn(batch, k)
            through = (k + n) * batch * x.element_size()
            entries = [Entry("torch dense", partial(F.linear, x, dense), _bytes(dense) + through)]
            if torch_int4 is not None:
                run, size = torch_int4
                half = x.to(torch.bfloat16)
                entries.append(Entry("torch int4", partial(run, half), size + through))
            entries += [
                Entry(name, partial(ops.linear, x, weight), weight.num_bytes + through)
                for name, weight in prepared.items()
            ]
            yield Case("linear", f"{what} {k} x {n}", batch, entries)

    def experts(self) -> Iterator[Case]:
        """``ops.fused_moe`` with random routing; beside it torch's products, expert by expert, with known routing."""
        moe = self.model.moe
        if moe is None:
            return
        hidden, width, count = self.model.hidden_size, moe.intermediate_size, moe.num_experts
        shape = f"{count} experts {hidden} x {width}, top {moe.num_experts_per_token}"
        for name in ("torch dense", *self.formats):
            bare = name.startswith("torch")
            up = self._prepare("bf16" if bare else name, hidden, 2 * width, experts=count)
            down = self._prepare("bf16" if bare else name, width, hidden, experts=count)
            for batch in self.batches:
                x = self._randn(batch, hidden)
                chosen = torch.rand(batch, count, generator=torch.Generator().manual_seed(batch)).argsort(dim=-1)
                ids = chosen[:, : moe.num_experts_per_token].to(self.device)
                weights = torch.full(ids.shape, 1 / ids.shape[1], device=self.device)
                touched = ids.unique().numel() / count
                moved = int(touched * (up.num_bytes + down.num_bytes)) + 2 * _bytes(x)
                run = _expert_by_expert(x, up, down, ids) if bare else partial(ops.fused_moe, x, up, down, weights, ids)
                yield Case("fused_moe", shape, batch, [Entry(name, run, moved)])

    def attention(self) -> Iterator[Case]:
        """``ops.paged_attention`` of one query a request, with a cache in the compute dtype and in int8."""
        model = self.model
        heads, kv_heads, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
        for context in self.contexts:
            for batch in self.batches:
                width = -(-context // BLOCK_SIZE)
                entries = []
                for name, dtype in (("int8", torch.int8), (str(self.dtype).removeprefix("torch."), self.dtype)):
                    size = batch * width * BLOCK_SIZE * token_bytes(kv_heads, dim, dtype)
                    if size > MAX_CACHE_BYTES:
                        continue
                    cache = self._cache(batch * width, dtype)
                    tables = torch.randperm(batch * width, device=self.device).int().view(batch, width)
                    metadata = ops.decode_metadata(
                        tables,
                        torch.arange(batch + 1, dtype=torch.int32, device=self.device),
                        torch.full((batch,), context, dtype=torch.int32, device=self.device),
                        block_size=BLOCK_SIZE,
                        dtype=self.dtype,
                    )
                    q = self._randn(batch, heads, dim)
                    run = partial(ops.paged_attention, q, cache, metadata, scale=dim**-0.5)
                    entries.append(Entry(name, run, batch * context * token_bytes(kv_heads, dim, dtype)))
                if entries:
                    yield Case("paged_attention", f"{heads} heads, {kv_heads} kv, context {context}", batch, entries)

    def small(self) -> Iterator[Case]:
        """The operations between the products."""
        model, hidden = self.model, self.model.hidden_size
        name = str(self.dtype).removeprefix("torch.")
        moe, device = model.moe, self.device
        inv_freq = torch.rand(model.head_dim // 2, device=device)
        norm = torch.ones(hidden, dtype=self.dtype, device=device)
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        for batch in self.batches:
            x, residual = self._randn(batch, hidden), self._randn(batch, hidden)
            wide = self._randn(batch, 2 * model.intermediate_size)
            qkv = self._randn(batch, heads + 2 * kv_heads, model.head_dim)
            cache = self._cache(-(-batch // BLOCK_SIZE), self.dtype)
            slots = torch.arange(batch, device=device)
            table = ops.rotary_table(torch.arange(batch, dtype=torch.int32, device=device), inv_freq)
            works: dict[str, tuple[Callable[[], object], int]] = {
                "add_rms_norm": (partial(ops.add_rms_norm, x, residual, norm, 1e-5), 4 * _bytes(x)),
                "silu_and_mul": (partial(ops.silu_and_mul, wide), _bytes(wide) * 3 // 2),
                "rotary_store_kv": (
                    partial(ops.rotary_store_kv, qkv, table, cache, slots, num_heads=heads, interleaved=True),
                    2 * _bytes(qkv),
                ),
            }
            if moe is not None:
                gate = torch.randn(moe.num_experts, hidden, device=device)
                top_k = moe.num_experts_per_token
                works["route"] = (
                    partial(ops.route, x, gate, None, top_k=top_k, norm_min=moe.norm_min),
                    _bytes(gate) + _bytes(x),
                )
            for operation, (run, moved) in works.items():
                yield Case(operation, f"hidden {hidden}", batch, [Entry(name, run, moved)])

    def _prepare(self, name: str, k: int, n: int, *, experts: int | None = None) -> ops.Prepared:
        weight = random_weight(
            name.partition(" ")[0],
            k,
            n,
            experts=experts,
            device=self.device,
            dtype=self.dtype,
            one_codebook="by column" not in name,
        )
        return ops.prepare(weight, dtype=self.dtype, device=self.device)

    def _cache(self, blocks: int, dtype: torch.dtype) -> LayerCache:
        model = self.model
        shape = (blocks, BLOCK_SIZE, model.num_key_value_heads, model.head_dim)
        if dtype != torch.int8:
            return LayerCache(self._randn(*shape), self._randn(*shape))
        keys, values = (torch.randint(-127, 128, shape, dtype=dtype, device=self.device) for _ in range(2))
        scales = torch.full((blocks, shape[2], BLOCK_SIZE), 1 / 74, dtype=torch.float16, device=self.device)
        return LayerCache(keys, values, scales, scales.clone())

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _expert_by_expert(x: Tensor, up: ops.Prepared, down: ops.Prepared, ids: Tensor) -> Callable[[], object]:
    """torch's dense products for the tokens of each expert; who goes where is known before, as it never is."""
    first, second = dense(up).weight, dense(down).weight
    parts = [(e, (ids == e).any(dim=-1).nonzero().flatten()) for e in ids.unique().tolist()]

    def run() -> Tensor:
        out = torch.zeros_like(x)
        for expert, rows in parts:
            gate, value = F.linear(x[rows], first[expert]).chunk(2, dim=-1)
            out.index_add_(0, rows, F.linear(F.silu(gate) * value, second[expert]))
        return out

    return run


def _torch_int4(k: int, n: int, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int] | None:
    """torch's int4 product (a scale and a zero point for 64 inputs) and its bytes; None where it has none."""
    scales = torch.ones(k // INT4_GROUP, n, 2, dtype=torch.bfloat16, device=device)
    try:
        if device.type == "cuda":
            nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
            packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
            product = torch.ops.aten._weight_int4pack_mm
        else:
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
        product(torch.zeros(1, k, dtype=torch.bfloat16, device=device), packed, INT4_GROUP, scales)
    except (RuntimeError, AttributeError):  # a build of torch without this product
        return None
    return lambda x: product(x, packed, INT4_GROUP, scales), _bytes(packed) + _bytes(scales)
