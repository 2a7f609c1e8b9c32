"""The gate of a SwiGLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.variant import Variant

BLOCK = 1024
WARPS = 4


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :I]) * x[:, I:]``: [T, 2I] -> [T, I], rounded between the two as the reference does."""
    tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    gated[(tokens, triton.cdiv(width, BLOCK))](
        x, out, x.stride(0), width, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
    )
    return out


@triton.jit
def gated(x, out, x_stride, width, BLOCK: tl.constexpr):
    """Grid (T, I / BLOCK): 8 features a thread, one load of 16 bytes from each half in bf16."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    gate = tl.load(x + row * x_stride + at, mask=here, other=0.0)
    up = tl.load(x + row * x_stride + width + at, mask=here, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide * tl.sigmoid(wide)).to(gate.dtype)
    tl.store(out + row * width + at, opened.to(tl.float32) * up, mask=here)


def variants() -> list[Variant]:
    """In bf16."""
    signature = {"x": "*bf16", "out": "*bf16", "x_stride": "i32", "width": "i32"}
    return [
        Variant(
            "silu_and_mul",
            gated,
            signature,
            constexprs={"BLOCK": BLOCK},
            num_warps=WARPS,
            num_stages=1,
            aligned=tuple(signature),
        ),
    ]
