"""Which kernels a device gets, and why, without running any."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

from kernels import cpu, reference
from kernels.backend import Kernels
from kernels.cpu import storage as cpu_storage
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

MIN_CAPABILITY = (8, 0)
"""bf16 tensor cores and asynchronous copies, which the Triton kernels are written for, begin with Ampere."""

OPERATIONS = tuple(name for name in vars(Kernels) if not name.startswith("_"))
"""The operations of `kernels.ops`."""

PACKED: dict[str, frozenset[type]] = {
    "cpu": frozenset((CcqWeight, Int4Weight, Int8Weight)),
    "gpu": frozenset((CcqWeight, Int4Weight, Int8Weight, BitplaneWeight, GroupedWeight)),
    "reference": frozenset(),
}
"""Operands that the backends multiply as they are; those of shapes they can't divide into tiles are decoded too."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels for a device.

    Attributes:
        name: the package in `kernels`.
        reason: why this one.
    """

    name: Literal["cpu", "gpu", "reference"]
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs one operation, or holds one weight format.

    Attributes:
        subject: an operation of `kernels.ops`, or a weight operand of `kernels.operands`.
        implementation: the module that has it, or the layout that a weight is brought into.
        reason: why.
    """

    subject: str
    implementation: str
    reason: str


@dataclass(frozen=True, slots=True)
class LaunchSizes:
    """Steps of these sizes launch every specialisation of a kernel that steps of any size launch.

    Attributes:
        tokens: of a step, ascending, and of its rows of logits: steps of each, whoever's the tokens are.
        contexts: of a single request that decodes, ascending.
        queries: of a request, more than are decoded: a step in which somebody has so many, if there can be one.
    """

    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    queries: int


def backend(device: torch.device) -> Backend:
    """The kernels for `device`."""
    if device.type == "cpu":
        return Backend("cpu", "the device is a CPU")
    if device.type != "cuda":
        return Backend("reference", f"there are no kernels for {device.type}")
    return for_cuda(torch.cuda.get_device_capability(device), has_triton=_has_triton())


@cache
def kernels(device: torch.device) -> Kernels:
    """The module of `backend`, imported when first asked for: Triton need not be installed for the others."""
    return _module(backend(device).name)


def why_not_captured(device: torch.device) -> str | None:
    """Why steps on `device` can't be captured as CUDA graphs; None if they can."""
    chosen = backend(device)
    return None if chosen.name == "gpu" else f"the {chosen.name} kernels run, as {chosen.reason}"


def launch_sizes(
    device: torch.device, *, max_tokens: int, max_context: int, top_k: int = 0, experts: int = 0
) -> LaunchSizes | None:
    """Sizes of steps that launch all that steps within these bounds do; None where kernels are not compiled by size.

    The same for all GPUs.

    Args:
        device: compute device.
        max_tokens: of a step.
        max_context: tokens of the longest context.
        top_k: experts a token, if the model has any.
        experts: of a layer.
    """
    if backend(device).name != "gpu":
        return None
    sizes = importlib.import_module("kernels.gpu.sizes")
    return LaunchSizes(
        sizes.token_counts(max_tokens, top_k=top_k, experts=experts),
        sizes.context_lens(max_context),
        sizes.MANY_QUERIES,
    )


def describe(device: torch.device) -> list[Choice]:
    """What runs each operation on `device`, and what becomes of each weight operand there."""
    chosen = backend(device)
    module = kernels(device)
    choices = []
    for name in OPERATIONS:
        where = getattr(module, name).__module__
        borrowed = where.startswith("kernels.reference") and chosen.name != "reference"
        choices.append(Choice(name, where, "plain torch is fast enough there" if borrowed else chosen.reason))
    if chosen.name == "gpu":
        choices = [_gpu_attention() if row.subject == "paged_attention" else row for row in choices]
    return choices + [_weight(operand, chosen) for operand in get_args(Weight)]


def _gpu_attention() -> Choice:
    flash = importlib.import_module("kernels.gpu.flash")
    found = flash.varlen()
    if found is None:
        return Choice("paged_attention", "kernels.gpu.attend (Triton)", f"none of {', '.join(flash.PACKAGES)} is there")
    return Choice(
        "paged_attention",
        found.__module__,
        f"installed; for fp16 and bf16 in blocks of {flash.PAGE} or a multiple. An int8 cache takes kernels.gpu.attend",
    )


def _weight(operand: type, chosen: Backend) -> Choice:
    if operand is SplitWeight and chosen.name == "gpu":
        return Choice(operand.__name__, "as its parts", "its parts are multiplied one after the other")
    if operand is DenseWeight and chosen.name == "cpu":
        least = cpu_storage.PACKED_WEIGHTS
        return Choice(
            operand.__name__, f"bf16 from {least:,} weights on", "if they are bf16 numbers; half the bytes of fp32"
        )
    if operand is DenseWeight:
        return Choice(operand.__name__, "dense", "it is not packed")
    if operand not in PACKED[chosen.name]:
        return Choice(operand.__name__, "dense, decoded once", f"the {chosen.name} kernels can't multiply it as it is")
    if chosen.name == "cpu":
        least = cpu_storage.PACKED_WEIGHTS
        return Choice(
            operand.__name__,
            f"packed from {least:,} weights on, stacks from {cpu_storage.PACKED_STACK:,}",
            "smaller ones stay in a cache once decoded",
        )
    return Choice(operand.__name__, "packed", "decoded while multiplying")


def for_cuda(capability: tuple[int, int], *, has_triton: bool) -> Backend:
    """The kernels for a GPU of CUDA compute capability `capability`."""
    major, minor = capability
    if capability < MIN_CAPABILITY:
        return Backend("reference", f"compute capability {major}.{minor} is below {MIN_CAPABILITY[0]}.0")
    if not has_triton:
        return Backend("reference", "triton is not installed (pip install triton)")
    return Backend("gpu", f"compute capability {major}.{minor}, and triton is installed")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _module(name: str) -> Kernels:
    if name == "gpu":
        gpu: Kernels = importlib.import_module("kernels.gpu")
        return gpu
    return cpu if name == "cpu" else reference
