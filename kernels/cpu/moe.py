"""Routing and the experts on a CPU: each active expert sees its tokens as one contiguous slice, dense or packed."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.packed import PackedPrepared
from kernels.cpu.product import multiply
from kernels.prepared import Prepared, dense


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of [T, gate I | up I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def route(x: Tensor, gate: Tensor, bias: Tensor | None, *, top_k: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """The reference's arithmetic, dividing in place; see `ops.route`."""
    probabilities = torch.softmax(F.linear(x.float(), gate), dim=-1)  # [T, E]
    choice = probabilities if bias is None else probabilities + bias
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, ids)  # [T, k]
    return weights.div_(weights.sum(-1, keepdim=True).clamp_(min=norm_min)), ids


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
    tokens, top_k = ids.shape
    flat = ids.numpy().reshape(-1)  # [T*k]
    order = flat.argsort(kind="stable")
    chosen, first, counts = np.unique(flat[order], return_index=True, return_counts=True)
    segments = np.stack((chosen, first, counts), axis=1)  # [active experts, 3]
    places = np.arange(len(order))
    hidden = silu_and_mul(_experts(x, gate_up, segments, np.stack((order // top_k, places), axis=1)))  # [T*k, I]
    result = _experts(hidden, down, segments, np.stack((places, order), axis=1))  # [T*k, H], by token
    return torch.bmm(weights.unsqueeze(1), result.view(tokens, top_k, -1)).squeeze(1)


def _experts(x: Tensor, weight: Prepared, segments: np.ndarray, entries: np.ndarray) -> Tensor:
    """`product.multiply`, and the same for a stack that was small enough to be decoded."""
    if isinstance(weight, PackedPrepared):
        return multiply(x, weight, segments, entries).to(x.dtype)
    experts = dense(weight).experts
    sources, targets = torch.from_numpy(entries).unbind(1)
    counts = np.zeros(len(experts), dtype=np.int64)
    counts[segments[:, 0]] = segments[:, 2]
    out = _grouped(x.index_select(0, sources), counts.tolist(), experts)
    return torch.empty_like(out).index_copy_(0, targets, out)


def _one_token(
    x: Tensor, gate_up: tuple[Tensor, ...], down: tuple[Tensor, ...], weights: Tensor, ids: Tensor
) -> Tensor:
    chosen = ids.view(-1).tolist()
    row = x.view(-1)
    hidden = silu_and_mul(torch.stack([torch.mv(gate_up[e], row) for e in chosen]))  # [k, I]
    results = torch.stack([torch.mv(down[e], h) for e, h in zip(chosen, hidden.unbind(0), strict=True)])  # [k, H]
    return torch.mm(weights, results)
