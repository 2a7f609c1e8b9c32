"""Which experts a token goes to, and tokens in the order of their experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.variant import Variant

ONE_PROGRAM = 256
"""Most pairs that one program sorts: it compares every pair with every other."""


@triton.jit
def route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    norm_min,
    E,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program a token: softmax of fp32 [E], then TOP_K times the largest of p + bias, the lower of equal ones."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    logits = tl.load(logits_ptr + token * E + expert, mask=expert < E, other=float("-inf"))
    raised = tl.exp(logits - tl.max(logits, axis=0))
    probability = raised / tl.sum(raised, axis=0)
    choice = probability
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
    choice = tl.where(expert < E, choice, float("-inf"))
    rank = tl.arange(0, BLOCK_K)
    weights = tl.zeros((BLOCK_K,), dtype=tl.float32)
    ids = tl.zeros((BLOCK_K,), dtype=tl.int64)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(choice, axis=0, tie_break_left=True)
        chosen = expert == best
        weights = tl.where(rank == i, tl.sum(tl.where(chosen, probability, 0.0), axis=0), weights)
        ids = tl.where(rank == i, best.to(tl.int64), ids)
        choice = tl.where(chosen, float("-inf"), choice)
    weights = weights / tl.maximum(tl.sum(weights, axis=0), norm_min)
    tl.store(weights_ptr + token * TOP_K + rank, weights, mask=rank < TOP_K)
    tl.store(ids_ptr + token * TOP_K + rank, ids, mask=rank < TOP_K)


def route(x: Tensor, gate: Tensor, bias: Tensor | None, *, top_k: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.route`: the product by cuBLAS in fp32, the rest in one kernel."""
    tokens, experts = x.shape[0], gate.shape[0]
    logits = F.linear(x.float(), gate)  # [T, E]
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=x.device)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            logits if bias is None else bias,
            weights,
            ids,
            norm_min,
            experts,
            TOP_K=top_k,
            BIAS=bias is not None,
            BLOCK_E=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return weights, ids


@triton.jit(do_not_specialize=["P", "blocks"])
def sort_kernel(
    ids_ptr,
    slot_ptr,
    expert_ptr,
    P,
    blocks,
    BT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Pairs in blocks of BT of one expert, stable; one program, no atomics. Outputs as of `sort_pairs`."""
    p = tl.arange(0, BLOCK_P)
    e = tl.arange(0, BLOCK_E)
    ids = tl.load(ids_ptr + p, mask=p < P, other=-1).to(tl.int32)
    mine = ids[:, None] == e[None, :]  # [P, E]
    counts = tl.sum(mine.to(tl.int32), axis=0)  # [E]
    ends = tl.cumsum((counts + BT - 1) // BT, axis=0)  # blocks up to and with each expert
    before = tl.sum(tl.where(mine, tl.cumsum(mine.to(tl.int32), axis=0) - 1, 0), axis=1)  # [P] earlier ones of mine
    first = tl.sum(tl.where(mine, (ends - (counts + BT - 1) // BT)[None, :], 0), axis=1)  # [P] my expert's first block
    tl.store(slot_ptr + first * BT + before, p, mask=p < P)
    b = tl.arange(0, BLOCK_B)
    owner = tl.sum((ends[None, :] <= b[:, None]).to(tl.int32), axis=1)  # experts that end before block b
    used = tl.max(ends, axis=0)
    tl.store(expert_ptr + b, tl.where(b < used, owner, -1), mask=b < blocks)


def sorted_at_once(pairs: int) -> int | None:
    """BLOCK_P of `sort_kernel` for so many pairs; None if they are too many for it."""
    return int(triton.next_power_of_2(pairs)) if pairs <= ONE_PROGRAM else None


def max_blocks(pairs: int, experts: int, block: int) -> int:
    """Most blocks of `block` pairs of one expert that `pairs` pairs of `experts` experts can fill, at least in part."""
    return min(pairs, (pairs + min(pairs, experts) * (block - 1)) // block)


def sort_pairs(ids: Tensor, *, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Sort (token, choice) pairs by expert into blocks, without asking the device how many there are.

    Args:
        ids: int64 [T, k].
        experts: E.
        block: pairs in a block.

    Returns:
        slots int32 [blocks, block], ``token * k + choice``, and the number of pairs where a block is not full; owners
        int32 [blocks], the expert of each, -1 for blocks that are not needed.
    """
    pairs = ids.numel()
    blocks = max_blocks(pairs, experts, block)
    slots = torch.full((blocks, block), pairs, dtype=torch.int32, device=ids.device)
    at_once = sorted_at_once(pairs)
    if at_once is not None:
        owners = torch.empty(blocks, dtype=torch.int32, device=ids.device)
        sort_kernel[(1,)](
            ids,
            slots,
            owners,
            pairs,
            blocks,
            BT=block,
            BLOCK_P=at_once,
            BLOCK_E=triton.next_power_of_2(experts),
            # Of as many pairs as there may be, not of those there are, or there would be more kernels to compile.
            BLOCK_B=triton.next_power_of_2(max_blocks(at_once, experts, block)),
            num_warps=8,
            enable_fp_fusion=True,
        )
        return slots, owners
    flat = ids.flatten()
    values, order = torch.sort(flat, stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    needed = (counts + block - 1) // block  # blocks of each expert
    ends = needed.cumsum(0)
    before = torch.arange(pairs, device=ids.device) - (counts.cumsum(0) - counts)[values]
    slots.view(-1)[(ends - needed)[values] * block + before] = order.to(torch.int32)
    numbers = torch.arange(blocks, device=ids.device)
    owners = torch.searchsorted(ends, numbers, right=True)
    return slots, torch.where(numbers < ends[-1], owners, -1).to(torch.int32)


def variants() -> list[Variant]:
    """ERNIE-4.5's routers: 64 experts, 8 a token; and 16 tokens sorted into blocks of 8."""
    return [
        Variant(
            "route",
            route_kernel,
            {"logits_ptr": "*fp32", "bias_ptr": "*fp32", "weights_ptr": "*fp32", "ids_ptr": "*i64", "norm_min": "fp32"}
            | {"E": "i32"},
            {"TOP_K": 8, "BIAS": True, "BLOCK_E": 64, "BLOCK_K": 8},
            num_warps=1,
        ),
        Variant(
            "sort",
            sort_kernel,
            {"ids_ptr": "*i64", "slot_ptr": "*i32", "expert_ptr": "*i32", "P": "i32", "blocks": "i32"},
            {"BT": 8, "BLOCK_P": 128, "BLOCK_E": 64, "BLOCK_B": 128},
            num_warps=8,
        ),
    ]
