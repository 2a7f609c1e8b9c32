"""What is needed to compile a kernel without a GPU: the seam between the kernels and the tools that look at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of a Triton kernel, as ``triton.compile(ASTSource(...))`` wants it.

    Attributes:
        name: unique among all modules, for reports.
        fn: the ``@triton.jit`` function.
        signature: Triton type of each argument that is not a constant: "*fp16", "*u8", "i32", ...
        constexprs: value of each ``tl.constexpr`` argument.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        aligned: names of arguments that are multiples of 16 (pointers and sizes), as the launcher would find them.
        packed_bytes: bytes of packed weights that all threads of a program decode in one iteration of the main loop;
            0 where counting instructions by the byte makes no sense.
        capabilities: compute capabilities times ten of the GPUs that run it, where others run another one.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = field(default=())
    packed_bytes: int = 0
    capabilities: tuple[int, ...] = (80, 90)
