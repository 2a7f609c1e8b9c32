"""The only door to tensor work: one documented function for each operation, dispatched by device.

T tokens of a flat batch; H hidden size; K, N input and output features; D head dimension. Activations are in the
compute dtype (fp32, bf16 or fp16) unless said otherwise. A device without kernels of its own runs `kernels.reference`.

Every function raises TypeError for an argument of another dtype than it says, and ValueError for one on another device
than the first, or with another number of features than fits; the message names the argument.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels import choice
from kernels.backend import Kernels
from kernels.cache import LayerCache
from kernels.checks import FLOATS, INTS, check, check_array, check_features
from kernels.cpu import tape
from kernels.metadata import AttentionMetadata
from kernels.operands import Weight
from kernels.prepared import Prepared

__all__ = [
    "AttentionMetadata",
    "LayerCache",
    "Prepared",
    "add_rms_norm",
    "attention_metadata",
    "decode_metadata",
    "embedding",
    "fused_moe",
    "linear",
    "paged_attention",
    "prepare",
    "prepare_embedding",
    "record",
    "rms_norm",
    "rotary",
    "rotary_store_kv",
    "rotary_table",
    "route",
    "silu_and_mul",
    "store_kv",
]


def _kernels(device: torch.device) -> Kernels:
    return choice.kernels(device)


def prepare(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Bring a weight into the layout that `device` computes with; called once, at load.

    Packed weights stay packed where the device multiplies them as they are; those it can't, and on a CPU those that
    are small enough to be faster dense, are decoded once, to `dtype` (`kernels.choice` says which).

    Args:
        weight: one matrix (K, N) or stacked experts (E, K, N); see `kernels.operands`.
        dtype: compute dtype.
        device: where the products will run.

    Raises:
        TypeError: not an operand of `kernels.operands`.
    """
    return _kernels(device).prepare(weight, dtype=dtype, device=device)


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``: x [T, K], weight (K, N), bias [N] in the dtype of `x` -> [T, N].

    With tensor parallelism and a weight cut by output features, `bias` is this rank's features. The result of a weight
    cut by input features is a partial sum, to which at most one rank may add a bias.
    """
    check("x", x, FLOATS, x.device)
    check_features("x", x.shape[-1], weight.in_features, "weight")
    if bias is not None:
        check("bias", bias, (x.dtype,), x.device)
        check_features("bias", bias.shape[-1], weight.out_features, "weight")
    return _kernels(x.device).linear(x, weight, bias)


def prepare_embedding(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Tensor | Prepared:
    """Bring a token table into the layout that `embedding` reads on `device`; called once, at load.

    Args:
        weight: the table as a matrix, K = H and N = rows.
        dtype: compute dtype, of the rows that are looked up.
        device: where they will be.

    Returns:
        Where the device looks up packed rows, what `prepare` makes of it, which serves `linear` too (a tied head);
        elsewhere the decoded table [rows, H].

    Raises:
        TypeError: an operand whose rows can't be looked up.
    """
    return _kernels(device).prepare_embedding(weight, dtype=dtype, device=device)


def embedding(ids: Tensor, table: Tensor | Prepared, first_row: int) -> Tensor:
    """Look up a rank's rows of the vocabulary.

    Args:
        ids: int [T], at least one.
        table: [rows, H], or what `prepare_embedding` made of it: the rows ``first_row ... first_row + rows - 1`` of the
            whole table.
        first_row: see `table`.

    Returns:
        [T, H]; zeros for ids of other ranks' rows, so that a sum over ranks is the embedding.
    """
    check("ids", ids, INTS, ids.device)
    if isinstance(table, Tensor):
        check("table", table, FLOATS, ids.device)
    return _kernels(ids.device).embedding(ids, table, first_row)


def route(x: Tensor, gate: Tensor, bias: Tensor | None, *, top_k: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """Choose experts as ERNIE-4.5 does, all in fp32.

    ``p = softmax(x gate^T)``; the `top_k` largest of ``p + bias`` are chosen, equal ones by lower index; their
    weights are the unbiased p divided by ``max(sum of the chosen p, norm_min)``.

    Args:
        x: [T, H].
        gate: fp32 [E, H].
        bias: fp32 [E], the correction for balanced load, or None.
        top_k: experts a token.
        norm_min: least divisor.

    Returns:
        weights fp32 [T, top_k] and ids int64 [T, top_k], best first.
    """
    check("x", x, FLOATS, x.device)
    check("gate", gate, (torch.float32,), x.device)
    check_features("x", x.shape[-1], gate.shape[-1], "gate")
    if bias is not None:
        check("bias", bias, (torch.float32,), x.device)
    return _kernels(x.device).route(x, gate, bias, top_k=top_k, norm_min=norm_min)


def fused_moe(x: Tensor, gate_up: Prepared, down: Prepared, weights: Tensor, ids: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLU.

    Args:
        x: [T, H].
        gate_up: stacked (E, H, 2I), gate features first. With tensor parallelism I is a rank's share.
        down: stacked (E, I, H).
        weights: fp32 [T, k], rounded to the dtype of `x` before use.
        ids: int64 [T, k], different experts in a row.

    Returns:
        [T, H]; with tensor parallelism a partial sum.
    """
    check("x", x, FLOATS, x.device)
    check("weights", weights, (torch.float32,), x.device)
    check("ids", ids, (torch.int64,), x.device)
    check_features("x", x.shape[-1], gate_up.in_features, "gate_up")
    check_features("gate_up", gate_up.out_features, 2 * down.in_features, "down")
    return _kernels(x.device).fused_moe(x, gate_up, down, weights, ids)


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :I]) * x[:, I:]``: [T, 2I] -> [T, I]."""
    check("x", x, FLOATS, x.device)
    return _kernels(x.device).silu_and_mul(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, variance in fp32, rounded before `weight` [H] is applied: [T, H] -> [T, H]."""
    check("x", x, FLOATS, x.device)
    check("weight", weight, (x.dtype,), x.device)
    check_features("x", x.shape[-1], weight.shape[-1], "weight")
    return _kernels(x.device).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``: [T, H] each."""
    check("x", x, FLOATS, x.device)
    check("residual", residual, (x.dtype,), x.device)
    check("weight", weight, (x.dtype,), x.device)
    check_features("x", x.shape[-1], weight.shape[-1], "weight")
    return _kernels(x.device).add_rms_norm(x, residual, weight, eps)


def rotary_table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles of a step, the same for all its layers.

    Args:
        positions: int [T].
        inv_freq: fp32 [D/2], ``theta ** (-2i / D)``.

    Returns:
        cos and sin of ``position * inv_freq`` in fp32, in the form that `rotary` on this device takes.
    """
    check("positions", positions, INTS, positions.device)
    check("inv_freq", inv_freq, (torch.float32,), positions.device)
    return _kernels(positions.device).rotary_table(positions, inv_freq)


