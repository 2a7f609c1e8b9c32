"""RMSNorm, alone and with the residual sum before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.variant import Variant

ELEMENTS_PER_THREAD = 16
"""Two loads of 16 bytes in bf16. A row is one program's, so that decoding one token runs on one multiprocessor, where
more threads, each with loads of its own in flight, are what shortens the wait."""
MAX_WARPS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H] -> [T, H]; `weight` [H] in the dtype of `x`; see `ops.rms_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, eps, out=out, total=None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum); every input is read once, each output written once."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(out)
    _launch(x, residual, weight, eps, out=out, total=total)
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, out: Tensor, total: Tensor | None
) -> None:
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    norm[(tokens,)](
        x, residual, weight, out, total,
        x.stride(0), 0 if residual is None else residual.stride(0), width, eps,
        BLOCK=block, num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip


def _warps(block: int) -> int:
    return max(1, min(MAX_WARPS, block // (32 * ELEMENTS_PER_THREAD)))


@triton.jit
def norm(x, residual, weight, out, total, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
    """One row [H] in registers: sum (rounded to the dtype), fp32 variance, norm rounded before the weight.

    Grid (T,). Bytes: x and residual in, sum and norm out, once each; the weight comes from the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < width
    value = tl.load(x + row * x_stride + at, mask=here, other=0.0)
    if residual is not None:
        value = (value.to(tl.float32) + tl.load(residual + row * residual_stride + at, mask=here, other=0.0)).to(
            value.dtype
        )
        tl.store(total + row * width + at, value, mask=here)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * factor).to(value.dtype).to(tl.float32)
    tl.store(out + row * width + at, normed * tl.load(weight + at, mask=here, other=0.0), mask=here)


def variants() -> list[Variant]:
    """With the residual in bf16, for the hidden sizes of ERNIE-4.5-300B-A47B and of the smallest ERNIE-4.5."""
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "total"), "*bf16")
    sizes = dict.fromkeys(("x_stride", "residual_stride", "width"), "i32")
    return [
        Variant(
            f"add_rms_norm {width}",
            norm,
            signature={**pointers, **sizes, "eps": "fp32"},
            constexprs={"BLOCK": width},
            num_warps=_warps(width),
            num_stages=1,
            aligned=(*pointers, *sizes),
        )
        for width in (1024, 8192)
    ]
