"""Cross-entropy over the vocabulary in small chunks, its gradient made on the way forward.

The logits of a batch would be 8192 columns of fp32 for each token; a chunk of them stays in the
cache instead, and none is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 128


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden W^T` against targets, W being the fp32 head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """hidden [tokens, hidden] in the dtype of the products, targets [tokens]."""
        weight = head.to(hidden.dtype)
        grad_head = torch.zeros_like(head)
        grad_hidden = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            rows, wanted = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            scores = (rows @ weight.t()).float()
            scores -= scores.amax(-1, keepdim=True)
            right = scores.gather(1, wanted)
            odds = scores.exp_()
            sums = odds.sum(-1, keepdim=True)
            total += (sums.log() - right).sum()
            odds /= sums
            odds.scatter_add_(1, wanted, torch.full_like(right, -1.0))
            grad = odds.to(hidden.dtype)
            grad_hidden[start : start + CHUNK] = grad @ weight
            grad_head += grad.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """What was made on the way forward, divided by the number of tokens."""
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0] / ctx.count
        return grad_hidden * scale.to(grad_hidden.dtype), grad_head * scale, None
