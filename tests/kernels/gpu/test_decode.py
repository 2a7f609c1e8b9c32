"""The assembly of `kernels.gpu.assembly`, run instruction by instruction: the interpreter of Triton leaves it out.

`Machine` knows the few PTX instructions used, as the PTX ISA manual describes them.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import weights as make

from kernels.gpu import assembly, words

MASK = 0xFFFFFFFF


def single(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def bits_of(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def halves(bits: int) -> np.ndarray:
    return np.array([bits & 0xFFFF, bits >> 16], dtype=np.uint16).view(np.float16)


def joined(pair: np.ndarray) -> int:
    low, high = pair.astype(np.float16).view(np.uint16)
    return int(low) | int(high) << 16


def round_once(exact: np.ndarray) -> np.ndarray:
    return exact.astype(np.float16)  # fp64 holds every fp16 product plus an fp16 exactly


class Machine:
    """32-bit registers and what the instructions do to them."""

    def __init__(self, inputs: dict[str, int]) -> None:
        self.registers = dict(inputs)

    def read(self, name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return self.registers[name] if name[0] in "$abcdefghijklmnopqrstuvwxyz" else int(name, 0) & MASK

    def run(self, text: str) -> None:
        for statement in re.findall(r"[^;{}]+;", text):
            words_ = statement.strip().rstrip(";").split(None, 1)
            if not words_[0].startswith("."):
                target, *sources = (name.strip() for name in words_[1].split(","))
                self.registers[target] = self.step(words_[0], [self.read(name) for name in sources]) & MASK

    def step(self, name: str, v: list[int]) -> int:
        if name == "mov.b32":
            return v[0]
        if name == "shr.u32":
            return v[0] >> v[1]
        if name == "and.b32":
            return v[0] & v[1]
        if name == "prmt.b32":
            source = v[0] | v[1] << 32
            return sum((source >> 8 * (v[2] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        if name == "lop3.b32":
            assert v[3] == 0xEA  # (a & b) | c
            return v[0] & v[1] | v[2]
        if name in ("mad.lo.u32", "mad.lo.s32"):
            return v[0] * v[1] + v[2]
        if name == "fma.rn.f16x2":
            a, b, c = (halves(x).astype(np.float64) for x in v)
            return joined(round_once(a * b + c))
        if name == "sub.rn.f16x2":
            return joined(halves(v[0]) - halves(v[1]))
        if name == "mul.rn.f32":
            return bits_of(single(v[0]) * single(v[1]))
        if name == "add.rn.f32":
            return bits_of(single(v[0]) + single(v[1]))
        if name == "fma.rn.f32":
            a, b, c = (np.float64(single(x)) for x in v)
            return bits_of(np.float32(a * b + c))  # exact in fp64 for the operands that occur: a code of 8 bits remains
        if name == "add.rm.f32":
            a, b = (np.float64(single(x)) for x in v)
            near = np.float32(a + b)
            return bits_of(np.nextafter(near, np.float32(-np.inf)) if np.float64(near) > a + b else near)
        raise AssertionError(f"{name} is not described here")


def run(text: str, outputs: int, inputs: list[int]) -> list[float]:
    """Outputs as fp16, two of a register."""
    machine = Machine({f"${outputs + i}": value for i, value in enumerate(inputs)})
    machine.run(text)
    return [float(value) for i in range(outputs) for value in halves(machine.registers[f"${i}"])]


def windows(word: int) -> list[int]:
    return [(word >> shift & 63) - 32 for shift in (9, 6, 3, 0)]


def ccq_line(kind: int, pair: tuple[float, float]) -> tuple[list[int], list[int]]:
    """Multiplier and addend as a kernel gets them; and the words they have to give."""
    slope, zero = torch.tensor([pair[0]]), torch.tensor([pair[1]])
    expected = words.words(slope, zero)[:, 0].tolist()
    if kind == assembly.CCQ_EXACT.value:
        return [int(part.view(torch.int32).item()) & MASK for part in (slope, zero)], expected
    shift = words.PAIR_SHIFT if kind == assembly.CCQ_PAIR.value else words.WIDE_SHIFT
    found = words.lines(slope, zero, shift=shift)
    assert found.there
    line = [int(part.item()) & MASK for part in (found.multiplier, found.addend)]
    if kind == assembly.CCQ_PAIR.value:
        line[1] *= 0x10001
    return line, expected


KINDS = [
    (assembly.CCQ_PAIR.value, make.PAIR),
    (assembly.CCQ_WIDE.value, make.WIDE),
    (assembly.CCQ_EXACT.value, make.WIDE),
    (assembly.CCQ_EXACT.value, (100.7, -300.25)),
    (assembly.CCQ_EXACT.value, (-127.3, 32000.1)),
]
POSITIONS = [assembly.CCQ_HIGH, assembly.CCQ_LOW] * 2


@pytest.mark.parametrize(("kind", "pair"), KINDS)
def test_every_byte_of_ccq_leaves_its_windows(kind, pair):
    line, expected = ccq_line(kind, pair)
    for code in range(0, 256, 4):
        register = sum((code + i) << 8 * i for i in range(4))
        got = run(assembly.ASM_CCQ.value[kind], 8, [register, line[0], line[0], line[1], line[1]])
        for i in range(4):  # byte i % 2 of element i // 2
            for window, (v, position) in enumerate(zip(windows(expected[code + i]), POSITIONS, strict=True)):
                assert got[2 * (2 * window + i % 2) + i // 2] == (v + 32) * 2.0 ** (position - assembly.POSITION)


@pytest.mark.parametrize(("kind", "pair"), KINDS)
@pytest.mark.parametrize("scale", [0, 1, 7, 15])
def test_every_byte_of_ccq_is_scaled_exactly(kind, pair, scale):
    line, expected = ccq_line(kind, pair)
    factor = scale * 2.0**assembly.CCQ_SCALE
    offsets = [
        -factor * 2.0 ** (5 + position - assembly.POSITION) for position in (assembly.CCQ_HIGH, assembly.CCQ_LOW)
    ]
    factors = [joined(np.array([value, value])) for value in (factor, *offsets)]
    for code in range(0, 256, 4):
        register = sum((code + i) << 8 * i for i in range(4))
        text = assembly.ASM_CCQ_SCALED.value[kind]
        got = run(text, 8, [register, line[0], line[0], line[1], line[1], *factors])
        for i in range(4):
            for window, (v, position) in enumerate(zip(windows(expected[code + i]), POSITIONS, strict=True)):
                want = v * scale * 2.0 ** (assembly.CCQ_SCALE + position - assembly.POSITION)
                assert got[2 * (2 * window + i % 2) + i // 2] == want


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_field_of_an_element_is_masked_out(width):
    for low, high in ((0x0000, 0xFFFF), (0xFFFF, 0x0000), (0x1234, 0xFEDC), (0xA5A5, 0x8001)):
        got = run(assembly.ASM_FIELDS.value[width], 16 // width, [low | high << 16])
        for field in range(16 // width):
            unit = 2.0 ** (assembly.position(field, width) - assembly.POSITION)
            want = [(element >> field * width & (1 << width) - 1) * unit for element in (low, high)]
            assert got[2 * field : 2 * field + 2] == want


def test_every_byte_of_int8_and_int4():
    for code in range(0, 256, 4):
        register = sum((code + i) << 8 * i for i in range(4))
        assert run(assembly.ASM_INT8.value, 2, [register]) == [code + i - 128 for i in range(4)]
        low, high = ([(code + i) & 15 for i in range(4)], [code + i >> 4 for i in range(4)])
        assert run(assembly.ASM_INT4.value, 4, [register]) == [v - 8 for v in low + high]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_bit_of_a_plane(count):
    factors = [1.5, -0.625, 0.375, 0.1875][:count]
    for code in range(0, 65536, 1021):
        elements = [[(code + 77 * i) * (7 * p + 1) % 65536 for i in range(2)] for p in range(count)]
        registers = [low | high << 16 for low, high in elements]
        coefficients = [joined(np.array([f, f])) for f in (*factors, -0.25)]
        got = run(assembly.ASM_PLANES.value[count], 16, [*registers, *coefficients])
        for field in range(16):
            for i in range(2):
                total = -0.25 + sum(f * (elements[p][i] >> field & 1) for p, f in enumerate(factors))
                assert got[2 * field + i] == total


def test_the_constraints_match_the_operands():
    for text, outputs, inputs in (
        *((text, 8, 5) for text in assembly.ASM_CCQ.value),
        *((text, 8, 8) for text in assembly.ASM_CCQ_SCALED.value),
        *((text, 16 // width, 1) for width, text in assembly.ASM_FIELDS.value.items()),
        (assembly.ASM_INT8.value, 2, 1),
        (assembly.ASM_INT4.value, 4, 1),
        *((text, 16, 2 * count + 1) for count, text in assembly.ASM_PLANES.value.items()),
    ):
        named = {int(number) for number in re.findall(r"\$(\d+)", text)}
        assert max(named) < outputs + inputs
        assert set(range(outputs)) <= named
