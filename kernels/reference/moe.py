"""Routing and the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.prepared import Prepared, dense


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of [T, gate I | up I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(x: Tensor, gate: Tensor, bias: Tensor | None, *, top_k: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """Choose by p + bias, weigh by p; see `ops.route`."""
    probabilities = torch.softmax(F.linear(x.float(), gate), dim=-1)  # [T, E]
    choice = probabilities if bias is None else probabilities + bias
    # A stable sort rather than topk: equal scores go to the lower expert on every device.
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, ids)  # [T, k]
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=norm_min), ids


def fused_moe(x: Tensor, gate_up: Prepared, down: Prepared, weights: Tensor, ids: Tensor) -> Tensor:
    """Every expert on all tokens, weighted with zero where the token did not choose it."""
    first, second = dense(gate_up).weight, dense(down).weight
    share = x.new_zeros(x.shape[0], len(first)).scatter_(1, ids, weights.to(x.dtype))  # [T, E]
    out = torch.zeros_like(x)
    for expert in range(len(first)):
        hidden = silu_and_mul(F.linear(x, first[expert]))  # [T, I]
        out += F.linear(hidden, second[expert]) * share[:, expert, None]
    return out
