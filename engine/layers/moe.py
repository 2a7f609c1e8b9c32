"""Mixture of experts with optional shared experts."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.linear import GatedMLP
from kernels import ops
from kernels.operands import Weight


class SparseMoE:
    """Routed experts, each cut over the ranks like a dense MLP, plus shared experts that see every token.

    Every rank routes every token by itself: the gate is whole, and the input is the same on all ranks to the bit.

    Args:
        gate: fp32 [E, H].
        bias: fp32 [E] or None; see `ops.route`.
        gate_up: stacked (E, H, 2I), I being this rank's share.
        down: stacked (E, I, H).
        shared: the shared experts as one MLP, or None.
        top_k: experts a token.
        norm_min: least divisor of the weights.
        dtype: compute dtype.
        device: compute device.
    """

    def __init__(
        self,
        gate: Tensor,
        bias: Tensor | None,
        *,
        gate_up: Weight,
        down: Weight,
        shared: GatedMLP | None,
        top_k: int,
        norm_min: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.gate = gate
        self.bias = bias
        self.gate_up = ops.prepare(gate_up, dtype=dtype, device=device)
        self.down = ops.prepare(down, dtype=dtype, device=device)
        self.shared = shared
        self.top_k = top_k
        self.norm_min = norm_min
        self.expert_tokens: Tensor | None = None
        """int64 [E], tokens that went to each expert, where they are counted: `engine.execution.experts`."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], a partial sum."""
        weights, ids = ops.route(x, self.gate, self.bias, top_k=self.top_k, norm_min=self.norm_min)  # [T, k] each
        if self.expert_tokens is not None:
            taken = ids.flatten().long()
            self.expert_tokens.index_add_(0, taken, torch.ones_like(taken))
        routed = ops.fused_moe(x, self.gate_up, self.down, weights, ids)
        return routed if self.shared is None else routed.add_(self.shared(x))