def rotary(x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of features of every head (RoPE, arXiv 2104.09864), in fp32.

    Pair i, of the features a and b, becomes ``(a cos - b sin, b cos + a sin)`` with the table's i-th angle.

    Args:
        x: [T, heads, D], query and key heads together if they stand together; D contiguous.
        table: from `rotary_table`.
        interleaved: pair i is the features (2i, 2i + 1), as in ERNIE-4.5 and the paper; otherwise (i, i + D/2), as in
            Qwen2 and GPT-NeoX, whose code calls it rotate_half.

    Returns:
        [T, heads, D] in the dtype of `x`.
    """
    check("x", x, FLOATS, x.device)
    return _kernels(x.device).rotary(x, table, interleaved=interleaved)


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Write this step's keys and values into the cache, in place; an int8 cache gets them quantized.

    Args:
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        cache: of this layer.
        slot_mapping: int64 [T], ``block * block_size + offset``, no slot twice.
    """
    check("k", k, FLOATS, k.device)
    check("v", v, (k.dtype,), k.device)
    _check_cache(cache, k.dtype, k.device)
    check("slot_mapping", slot_mapping, (torch.int64,), k.device)
    _kernels(k.device).store_kv(k, v, cache, slot_mapping)


def rotary_store_kv(
    qkv: Tensor, table: Tensor, cache: LayerCache, slot_mapping: Tensor, *, num_heads: int, interleaved: bool
) -> Tensor:
    """`rotary` of queries and keys and `store_kv` in one: what stands between the projection and attention.

    Args:
        qkv: [T, heads + 2 Hkv, D]: queries, keys, values.
        table: from `rotary_table`.
        cache: of this layer, written in place.
        slot_mapping: int64 [T], as for `store_kv`.
        num_heads: query heads.
        interleaved: as for `rotary`.

    Returns:
        The queries, [T, heads, D].
    """
    check("qkv", qkv, FLOATS, qkv.device)
    _check_cache(cache, qkv.dtype, qkv.device)
    check("slot_mapping", slot_mapping, (torch.int64,), qkv.device)
    return _kernels(qkv.device).rotary_store_kv(
        qkv, table, cache, slot_mapping, num_heads=num_heads, interleaved=interleaved
    )


def attention_metadata(
    block_tables: np.ndarray,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionMetadata:
    """Describe a flat batch to `paged_attention`, once for all layers of a step.

    Args:
        block_tables: int32 [R, max_blocks].
        query_start: int32 [R + 1].
        context_lens: int32 [R].
        block_size: positions in a block.
        dtype: compute dtype.
        device: where the cache is.

    Returns:
        What `paged_attention` on this device takes; see `kernels.metadata.AttentionMetadata` for the arrays.
    """
    check_array("block_tables", block_tables)
    check_array("query_start", query_start)
    check_array("context_lens", context_lens)
    return _kernels(device).attention_metadata(
        block_tables, query_start, context_lens, block_size=block_size, dtype=dtype, device=device
    )


def decode_metadata(
    block_tables: Tensor, query_start: Tensor, context_lens: Tensor, *, block_size: int, dtype: torch.dtype
) -> AttentionMetadata:
    """Describe a batch of one token a request, from tensors that are on the device already.

    On a GPU what is launched then depends on the shapes alone, never on values, so that `paged_attention` can be
    captured in a CUDA graph and replayed when the tensors hold something else. Contexts may be as long as the tables.

    Args:
        block_tables: int32 [R, max_blocks].
        query_start: int32 [R + 1], 0 ... R.
        context_lens: int32 [R].
        block_size: positions in a block.
        dtype: compute dtype.
    """
    check("block_tables", block_tables, (torch.int32,), block_tables.device)
    check("query_start", query_start, (torch.int32,), block_tables.device)
    check("context_lens", context_lens, (torch.int32,), block_tables.device)
    return _kernels(block_tables.device).decode_metadata(
        block_tables, query_start, context_lens, block_size=block_size, dtype=dtype
    )


def paged_attention(q: Tensor, cache: LayerCache, metadata: AttentionMetadata, *, scale: float) -> Tensor:
    """Causal attention of this step's queries over the paged cache; kv head j serves query heads jG ... jG + G - 1.

    Args:
        q: [T, Hq, D].
        cache: of this layer, this step's keys and values already stored.
        metadata: from `attention_metadata`, for the same device.
        scale: factor of the scores, usually ``D ** -0.5``.

    Returns:
        [T, Hq, D].
    """
    check("q", q, FLOATS, q.device)
    _check_cache(cache, q.dtype, q.device)
    return _kernels(q.device).paged_attention(q, cache, metadata, scale=scale)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Do something on CPU tensors once, and return what does it again on the same memory, in a few calls.

    Args:
        run: operations of this module, and of torch. What they do must not depend on values: of the metadata only
            `decode_metadata` in fp32 will do.

    Raises:
        RuntimeError: a value was asked for.
    """
    return tape.record(run)


def _check_cache(cache: LayerCache, dtype: torch.dtype, device: torch.device) -> None:
    """Of the compute dtype or int8."""
    check("cache.keys", cache.keys, (dtype, torch.int8), device)
    check("cache.values", cache.values, (cache.keys.dtype,), device)
