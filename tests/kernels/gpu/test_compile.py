"""Every Triton kernel, compiled for A100 and Hopper: it fits the machine, and issues no more than it did.

Compiling needs no GPU, but a process without Triton's interpreter, which the other tests here run under.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.compiled import MAX_REGISTERS, MAX_SHARED_BYTES
from benchmarks.sass import all_variants

OPS_PER_BYTE: dict[str, dict[int, float]] = {
    "grouped_ccq_pair_experts_2": {80: 5.6, 90: 5.6},
    "grouped_ccq_wide_experts_2": {80: 7.1, 90: 7.1},
    "grouped_ccq_mixed_experts_2": {80: 9.2, 90: 9.2},
    "grouped_planes2_experts_2": {80: 7.7, 90: 7.7},
    "grouped_int4_128_experts_2": {80: 3.8, 90: 3.8},
    "multiply_ccq_pair_experts_8": {80: 7.8, 90: 7.8},
    "multiply_ccq_wide_experts_64": {80: 15.8, 90: 14.7},
    "multiply_int4_experts_8": {80: 4.4, 90: 4.3},
    "multiply_int8_experts_8": {80: 2.5, 90: 2.3},
}
"""Lane-operations of the inner loop for each packed byte, at most; by kernel and compute capability. What a GPU can
issue while it loads a byte is printed by ``python -m benchmarks.sass``, which also compiles all the other kernels."""

OTHERS = (
    "attention i8 128",
    "attention bf16 256 prefill",
    "attention combine",
    "add_rms_norm 8192",
    "rotary_store_kv i8",
    "route",
    "sort",
    "embedding int4",
    "arrange",
)
"""Parts of the names of kernels to compile besides."""

MOST_SHARED = (
    "multiply_ccq_mixed_experts_64",
    "multiply_planes2_experts_64",
    "multiply_planes4_experts_64",
    "grouped_int2_128_experts_64",
    "grouped_int2_32_experts_16",
    "grouped_planes4_32_experts_4",
)
"""Those whose pipelines want the most shared memory: a GPU refuses to launch what wants more than it has. With many
planes and small groups registers are spilled, which costs time alone."""
CHOSEN = (*OPS_PER_BYTE, *OTHERS, *MOST_SHARED)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.sass", "--json", "--only", *CHOSEN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)["kernels"]
    return kernels


def where(kernel: dict[str, Any]) -> str:
    return f"{kernel['name']} for sm_{kernel['capability']}"


def test_every_chosen_kernel_is_there(compiled):
    names = {kernel["name"] for kernel in compiled}
    for part in CHOSEN:
        assert any(part in name for name in names), f"no kernel is called {part!r}"
    chosen = [v for v in all_variants() if any(part in v.name for part in CHOSEN)]
    expected = {(variant.name, capability) for variant in chosen for capability in variant.capabilities}
    assert {(kernel["name"], kernel["capability"]) for kernel in compiled} == expected


def test_registers_spills_and_shared_memory_fit(compiled):
    problems = []
    for kernel in compiled:
        if kernel["registers"] > MAX_REGISTERS:
            problems.append(f"{where(kernel)}: {kernel['registers']} registers")
        if kernel["spilled_bytes"] and kernel["name"] not in MOST_SHARED:
            problems.append(f"{where(kernel)}: {kernel['spilled_bytes']} bytes of local memory")
        if kernel["shared_bytes"] > MAX_SHARED_BYTES[kernel["capability"]]:
            problems.append(f"{where(kernel)}: {kernel['shared_bytes']} bytes of shared memory")
    assert not problems, "\n".join(problems)


def test_a_packed_byte_costs_no_more_than_recorded(compiled):
    problems = []
    for kernel in compiled:
        if kernel["name"] not in OPS_PER_BYTE:
            continue
        per_byte = kernel["instructions_per_byte"]
        print(f"{where(kernel)}: {per_byte:.2f} lane-operations a byte")
        bound = OPS_PER_BYTE[kernel["name"]][kernel["capability"]]
        if per_byte > bound:
            problems.append(f"{where(kernel)}: {per_byte:.2f}, at most {bound}")
        if not kernel["loop"]["is_loop"]:
            problems.append(f"{where(kernel)} has no loop to count")
    assert not problems, "\n".join(problems)
