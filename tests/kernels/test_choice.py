"""The choice of kernels says what `kernels.ops` does, and why."""

from __future__ import annotations

import inspect
from functools import partial
from typing import get_args

import pytest
import torch

from kernels import choice, cpu, ops
from kernels.cpu import storage
from kernels.operands import (
    BitplaneWeight,
    CcqWeight,
    DenseWeight,
    GroupedWeight,
    Int4Weight,
    Int8Weight,
    SplitWeight,
    Weight,
)
from kernels.prepared import DensePrepared

CPU = torch.device("cpu")


def test_operations_are_those_of_the_door():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(choice.OPERATIONS) == functions - {"record"}  # which repeats operations and is none


def test_a_cpu_has_kernels_of_its_own():
    assert choice.backend(CPU).name == "cpu"
    assert choice.kernels(CPU) is cpu
    rows = {row.subject: row for row in choice.describe(CPU)}
    for name in choice.OPERATIONS:
        assert rows[name].implementation.startswith("kernels.")
    assert "cpu" in (choice.why_not_captured(CPU) or "")


@pytest.mark.parametrize("operand", get_args(Weight))
def test_weights_become_what_is_said(operand):
    n, k = 4096, storage.PACKED_WEIGHTS // 4096
    zeros = partial(torch.zeros, dtype=torch.uint8)
    dense = DenseWeight(torch.ones(n, k))
    weight = {
        DenseWeight: lambda: dense,
        SplitWeight: lambda: SplitWeight((dense, dense)),
        CcqWeight: lambda: CcqWeight(zeros(k // 4, n), zeros(k // 128, n), *(torch.ones(n) for _ in range(3)), "plain"),
        Int4Weight: lambda: Int4Weight(zeros(n, k // 2), torch.ones(n)),
        Int8Weight: lambda: Int8Weight(zeros(n, k).view(torch.int8), torch.ones(n)),
        BitplaneWeight: lambda: BitplaneWeight(
            torch.zeros(k // 32, 2, n, dtype=torch.int32), torch.ones(k // 64, 3, n)
        ),
        GroupedWeight: lambda: GroupedWeight(
            torch.zeros(k // 16, n, dtype=torch.int32), zeros(k // 64, n), torch.ones(k // 64, n), 2
        ),
    }[operand]()
    prepared = ops.prepare(weight, dtype=torch.float32, device=CPU)
    (said,) = (row.implementation for row in choice.describe(CPU) if row.subject == operand.__name__)
    assert isinstance(prepared, DensePrepared) == said.startswith("dense")


def test_a_device_without_kernels_runs_the_reference():
    chosen = choice.backend(torch.device("mps"))
    assert (chosen.name, "mps" in chosen.reason) == ("reference", True)


@pytest.mark.parametrize(
    ("capability", "triton", "name", "said"),
    [
        ((7, 5), True, "reference", "7.5 is below 8.0"),
        ((8, 0), False, "reference", "triton is not installed"),
        ((8, 0), True, "gpu", "8.0"),
        ((9, 0), True, "gpu", "9.0"),
    ],
)
def test_gpus_by_capability(capability, triton, name, said):
    chosen = choice.for_cuda(capability, has_triton=triton)
    assert chosen.name == name
    assert said in chosen.reason
