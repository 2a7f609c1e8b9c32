"""Activations before and after a product with packed weights: order, range, sums over parts of K, SwiGLU, routing."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.variant import Variant


@triton.jit
def arrange_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    unit_ptr,
    sums_ptr,
    K,
    padded,
    stride,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    PERMUTE: tl.constexpr,
    SHIFT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of activations in the order of packed weights, as fp16 times a power of two.

    bf16 has a wider range than fp16 and fewer bits, so with the row's largest in [2^14, 2^15) every element down to
    2^-28 of it is exact, less the shift of its field. One program a row: the second reading comes from L2.

    Args:
        x_ptr: [T, stride] rows of K.
        order_ptr: int32 [TILE], `Packed.order`; read with PERMUTE only.
        out_ptr: fp16, or fp32 if x is (then unscaled) [T, padded]; zeros from K on.
        unit_ptr: fp32 [T], by which sums of products are to be multiplied.
        sums_ptr: fp32 [T, padded / TILE, GROUPS], sums over the activations of each group as they are in `out`, each
            times the power of two that it was divided by; written with SUMS.
        K: input features.
        padded: K filled up to whole tiles.
        stride: of rows of x.
        TILE: input features of a tile.
        GROUPS: groups of a tile.
        RUN: `Packed.run`.
        PERMUTE: whether they stand in another order.
        SHIFT: whether activations are divided by the powers of two in `order`.
        SUMS: whether sums are wanted.
        BLOCK: elements at a time, a multiple of TILE.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride
    factor = 1.0
    unit = 1.0
    if out_ptr.dtype.element_ty == tl.float16:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            place = start + tl.arange(0, BLOCK)
            largest = tl.maximum(largest, tl.abs(tl.load(x_row + place, mask=place < K, other=0.0).to(tl.float32)))
        exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23  # biased by 127
        exponent = tl.minimum(268 - exponent, 253)  # of 2^(14 - e); both it and its inverse are normal
        factor = (exponent << 23).to(tl.float32, bitcast=True)
        unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(unit_ptr + row, unit)
    for start in range(0, padded, BLOCK):
        place = start + tl.arange(0, BLOCK)
        source = place
        shift = tl.zeros((BLOCK,), dtype=tl.int32)
        if PERMUTE:
            order = tl.load(order_ptr + place % TILE)
            source = place // TILE * TILE + (order & 0xFFFF)
            if SHIFT:
                shift = order >> 16
        value = tl.load(x_row + source, mask=source < K, other=0.0).to(tl.float32) * factor
        value *= ((127 - shift) << 23).to(tl.float32, bitcast=True)
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * padded + place, value, mask=place < padded)
        if SUMS:
            whole = value.to(tl.float32) * ((127 + shift) << 23).to(tl.float32, bitcast=True)
            parts = tl.reshape(whole, (BLOCK // TILE, TILE // (GROUPS * RUN), GROUPS, RUN))
            parts = tl.sum(tl.sum(parts, axis=3), axis=1)  # [tiles, GROUPS]
            tile = start // TILE + tl.arange(0, BLOCK // TILE)
            at = (row * (padded // TILE) + tile[:, None]) * GROUPS + tl.arange(0, GROUPS)[None, :]
            tl.store(sums_ptr + at, parts, mask=tile[:, None] < padded // TILE)


@triton.jit(do_not_specialize=["T", "splits"])
def finish_kernel(sums_ptr, bias_ptr, out_ptr, T, N, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over parts of K, always in the same order, plus a bias: fp32 [splits, T, N] -> [T, N]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + (split * T + row) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, total.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["P", "splits"])
def activate_kernel(sums_ptr, out_ptr, P, inner, splits, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of the summed parts: [splits, P, gate I | up I] -> [P, I], rounded once."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        base = sums_ptr + (split * P + row) * 2 * inner + i
        gate += tl.load(base, mask=i < inner, other=0.0).to(tl.float32)
        up += tl.load(base + inner, mask=i < inner, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * inner + i, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=i < inner)


@triton.jit(do_not_specialize=["P", "splits"])
def combine_kernel(
    sums_ptr,
    weights_ptr,
    out_ptr,
    P,
    H,
    splits,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weighted sum of a token's experts, best first, always in the same order: [splits, T TOP_K, H] -> [T, H]."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in range(splits):
            value += tl.load(sums_ptr + (split * P + pair) * H + h, mask=h < H, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + pair).to(out_ptr.dtype.element_ty).to(tl.float32)
        total += value * weight
    tl.store(out_ptr + token * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def variants() -> list[Variant]:
    """Between ERNIE-4.5's products: hidden size 8192, 3584 features of an expert, 8 experts a token."""
    sizes = {
        "T": "i32",
        "P": "i32",
        "K": "i32",
        "padded": "i32",
        "N": "i32",
        "H": "i32",
        "inner": "i32",
        "stride": "i32",
        "splits": "i32",
    }
    types = {"x_ptr": "*bf16", "order_ptr": "*i32", "unit_ptr": "*fp32", "sums_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"weights_ptr": "*fp32", "out_ptr": "*bf16"} | sizes
    aligned = (*(name for name in types if name.endswith("_ptr")), "K", "padded", "N", "H", "inner", "stride")

    def one(name: str, fn: triton.JITFunction, warps: int, other: dict[str, str], **constexprs: object) -> Variant:
        chosen = {n: (types | other)[n] for n in fn.arg_names if n not in constexprs}
        present = tuple(n for n in aligned if n in chosen)
        return Variant(name, fn, chosen, constexprs, num_warps=warps, aligned=present)

    return [
        one(
            "arrange", arrange_kernel, 8, {"out_ptr": "*fp16"},
            TILE=256, GROUPS=4, RUN=2, PERMUTE=True, SHIFT=True, SUMS=True, BLOCK=4096,
        ),
        one("finish", finish_kernel, 4, {}, BIAS=True, BLOCK=1024),
        one("activate", activate_kernel, 4, {}, BLOCK=512),
        one("combine", combine_kernel, 4, {}, TOP_K=8, BLOCK=512),
    ]  # fmt: skip
