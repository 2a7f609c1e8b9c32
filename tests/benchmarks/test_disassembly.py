"""The inner loop is found in machine code as nvdisasm writes it."""

from __future__ import annotations

import pytest

from benchmarks.disassembly import CLASSES, WARP, inner_loop, instruction_class

# A kernel with an outer loop (.L_x_1), two inner ones (.L_x_2, .L_x_3) and the branch to itself at the end.
NESTED = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0030*/              @!P1 LDG.E.U16 R8, desc[UR6][R2.64+0x20] ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/                   I2F.U16 R4, R4 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   LDS.128 R4, [R3] ;
        /*0080*/                   HMMA.16816.F32.BF16 R8, R8, R4, R8 ;
        /*0090*/                   HMMA.16816.F32.BF16 R8, R8, R4, R8 ;
        /*00a0*/                   IMAD.MOV.U32 R4, RZ, RZ, R5 ;
        /*00b0*/                   NOP ;
        /*00c0*/               @P0 BRA `(.L_x_3) ;
        /*00d0*/               @P2 BRA `(.L_x_1) ;
        /*00e0*/               @P3 BRA `(.L_x_4) ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""
STRAIGHT = """
        /*0000*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR6][R2.64] ;
        /*0010*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0020*/                   EXIT ;
.L_x_0:
        /*0030*/                   BRA `(.L_x_0);
"""


def test_the_inner_loop_that_loads_counts():
    loop = inner_loop(NESTED)
    assert loop.is_loop
    assert loop.loaded_bytes == WARP * (16 + 2)
    assert {name: count for name, count in loop.instructions.items() if count} == {
        "global": 2, "fp32": 1, "conversion": 1, "other": 1,
    }  # fmt: skip
    assert loop.total == 5


def test_of_loops_that_load_alike_the_longest_counts():
    loop = inner_loop(NESTED.replace("LDG.E", "LDS").replace("I2F.U16 R4, R4", "NOP"))
    assert loop.instructions["tensor"] == 2
    assert loop.instructions["move"] == 1
    assert loop.total == 5  # NOP is none


def test_a_kernel_without_a_loop_counts_as_a_whole():
    loop = inner_loop(STRAIGHT)
    assert not loop.is_loop
    assert loop.loaded_bytes == WARP * (16 + 4)
    assert loop.total == 4


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("FFMA", "fp32"), ("FADD.FTZ", "fp32"), ("MUFU.EX2", "fp32"), ("HFMA2.MMA", "half"), ("HADD2.BF16_V2", "half"),
        ("IMAD.WIDE.U32", "integer"), ("IMAD.MOV.U32", "move"), ("LOP3.LUT", "integer"), ("PRMT", "integer"),
        ("IDP.4A.S8.S8", "integer"), ("ISETP.GE.AND", "integer"), ("VIADD", "integer"), ("I2F.U16", "conversion"),
        ("I2FP.F32.S32", "conversion"), ("F2FP.BF16.F32.PACK_AB", "conversion"), ("HGMMA.64x64x16.F32", "tensor"),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", "tensor"), ("IMMA.16832.S8.S8", "tensor"), ("LDSM.16.M88.4", "shared"),
        ("SHFL.BFLY", "shared"), ("STG.E.128", "global"), ("UTMALDG.2D", "global"), ("ULDC.64", "uniform"),
        ("R2UR", "uniform"), ("BAR.SYNC.DEFER_BLOCKING", "other"), ("BRA", "other"),
    ],
)  # fmt: skip
def test_classes(name, group):
    assert group in CLASSES
    assert instruction_class(name) == group
