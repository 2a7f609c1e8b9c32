"""The cases of ``benchmarks.quality``: formats, baselines, and CCQ step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.compress.ccq import CcqOptions
from engine.compress.encode import EncodeOptions
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.format import WeightFormat
from engine.quantization.gptq import Gptq
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

WHOLE_RANGE = (128.5, 0.0)
"""The (code_scale, code_zp) that spreads the bytes evenly over all 2^15 words."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way to quantize.

    Attributes:
        name: for people.
        group: what it is compared with.
        format: of the routed experts.
        encoding: how.
        calibrated: whether calibration text is used at all.
        per_expert: statistics of each expert's own tokens for its first projection.
        weighted: tokens count by their routing weights.
        matched: fitted to the original model's outputs.
        absorbing: what writes to the residual stream makes up for what it lacks.
        rotated: in a random basis of the residual stream.
        read_planes: ways to read a nested format.
    """

    name: str
    group: str
    format: WeightFormat
    encoding: EncodeOptions = field(default_factory=EncodeOptions)
    calibrated: bool = True
    per_expert: bool = True
    weighted: bool = True
    matched: bool = True
    absorbing: bool = True
    rotated: bool = False
    read_planes: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What ``--only`` looks in."""
        return f"{self.group}: {self.name}"


NOTHING = CcqOptions(
    search_again=False, feedback=False, metric=False, running_scales=False, heavy_first=False, beams=1, sweeps=0
)


def _step(name: str, **changed: object) -> Case:
    """CCQ with the classic calibration: one H for all experts, tokens alike, fitted to the own weights."""
    options = {field: getattr(NOTHING, field) for field in NOTHING.__dataclass_fields__} | changed
    encoding = EncodeOptions(effort=CcqOptions(**options))  # type: ignore[arg-type]  # the fields' own values
    return Case(name, "ccq step by step", Wint2("plain"), encoding, per_expert=False, weighted=False, matched=False)


def _classic(name: str, encoding: EncodeOptions, **changed: bool) -> Case:
    flags = {"per_expert": False, "weighted": False, "matched": False} | changed
    return Case(name, "ccq step by step", Wint2("plain"), encoding, **flags)  # type: ignore[arg-type]  # all are bool


ROUNDING = EncodeOptions(error_feedback=False)
FEEDBACK = {"search_again": True, "feedback": True}
DEFAULT = EncodeOptions()

CASES = (
    Case("BF16", "formats", Bf16()),
    Case("WINT8", "formats", Wint8()),
    Case("WINT4, rounded", "formats", Wint4(), ROUNDING),
    Case("WINT4, GPTQ", "formats", Wint4()),
    Case("RTN-2 g64, clipped", "baselines", Gptq(2, 64), ROUNDING),
    Case("GPTQ-2 g64, min/max grid", "baselines", Gptq(2, 64), EncodeOptions(clip=False)),
    Case("GPTQ-2 g64, clipped", "baselines", Gptq(2, 64)),
    Case("GPTQ-2 g128, clipped", "baselines", Gptq(2, 128)),
    Case("GPTQ-2 g64, clipped, 3 sweeps", "baselines", Gptq(2, 64), EncodeOptions(sweeps=3)),
    Case("BPDQ k=2 g64", "baselines", Bitplane(2, 64)),
    Case("BPDQ k=2 g128", "baselines", Bitplane(2, 128)),
    Case("BPDQ k=3 g128", "baselines", Bitplane(3, 128)),
    Case("BPDQ k=4 g128", "baselines", Bitplane(4, 128)),
    Case("nested planes g128", "nested", Bitplane(4, 128, nested=True), read_planes=(2, 3, 4)),
    Case("GPTQ-2 g64, clipped, classic calibration", "classic", Gptq(2, 64), per_expert=False, weighted=False,
         matched=False),
    Case("BPDQ k=2 g64, classic calibration", "classic", Bitplane(2, 64), per_expert=False, weighted=False,
         matched=False),
    Case("BPDQ k=2 g128, classic calibration", "classic", Bitplane(2, 128), per_expert=False, weighted=False,
         matched=False),
    Case("CCQ plain: whole-range pair, no calibration", "ccq step by step", Wint2("plain"),
         EncodeOptions(effort=NOTHING, code=WHOLE_RANGE), calibrated=False),
    Case("+ tuned pair", "ccq step by step", Wint2("plain"), EncodeOptions(effort=NOTHING), calibrated=False),
    _step("+ searched again under 4-bit scales", search_again=True),
    _step("+ error feedback", **FEEDBACK),
    _step("+ in the metric", **FEEDBACK, metric=True),
    _step("+ scales chosen on the way", **FEEDBACK, metric=True, running_scales=True),
    _classic("+ heavy inputs first (fast)", EncodeOptions(effort="fast")),
    _step("+ 4 beams", **FEEDBACK, metric=True, running_scales=True, heavy_first=True, beams=4),
    _classic("+ 2 sweeps of descent (default)", DEFAULT),
    _classic("+ each expert's own inputs", DEFAULT, per_expert=True),
    _classic("+ tokens by routing weight", DEFAULT, per_expert=True, weighted=True),
    Case("+ fitted to the original's outputs", "ccq step by step", Wint2("plain"), absorbing=False),
    Case("CCQ default: + drift absorbed", "ccq", Wint2("plain")),
    Case("CCQ fast", "ccq", Wint2("plain"), EncodeOptions(effort="fast")),
    Case("CCQ best: more beams and sweeps", "ccq", Wint2("plain"), EncodeOptions(effort="best")),
    Case("CCQ default, a codebook for each column", "ccq", Wint2("plain"), EncodeOptions(codebook="column")),
    Case("CCQ default, residual stream rotated", "ccq", Wint2("plain"), rotated=True),
)  # fmt: skip
