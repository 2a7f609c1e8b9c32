"""Paged attention on a GPU: which kernels of `kernels.gpu.attend` a batch needs, decided without asking the GPU."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels import reference
from kernels.cache import LayerCache
from kernels.gpu import flash
from kernels.gpu.attend import attend, combine
from kernels.gpu.metadata import GpuAttentionMetadata
from kernels.gpu.variant import Variant
from kernels.metadata import AttentionMetadata

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
"""Features of a head, at most: larger tiles would not fit the registers."""
LOG2E = 1.4426950408889634
MIN_ROWS = 16
"""The least M of a tensor-core product."""
MAX_SPLITS = 64
MIN_SPLIT_KEYS = 256
"""In bf16, 128 KiB of keys and values to read, against 8 KiB of a part (G = 8, D = 128) to write and read again."""
WAVES = 2
"""Programs for each multiprocessor: what its shared memory holds at once."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a launch depends on.

    Attributes:
        capability: 80 or 90, the part of the tables here that fits best.
        multiprocessors: SMs.
    """

    capability: int
    multiprocessors: int


H100 = Gpu(90, 132)
"""Taken where there is no GPU to ask, as under Triton's interpreter."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a program.

    Attributes:
        rows: M, the least; more if the heads of a group are more.
        keys: N.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


FP32 = {"prefill": Tiles(32, 32, num_warps=4, num_stages=2), "decode": Tiles(MIN_ROWS, 32, num_warps=4, num_stages=2)}
"""For checks; nobody serves in fp32 on a GPU."""
PREFILL = {
    (80, False): Tiles(128, 32, num_warps=8, num_stages=5),
    (80, True): Tiles(64, 64, num_warps=4, num_stages=5),
    (90, False): Tiles(128, 64, num_warps=8, num_stages=5),
    (90, True): Tiles(128, 64, num_warps=8, num_stages=5),
}
"""By compute capability and whether the cache is int8: the largest tiles that spill no registers at D = 128
(`variants`, compiled). Before Hopper, each warp has rows of its own and converts all the integers itself, so more warps
would convert more often. Half of the stages are for the block tables, whose entries must be there before the addresses
of the keys are known: five stages keep two tiles of keys and values on the way."""
WIDE_PREFILL = Tiles(64, 32, num_warps=8, num_stages=3)
"""Likewise for heads of more than 128 features, and those that are filled up, whose masks want registers too."""
DECODE = Tiles(MIN_ROWS, 64, num_warps=4, num_stages=5)
"""In bf16, two tiles of 32 KiB: on an H100 or H200 three such programs fit a multiprocessor, and what they have on the
way is several times the 29 KiB that cover a latency of 0.8 us at its share of 4.8 TB/s."""
WIDE_DECODE = Tiles(MIN_ROWS, 32, num_warps=4, num_stages=5)
"""As many bytes, for heads of more than 128 features."""


