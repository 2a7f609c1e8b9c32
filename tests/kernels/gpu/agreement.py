"""Compares the GPU kernels with the reference on a GPU; a program, since the tests' process runs Triton's interpreter.

What only a GPU shows: the assembly, the layouts of registers, and that tensor cores multiply fp16 subnormals.
"""

from __future__ import annotations

import sys

import torch
import weights as make

from kernels import gpu, reference
from kernels.prepared import DensePrepared

DEVICE = torch.device("cuda")
TOLERANCE = 1e-2
FORMATS = {
    "ccq, words of a pair": lambda *lead: make.ccq(*lead, n=320, k=512, pair=make.PAIR),
    "ccq": lambda *lead: make.ccq(*lead, n=320, k=512, order="permuted"),
    "ccq, a codebook a column": lambda *lead: make.ccq(*lead, n=320, k=512, pair=None),
    "ccq, odd groups": lambda *lead: make.ccq(*lead, n=320, k=448),
    "int8": lambda *lead: make.int8(*lead, n=320, k=512),
    "int4": lambda *lead: make.int4(*lead, n=320, k=512),
    "planes": lambda *lead: make.planes(*lead, n=320, k=512, count=3, group=64),
    "grouped": lambda *lead: make.grouped(*lead, n=320, k=512, group=128),
}


def main() -> None:
    torch.manual_seed(0)
    failures = []
    for name, weight in FORMATS.items():
        matrix = weight()
        decoded = make.dense(matrix).to(DEVICE)
        prepared = gpu.prepare(matrix, dtype=torch.bfloat16, device=DEVICE)
        for tokens in (1, 3, 7, 16, 40, 200):
            x = torch.randn(tokens, decoded.shape[1], device=DEVICE).bfloat16()
            failures += compare(f"{name}, {tokens} tokens", gpu.linear(x, prepared), x.float() @ decoded.t())
    for name, weight in FORMATS.items():
        gate_up = weight(4)
        down = make.int8(4, n=make.dense(gate_up).shape[-1], k=160)
        ready = [gpu.prepare(w, dtype=torch.bfloat16, device=DEVICE) for w in (gate_up, down)]
        dense = [DensePrepared.of(make.dense(w).to(DEVICE)) for w in (gate_up, down)]
        for tokens in (1, 5, 64):
            x = torch.randn(tokens, ready[0].in_features, device=DEVICE).bfloat16()
            ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]).to(DEVICE)
            share = torch.rand(tokens, 2, device=DEVICE)
            want = reference.fused_moe(x.float(), *dense, share.bfloat16().float(), ids)
            failures += compare(f"experts, {name}, {tokens} tokens", gpu.fused_moe(x, *ready, share, ids), want)
    sys.exit("\n".join(failures) or 0)


def compare(what: str, got: torch.Tensor, want: torch.Tensor) -> list[str]:
    error = float((got.float() - want).abs().max() / want.abs().max())
    return [] if error < TOLERANCE else [f"{what}: off by {error:.2%} of the largest"]


if __name__ == "__main__":
    main()
