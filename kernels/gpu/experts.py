"""The experts of a layer: sorted pairs, two products, SwiGLU between them, and the weighted sum."""

from __future__ import annotations

import triton
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.arrange import activate_kernel, combine_kernel
from kernels.gpu.linear import pieces
from kernels.gpu.packed import GpuPrepared
from kernels.gpu.routing import sort_pairs
from kernels.gpu.shapes import expert_rows, shape_for
from kernels.prepared import Prepared

BLOCK = 512
"""Features of a program between the products: a few hundred programs for one token's eight experts."""


def fused_moe(x: Tensor, gate_up: Prepared, down: Prepared, weights: Tensor, ids: Tensor) -> Tensor:
    """See `kernels.ops.fused_moe`. Every weight of a chosen expert is read once for each block of its tokens.

    Sizes of grids are upper bounds from the number of pairs and experts, so nothing waits for the device and a CUDA
    graph can hold all of it. Sums are fp32 and rounded once after SwiGLU and once after the sum over experts, which is
    less often than in `kernels.reference`.
    """
    first, second = GpuPrepared(pieces(gate_up)), GpuPrepared(pieces(down))
    tokens, top_k = ids.shape
    pairs, inner, hidden = tokens * top_k, first.out_features // 2, second.out_features
    out = x.new_empty((tokens, hidden))
    if not tokens:
        return out
    experts = first.parts[0].codes.shape[0]
    shape = shape_for(expert_rows(tokens, top_k=top_k, experts=experts), first, second)
    blocks = sort_pairs(ids, experts=experts, block=shape.rows)
    sums = launch.multiply(x, first, rows=pairs, shape=shape, share=top_k, blocks=blocks)  # [splits, pairs, 2I]
    middle = x.new_empty((pairs, inner))
    activate_kernel[(pairs, triton.cdiv(inner, BLOCK))](
        sums, middle, pairs, inner, len(sums), BLOCK=BLOCK, enable_fp_fusion=True
    )
    del sums  # or it would live through the next product, the moment when most is alive
    sums = launch.multiply(middle, second, rows=pairs, shape=shape, blocks=blocks)  # [splits, pairs, H]
    combine_kernel[(tokens, triton.cdiv(hidden, BLOCK))](
        sums, weights, out, pairs, hidden, len(sums), TOP_K=top_k, BLOCK=BLOCK, enable_fp_fusion=True
    )
    return out