def paged_attention(q: Tensor, cache: LayerCache, metadata: AttentionMetadata, *, scale: float) -> Tensor:
    """See `ops.paged_attention`; D of `q` contiguous.

    Heads of more than `MAX_HEAD_DIM` features go to FlashAttention or, slowly, to `kernels.reference`.

    Raises:
        TypeError: the metadata was made for another device.
    """
    if not isinstance(metadata, GpuAttentionMetadata):
        raise TypeError(f"{type(metadata).__name__} was made for another device; use ops.attention_metadata")
    if metadata.flash and not cache.quantized:
        return flash.attention(
            q, cache, metadata, max_queries=metadata.max_queries, max_context=metadata.max_context, scale=scale
        )
    if q.shape[2] > MAX_HEAD_DIM:
        _warn_of_head_dim(q.shape[2])
        return reference.paged_attention(q, cache, metadata, scale=scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // cache.num_kv_heads
    short = short_queries(group)
    if metadata.min_queries <= short:
        _decode(q, cache, metadata, scale, short=short, out=out)
    if metadata.max_queries > short:
        _prefill(q, cache, metadata, scale, short=short, out=out)
    return out


def padded_dim(head_dim: int) -> int:
    """Features that a head of `head_dim` is computed with; a tensor core's product sums over 16 at least."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def tiles_for(q: Tensor, *, quantized: bool, decode: bool) -> Tiles:
    """Sizes of a program for queries [T, heads, D]; `quantized`: over an int8 cache."""
    if q.dtype == torch.float32:
        return FP32["decode" if decode else "prefill"]
    padded = padded_dim(q.shape[2])
    if decode:
        return WIDE_DECODE if padded > 128 else DECODE
    wide = padded > 128 or padded > q.shape[2]
    return WIDE_PREFILL if wide else PREFILL[_gpu(q.device).capability, quantized]


def rows_of(tiles: Tiles, group: int) -> int:
    """M, with at least one query's group in it."""
    return max(tiles.rows, int(triton.next_power_of_2(group)))


def short_queries(group: int) -> int:
    """The most queries of a request that one tile of decoding takes."""
    return max(MIN_ROWS, int(triton.next_power_of_2(group))) // group


def num_splits(programs: int, max_context: int, multiprocessors: int) -> int:
    """Programs among which to divide each context, by what is known before: its bound and how many contexts there are.

    As many as fill the GPU `WAVES` times, but none with fewer than `MIN_SPLIT_KEYS` of the longest context.
    """
    wanted = min(-(-WAVES * multiprocessors // programs), max_context // MIN_SPLIT_KEYS)
    return max(1, min(wanted, MAX_SPLITS))


def _prefill(
    q: Tensor, cache: LayerCache, metadata: GpuAttentionMetadata, scale: float, *, short: int, out: Tensor
) -> None:
    tiles = tiles_for(q, quantized=cache.quantized, decode=False)
    group = q.shape[1] // cache.num_kv_heads
    rows = rows_of(tiles, group)
    requests = len(metadata.context_lens)
    grid = (q.shape[0] // (rows // group) + requests, cache.num_kv_heads)
    attend[grid](
        q, out, None, None, cache.keys, cache.values, cache.key_scales, cache.value_scales,
        metadata.block_tables, metadata.query_start, metadata.context_lens,
        q.stride(0), q.stride(1), metadata.block_tables.stride(0), requests, 1, scale * LOG2E,
        GROUP=group, KV_HEADS=cache.num_kv_heads, HEAD_DIM=q.shape[2], PADDED=padded_dim(q.shape[2]),
        BLOCK_SIZE=metadata.block_size, M=rows, N=tiles.keys, SHORT=short, DECODE=False, SPLIT=False,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _decode(
    q: Tensor, cache: LayerCache, metadata: GpuAttentionMetadata, scale: float, *, short: int, out: Tensor
) -> None:
    tiles = tiles_for(q, quantized=cache.quantized, decode=True)
    kv_heads, head_dim = cache.num_kv_heads, q.shape[2]
    group = q.shape[1] // kv_heads
    rows = rows_of(tiles, group)
    requests = len(metadata.context_lens)
    splits = num_splits(requests * kv_heads, metadata.max_context, _gpu(q.device).multiprocessors)
    parts = sizes = None
    if splits > 1:
        parts = torch.empty((requests, kv_heads, splits, rows, head_dim), dtype=torch.float32, device=q.device)
        sizes = torch.empty((requests, kv_heads, splits, rows), dtype=torch.float32, device=q.device)
    attend[(requests, kv_heads, splits)](
        q, out, parts, sizes, cache.keys, cache.values, cache.key_scales, cache.value_scales,
        metadata.block_tables, metadata.query_start, metadata.context_lens,
        q.stride(0), q.stride(1), metadata.block_tables.stride(0), requests, splits, scale * LOG2E,
        GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PADDED=padded_dim(head_dim), BLOCK_SIZE=metadata.block_size,
        M=rows, N=tiles.keys, SHORT=short, DECODE=True, SPLIT=splits > 1,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        combine[(requests, min(short, metadata.max_queries) * group, kv_heads)](
            parts, sizes, out, metadata.query_start, metadata.context_lens, splits,
            GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PADDED=padded_dim(head_dim), M=rows, N=tiles.keys,
            SHORT=short, SPLITS=triton.next_power_of_2(splits), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    return Gpu(90 if properties.major >= 9 else 80, properties.multi_processor_count)


@functools.cache
def _warn_of_head_dim(head_dim: int) -> None:
    """Once for each size."""
    logger.warning(
        "attention heads of %d features have no GPU kernel (those of up to %d have): attention runs as plain torch, "
        "slowly, and only with enforce_eager: true",
        head_dim,
        MAX_HEAD_DIM,
    )


def variants() -> list[Variant]:
    """ERNIE-4.5-300B-A47B on one GPU, bf16 and int8 caches: prefill, decode whole and in parts, the sum of parts.

    And the same with heads of other sizes: 64, and 80 and 256, which are computed as 128 and with smaller tiles.
    """
    return [
        *(
            _variant(f"prefill sm_{capability}", tiles, quantized=quantized, head_dim=head_dim, only=(capability,))
            for (capability, quantized), tiles in PREFILL.items()
            for head_dim in (64, 128)
        ),
        *(
            _variant(kind, tiles, quantized=quantized, head_dim=256)
            for kind, tiles in (("prefill", WIDE_PREFILL), ("decode split", WIDE_DECODE))
            for quantized in (False, True)
        ),
        _variant("prefill", WIDE_PREFILL, quantized=True, head_dim=80),
        *(
            _variant(kind, DECODE, quantized=quantized, head_dim=head_dim)
            for kind, head_dim in (("decode", 128), ("decode split", 64), ("decode split", 128))
            for quantized in (False, True)
        ),
        Variant(
            "attention combine",
            combine,
            signature={
                "parts": "*fp32", "sizes": "*fp32", "out": "*bf16", "query_start": "*i32", "context_lens": "*i32",
                "splits": "i32",
            },
            constexprs={
                "GROUP": 8, "KV_HEADS": 8, "HEAD_DIM": 128, "PADDED": 128, "M": MIN_ROWS, "N": DECODE.keys, "SHORT": 2,
                "SPLITS": MAX_SPLITS,
            },
            num_warps=4,
            num_stages=1,
            aligned=("parts", "sizes", "out", "query_start", "context_lens"),
        ),
    ]  # fmt: skip


def _variant(kind: str, tiles: Tiles, *, quantized: bool, head_dim: int, only: tuple[int, ...] = (80, 90)) -> Variant:
    split = kind == "decode split"
    page = "i8" if quantized else "bf16"
    scales, partial = ("key_scales", "value_scales"), ("parts", "sizes")
    pointers = {
        "q": "*bf16", "out": "*bf16", **(dict.fromkeys(partial, "*fp32") if split else {}),
        "keys": f"*{page}", "values": f"*{page}", **(dict.fromkeys(scales, "*fp16") if quantized else {}),
        **dict.fromkeys(("block_tables", "query_start", "context_lens"), "*i32"),
    }  # fmt: skip
    sizes = dict.fromkeys(("q_stride", "q_head_stride", "table_stride", "requests", "splits"), "i32")
    return Variant(
        f"attention {page} {head_dim} {kind}",
        attend,
        signature={**pointers, **sizes, "scale": "fp32"},
        constexprs={
            **({} if split else dict.fromkeys(partial)),
            **({} if quantized else dict.fromkeys(scales)),
            "GROUP": 8, "KV_HEADS": 8, "HEAD_DIM": head_dim, "PADDED": padded_dim(head_dim), "BLOCK_SIZE": 16,
            "M": tiles.rows, "N": tiles.keys, "SHORT": 2, "DECODE": kind.startswith("decode"), "SPLIT": split,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        aligned=(*pointers, "q_stride", "q_head_stride"),
        capabilities=only,
    )  # fmt: skip
