"""Routing and the experts on a CPU: each active expert sees its tokens together, dense or packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.activation import silu_and_mul
from kernels.cpu.packed import PackedPrepared
from kernels.cpu.product import Segments, multiply, stages
from kernels.cpu.threads import Stage, fp32, has_vnni, run
from kernels.prepared import Prepared, dense

COMPILED_TOKENS = 16
"""Tokens up to which their few products with the gate are no work for torch, whose threads would have to be woken."""


def route(x: Tensor, gate: Tensor, bias: Tensor | None, *, top_k: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """All in one pass; see `ops.route`."""
    x = x.float().contiguous()
    tokens, experts = x.shape[0], gate.shape[0]
    few = tokens <= COMPILED_TOKENS
    logits = torch.empty(tokens, experts) if few else F.linear(x, gate)
    weights, ids = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int64)
    scores = torch.empty(tokens, experts)
    gate, bias = gate.contiguous(), None if bias is None else bias.contiguous()
    arguments = (
        *(tokens, experts, top_k, logits.data_ptr(), 0 if bias is None else bias.data_ptr(), fp32(norm_min)),
        *(weights.data_ptr(), ids.data_ptr(), scores.data_ptr()),
        *(x.data_ptr() if few else 0, x.shape[1], gate.data_ptr()),
    )
    read = 4 * scores.numel() * (x.shape[1] if few else top_k)
    run(Stage("choose", arguments, tasks=tokens, num_bytes=read))
    return weights, ids


def fused_moe(x: Tensor, gate_up: Prepared, down: Prepared, weights: Tensor, ids: Tensor) -> Tensor:
    """Packed experts: all that are chosen at once. Dense ones: for one token, a matrix-vector product per chosen
    expert; for more, tokens sorted by expert and a product per expert.

    The k results of a token are summed in the order of `ids`, whatever else is in the batch.
    """
    weights = weights.to(x.dtype)
    if isinstance(gate_up, PackedPrepared) or isinstance(down, PackedPrepared):
        return _packed(x, gate_up, down, weights, ids)
    first, second = dense(gate_up).experts, dense(down).experts
    if x.shape[0] == 1:
        return _one_token(x, first, second, weights, ids)
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)  # [T*k]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(first)).tolist()
    rows = x.index_select(0, order // top_k)  # [T*k, H], by expert
    hidden = silu_and_mul(_grouped(rows, counts, first))  # [T*k, I]
    result = _grouped(hidden, counts, second)  # [T*k, H]
    by_token = torch.empty_like(result).index_copy_(0, order, result).view(tokens, top_k, -1)  # [T, k, H]
    return torch.bmm(weights.unsqueeze(1), by_token).squeeze(1)


def _grouped(rows: Tensor, counts: list[int], experts: tuple[Tensor, ...]) -> Tensor:
    """Rows [sum(counts), K] sorted by expert, times each expert's [N, K]."""
    out = rows.new_empty(rows.shape[0], experts[0].shape[0])
    end = 0
    for expert, count in enumerate(counts):
        if count:
            start, end = end, end + count
            torch.mm(rows[start:end], experts[expert].t(), out=out[start:end])
    return out


def _packed(x: Tensor, gate_up: Prepared, down: Prepared, weights: Tensor, ids: Tensor) -> Tensor:
    """Both products over all pairs of a token and an expert it chose, the pairs of an expert together."""
    stack = gate_up.codes if isinstance(gate_up, PackedPrepared) else dense(gate_up).weight
    segments, first, second = _arrange(ids, stack.shape[0])
    result = torch.empty(first.shape[0], down.out_features)  # [T*k, H], by token
    out = torch.empty(ids.shape[0], down.out_features)
    combine = _combine(weights, result, out)
    if has_vnni() and isinstance(gate_up, PackedPrepared) and isinstance(down, PackedPrepared):
        hidden = torch.empty(first.shape[0], gate_up.out_features)  # [T*k, 2I]
        run(
            *stages(x.float(), gate_up, segments, first, hidden),
            *stages(hidden, down, segments, second, result, gated=True),
            combine,
        )
    else:
        hidden = silu_and_mul(_experts(x, gate_up, segments, first))  # [T*k, I]
        result.copy_(_experts(hidden, down, segments, second))
        run(combine)
    return out.to(x.dtype)


def _arrange(ids: Tensor, experts: int) -> tuple[Segments, Tensor, Tensor]:
    """Pairs by expert: segments of the active ones, and entries of the two products, for `product.multiply`."""
    ids = ids.contiguous()
    pairs, top_k = ids.numel(), ids.shape[1]
    rows, count = torch.empty(min(pairs, experts), 3, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    places = torch.empty(experts, dtype=torch.int64)
    first, second = torch.empty(2, pairs, 2, dtype=torch.int64).unbind(0)
    arguments = (
        *(count.data_ptr(), pairs, top_k, experts, ids.data_ptr(), places.data_ptr()),
        *(rows.data_ptr(), first.data_ptr(), second.data_ptr()),
    )
    run(Stage("arrange", arguments, tasks=1, num_bytes=0))
    return Segments(rows, count), first, second


def _combine(weights: Tensor, results: Tensor, out: Tensor) -> Stage:
    """[T, k] and fp32 [T*k, H] -> fp32 [T, H]."""
    tokens, top_k = weights.shape
    factors = weights.float().contiguous()
    arguments = (tokens, top_k, out.shape[1], factors.data_ptr(), results.data_ptr(), out.data_ptr())
    return Stage("combine", arguments, tasks=tokens, num_bytes=4 * results.numel(), keep=factors)


def _experts(x: Tensor, weight: Prepared, segments: Segments, entries: Tensor) -> Tensor:
    """`product.multiply`, and the same for a stack that was small enough to be decoded: fp32."""
    if isinstance(weight, PackedPrepared):
        return multiply(x, weight, segments, entries)
    experts = dense(weight).experts
    sources, targets = entries.unbind(1)
    counts = torch.zeros(len(experts), dtype=torch.int64)
    rows = segments.rows[: int(segments.count)]
    counts[rows[:, 0]] = rows[:, 2]
    out = _grouped(x.to(experts[0].dtype).index_select(0, sources), counts.tolist(), experts)
    return torch.empty_like(out).index_copy_(0, targets, out).float()


def _one_token(
    x: Tensor, gate_up: tuple[Tensor, ...], down: tuple[Tensor, ...], weights: Tensor, ids: Tensor
) -> Tensor:
    chosen = ids.view(-1).tolist()
    row = x.view(-1)
    hidden = silu_and_mul(torch.stack([torch.mv(gate_up[e], row) for e in chosen]))  # [k, I]
    results = torch.stack([torch.mv(down[e], h) for e, h in zip(chosen, hidden.unbind(0), strict=True)])  # [k, H]
    return torch.mm(weights, results)
