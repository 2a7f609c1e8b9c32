"""Triton kernels compiled for a GPU that need not be there, and what the compiler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as _backend
from triton.compiler import ASTSource

from benchmarks.disassembly import WARP, Loop, inner_loop
from kernels.gpu.variant import Variant

TOOLS = Path(_backend).parent / "bin"
"""ptxas, cuobjdump and nvdisasm, as Triton brings them."""

MAX_REGISTERS = 255
"""Registers a thread can have (CUDA C++ Programming Guide, table of compute capabilities)."""
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that a block can have, by compute capability; same table."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Datasheet rates of a GPU.

    Attributes:
        capability: compute capability times ten.
        multiprocessors: SMs.
        gigahertz: boost clock.
        lanes: fp32 and int32 lane-operations that an SM starts in a cycle.
        terabytes: 10^12 bytes a second from memory.
    """

    capability: int
    multiprocessors: int
    gigahertz: float
    lanes: int
    terabytes: float

    @property
    def budget(self) -> float:
        """Lane-operations that a byte may cost before issuing them takes longer than loading it."""
        return self.multiprocessors * self.gigahertz * self.lanes / self.terabytes / 1e3


GPUS = {
    "A100": Gpu(80, 108, 1.41, 64, 2.04),
    "H100": Gpu(90, 132, 1.70, 128, 3.35),
    "H200": Gpu(90, 132, 1.70, 128, 4.80),
    "H20": Gpu(90, 78, 1.98, 128, 4.00),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a variant.

    Attributes:
        name: the variant's.
        capability: 80 or 90.
        registers: of a thread.
        spilled_bytes: local memory of a thread: spills, and arrays that are not in registers.
        shared_bytes: of a block.
        loop: the inner loop.
        instructions_per_byte: lane-operations a packed byte; None where nothing packed is read.
    """

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop: Loop
    instructions_per_byte: float | None


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile for compute capability `capability` / 10 and read the result. Not under Triton's interpreter."""
    names = variant.fn.arg_names
    source = ASTSource(
        variant.fn,
        signature={name: "constexpr" if name in variant.constexprs else variant.signature[name] for name in names},
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    done = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        loop = inner_loop(_tool("nvdisasm", "-c", cubin))
    per_warp = variant.packed_bytes / variant.num_warps
    return Compiled(
        name=variant.name,
        capability=capability,
        registers=_resource(usage, "REG"),
        spilled_bytes=_resource(usage, "STACK") + _resource(usage, "LOCAL"),
        shared_bytes=done.metadata.shared,  # given at launch, so not in the cubin
        loop=loop,
        instructions_per_byte=loop.total * WARP / per_warp if per_warp else None,
    )


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _resource(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {name}: {usage!r}")
    return int(found[1])
