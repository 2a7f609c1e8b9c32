"""What a compiled kernel does in its inner loop, read from its machine code (SASS).

A kernel that decodes packed weights is limited by bytes only as long as it issues few instructions a byte. A loop is
what lies between a label and a branch back to it; the inner loop that counts is the one, among those with no loop
inside, that loads most from global memory.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

WARP = 32
"""Lanes that an instruction runs on."""

CLASSES = ("fp32", "half", "integer", "conversion", "tensor", "shared", "global", "move", "uniform", "other")
"""Every instruction is in one of them."""

_FIRST_MATCH = (
    ("tensor", r"[HIDQ]G?MMA|WARPGROUP|BMMA"),
    ("conversion", r"I2F|F2I|F2F|I2I|FRND|F2FP|I2FP"),  # but for F2FP, a quarter or an eighth of the rate of the rest
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS|SHFL|MATCH|REDUX|VOTE"),
    ("global", r"LDG|STG|LDGSTS|LD|ST|ATOMG?|RED|LDL|STL|UTMALDG|UBLKCP|LDC"),
    ("uniform", r"U[A-Z0-9]+|R2UR|S2UR|VOTEU"),
    ("fp32", r"F(ADD|MUL|FMA|MNMX|SETP|SEL|SET|CHK|SWZADD)(32I)?|MUFU"),
    ("half", r"H(ADD2|MUL2|FMA2|SET2|SETP2|MNMX2)(_32I)?"),
    ("move", r"MOV|MOV32I|CS2R|S2R|P2R|R2P|SEL"),
    (
        "integer",
        r"I(ADD3?|MAD|MNMX|SETP|ABS|DP|DP4A|SCADD)(_32I)?|IDP|IADD32I|VIADD|VIADDMNMX|VIMNMX|VABSDIFF4?|LOP3|LOP32I"
        r"|PLOP3|SHF|SHL|SHR|LEA|PRMT|BFE|BFI|BREV|BMSK|SGXT|POPC|FLO|XMAD|ISCADD",
    ),
)

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_WIDTH = re.compile(r"\.(?:(128|64)|[US](8|16))\b")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop; or, where a kernel has none, all of its instructions.

    Attributes:
        instructions: of each of `CLASSES`.
        loaded_bytes: what a warp loads from global memory in one pass, all lanes active and each byte counted as often
            as it is asked for.
        is_loop: False for the whole of a kernel without a loop.
    """

    instructions: dict[str, int]
    loaded_bytes: int
    is_loop: bool

    @property
    def total(self) -> int:
        """Instructions of a pass."""
        return sum(self.instructions.values())


def inner_loop(text: str) -> Loop:
    """The inner loop that loads most, of the output of ``nvdisasm -c``; of equal ones the longest."""
    code, spans = _parse(text)
    innermost = [
        (start, end)
        for start, end in spans
        if not any(start <= first and last <= end for first, last in spans if (first, last) != (start, end))
    ]
    if not innermost:
        return _count(code, is_loop=False)
    loops = [_count(code[start : end + 1], is_loop=True) for start, end in innermost]
    return max(loops, key=lambda loop: (loop.loaded_bytes, loop.total))


def instruction_class(name: str) -> str:
    """The one of `CLASSES` that an opcode such as ``IMAD.MOV.U32`` is in."""
    if name.startswith("IMAD.MOV"):
        return "move"
    base = name.partition(".")[0]
    for group, pattern in _FIRST_MATCH:
        if re.fullmatch(pattern, base):
            return group
    return "other"


def _parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes in their order, and (first, last) instruction of every loop."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans: set[tuple[int, int]] = set()
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            name, operands = found.groups()
            target = _TARGET.search(operands)
            # The branch of the last instruction to itself stops instruction fetch; it is no loop.
            if name.startswith("BRA") and target and labels.get(target[1], len(code)) < len(code):
                spans.add((labels[target[1]], len(code)))
            code.append(name)
    return code, sorted(spans)


def _count(code: list[str], *, is_loop: bool) -> Loop:
    counts = Counter(instruction_class(name) for name in code if not name.startswith("NOP"))
    loaded = sum(WARP * _load_bytes(name) for name in code)
    return Loop({group: counts[group] for group in CLASSES}, loaded, is_loop)


def _load_bytes(name: str) -> int:
    """Bytes that a lane loads from global memory with this instruction."""
    if not re.match(r"(LDG|LDGSTS)\b", name):
        return 0
    width = _WIDTH.search(name)
    return int(width[1] or width[2]) // 8 if width else 4
