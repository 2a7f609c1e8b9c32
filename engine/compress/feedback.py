"""What the encoders that carry errors forward have in common: the order of the inputs, chunks of rows, the error."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.compress.hessian import Metric
from engine.errors import CheckpointError

_CPU_ROWS = 1024  # a block of 128 inputs of so many rows (512 KiB) stays in a core's cache
_GPU_ROWS = 8192  # bounds the memory to a few times [8192, K] in fp32


def chunks(weight: Tensor) -> list[Tensor]:
    """The rows of [out, in], some at a time, each chunk as fp32 [in, rows]: encoders go through it input by input.

    Raises:
        CheckpointError: a value is not finite.
    """
    if not weight.isfinite().all():
        raise CheckpointError("the weight holds values that are not finite; it can't be quantized")
    rows = _CPU_ROWS if weight.device.type == "cpu" else _GPU_ROWS
    return [part.float().T.contiguous() for part in torch.split(weight, rows)]


def group_order(metric: Metric, group_size: int) -> Tensor:
    """An order of the inputs that keeps groups whole: int64 [K], the heaviest first.

    Groups by the largest diagonal value of H in them, and the inputs of each by their own: whoever is chosen early
    has more inputs left to make up for its error (GPTQModel's group-aware reordering).
    """
    heaviness = metric.matrix.diagonal().view(-1, group_size)  # [groups, G]
    inside = heaviness.argsort(dim=1, descending=True, stable=True)
    groups = heaviness.amax(dim=1).argsort(descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=inside.device)[:, None] * group_size)[groups].flatten()


def output_error(weight: Tensor, decoded: Tensor, metric: Metric) -> float:
    """``tr((Q - W) H (Q - W)^T) / tr(W H W^T)``: the squared output error as a part of the output's squares.

    Args:
        weight: W [out, in].
        decoded: Q [out, in].
        metric: of the inputs; its H is damped.
    """
    h = metric.matrix.double()
    full, off = weight.double(), decoded.double() - weight.double()
    tiny = torch.finfo(torch.float64).tiny
    return float(((off @ h) * off).sum() / ((full @ h) * full).sum().clamp(min=tiny))
