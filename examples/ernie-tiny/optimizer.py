"""Muon for the matrices inside the layers, AdamW for the embedding, the head, the norms and the routers.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes each update an orthogonal
matrix; it learns more from few tokens than Adam does. Experts are stacks of matrices, so all matrices
of one size are orthogonalised together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MATRIX_RATE, EMBEDDING_RATE, HEAD_RATE, SMALL_RATE = 8e-3, 6e-3, 3e-3, 1e-3
RMS = 0.2  # of an update's entries, whatever the matrix's size (arXiv:2502.16982)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the coefficients of the quintic iteration in the post above


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest (roughly) orthogonal matrices of a stack [count, rows, columns], rows <= columns."""
    a, b, c = NEWTON_SCHULZ
    x = stack / stack.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _matrices(parameter: Tensor) -> Tensor:
    """View a parameter as a stack [count, rows, columns]; gate and up projections are two matrices."""
    if parameter.ndim == 2:
        return parameter[None]
    return parameter.unflatten(1, (-1, parameter.shape[2])).flatten(0, 1)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, over parameters of two or three dimensions."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Apply one update."""
        for group in self.param_groups:
            by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = parameter.grad.lerp(state["momentum"], MOMENTUM)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                weight, update = _matrices(parameter), _matrices(update)
                if weight.shape[1] > weight.shape[2]:
                    weight, update = weight.mT, update.mT
                by_size[weight.shape[1], weight.shape[2]].append((weight, update))
            self._apply(group["lr"], by_size)

    @staticmethod
    def _apply(rate: float, by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor]]]) -> None:
        for (_, columns), pairs in by_size.items():
            stack = orthogonalise(torch.cat([update for _, update in pairs]))
            for (weight, _), update in zip(pairs, stack.split([len(weight) for weight, _ in pairs]), strict=True):
                weight.sub_(update, alpha=rate * RMS * columns**0.5)


def make(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The two optimizers of a model, every group's full rate kept under "peak"."""
    matrices, embedding, head, small, gains = [], [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "embed_tokens" in name:
            embedding.append(parameter)
        elif "lm_head" in name:
            head.append(parameter)
        elif parameter.ndim == 1:
            gains.append(parameter)
        elif name.endswith("mlp.gate.weight"):
            small.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": embedding, "lr": EMBEDDING_RATE},
        {"params": head, "lr": HEAD_RATE},
        {"params": small, "lr": SMALL_RATE},
        {"params": gains, "lr": SMALL_RATE, "weight_decay": 0.0},
    ]
    optimizers = [Muon(matrices, lr=MATRIX_RATE), torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
