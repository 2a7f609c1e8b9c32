"""Routing and the experts on a CPU: each active expert sees its tokens as one contiguous slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """One token: a matrix-vector product per chosen expert. More: tokens sorted by expert, a product per expert.

    The k results of a token are summed in the order of `ids`, whatever else is in the batch.
    """
    weights = weights.to(x.dtype)
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


def _one_token(
    x: Tensor, gate_up: tuple[Tensor, ...], down: tuple[Tensor, ...], weights: Tensor, ids: Tensor
) -> Tensor:
    chosen = ids.view(-1).tolist()
    row = x.view(-1)
    hidden = silu_and_mul(torch.stack([torch.mv(gate_up[e], row) for e in chosen]))  # [k, I]
    results = torch.stack([torch.mv(down[e], h) for e, h in zip(chosen, hidden.unbind(0), strict=True)])  # [k, H]
    return torch.mm(weights, results)
