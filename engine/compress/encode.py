"""One door to the encoders: a matrix into whatever format its rule asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from engine.compress import bpdq, ccq, gptq, nested, rtn
from engine.compress.ccq import CcqOptions, Effort
from engine.compress.codebook import Pair
from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight
from engine.errors import ConfigError, UnsupportedError
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.format import WeightFormat
from engine.quantization.gptq import Gptq
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How to encode, where the format leaves a choice.

    Attributes:
        error_feedback: WINT4 and gptq by GPTQ, each weight's error carried to those after it; else by rounding alone.
        clip: integer grids of least squared error; else from the smallest to the largest weight.
        effort: how hard CCQ searches, or which of its steps it takes.
        sweeps: how often gptq and bpdq choose each group again; as published they don't.
        codebook: CCQ's (code_scale, code_zp): one for the whole of a matrix, or for each column the best of several.
        code: CCQ's (code_scale, code_zp); None: the best known.
    """

    error_feedback: bool = True
    clip: bool = True
    effort: Effort | CcqOptions = "default"
    sweeps: int = 0
    codebook: Literal["tensor", "column"] = "tensor"
    code: Pair | None = None

    def __post_init__(self) -> None:
        if isinstance(self.effort, str) and self.effort not in ccq.EFFORTS:
            raise ConfigError(f"effort {self.effort!r}; expected one of {', '.join(ccq.EFFORTS)}")


def encode(weight: Tensor, metric: Metric | None, weight_format: WeightFormat, options: EncodeOptions) -> PackedWeight:
    """Quantize a matrix.

    Args:
        weight: [out, in].
        metric: of its inputs; None: they are not known, every input counts alike and no error is carried.
        weight_format: the format to write.
        options: see there.

    Raises:
        UnsupportedError: there is no encoder for the format, or the matrix does not fit it.
    """
    match weight_format:
        case Bf16():
            tensors = {"weight": weight.bfloat16().T.contiguous()}
            return PackedWeight(weight_format=weight_format, shape=(weight.shape[0], weight.shape[1]), tensors=tensors)
        case Wint8():
            return rtn.quantize(weight, bits=8)
        case Wint4() if metric is not None and options.error_feedback:
            return gptq.quantize(weight, metric, bits=4, group_size=None, sweeps=options.sweeps)
        case Wint4():
            return rtn.quantize(weight, bits=4)
        case Wint2(row_order):
            return ccq.quantize(
                weight,
                metric,
                row_order=row_order or "plain",
                code=options.code,
                codebook=options.codebook,
                options=options.effort,
            )
        # The formats check their numbers when they are made.
        case Bitplane(_, group_size, True):
            return nested.quantize(weight, metric, group_size=group_size)
        case Bitplane(planes, group_size):
            few = cast("Literal[2, 3, 4]", planes)
            return bpdq.quantize(weight, metric, planes=few, group_size=group_size, sweeps=options.sweeps)
        case Gptq(bits, group_size):
            width = cast("Literal[2, 4, 8]", bits)
            if not options.error_feedback:
                return rtn.quantize(weight, bits=width, group_size=group_size, clip=options.clip)
            return gptq.quantize(
                weight, metric, bits=width, group_size=group_size, clip=options.clip, sweeps=options.sweeps
            )
    raise UnsupportedError(f"there is no encoder for the format {weight_format.name!r}")


def uses_metric(weight_format: WeightFormat, options: EncodeOptions) -> bool:
    """Whether :func:`encode` looks at the metric; if not, nobody need gather one."""
    match weight_format:
        case Bf16() | Wint8():
            return False
        case Wint4() | Gptq():
            return options.error_feedback
    return True
