"""Codebooks of CCQ (arXiv 2507.07145): the 256 four-vectors that a byte can stand for, and the search for good ones.

A byte u picks the 15-bit word ``floor(u * scale + zero + 0.5)``, whose four overlapping 6-bit windows are four weights.
Which 256 of the 2^15 words exist depends on (scale, zero) as on a random seed: some pairs spread their vectors like a
good vector quantizer, most do not. ``benchmarks/codebooks.py`` makes :data:`PAIRS` again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.quantization import wint2

Pair = tuple[float, float]
"""(code_scale, code_zp)."""

WHOLE_RANGE: Pair = (128.5, 0.0)
"""The obvious pair: the bytes spread evenly over all 2^15 words."""
CODE: Pair = (120.94451141357422, 1254.2928466796875)
"""The pair of a tensor when none is given, the best found."""
PAIRS: tuple[Pair, ...] = (
    CODE,
    (120.96498107910156, 1132.7872314453125),
    (120.91480255126953, 723.6212768554688),
    (120.95174407958984, 752.6886596679688),
)
"""Good pairs, best first, for columns that choose their own."""

CODES = 256
_SCALES = (0.75, 1.2, 13)  # relative to the one that gives the codebook the samples' RMS


@dataclass(frozen=True, slots=True)
class Codebook:
    """The vectors of one pair.

    Attributes:
        pair: (code_scale, code_zp).
        vectors: fp32 [256, 4], integers in -32..31; row u is what byte u stands for.
    """

    pair: Pair
    vectors: Tensor

    @classmethod
    def of(cls, pair: Pair, *, device: torch.device) -> Codebook:
        """The codebook as the public decoder sees it.

        Raises:
            ConfigError: a pair that is not finite or leaves the range in which fp32 counts integers.
        """
        scale, zero = pair
        if not (math.isfinite(scale) and math.isfinite(zero) and abs(scale) * CODES + abs(zero) < 2**23):
            raise ConfigError(f"code pair {pair}; expected finite values with 256 |scale| + |zp| below 2^23")
        bytes_ = torch.arange(CODES, dtype=torch.uint8, device=device)[:, None]  # one column of every byte: K = 1024
        ones = wint2.pack_scales(torch.ones(16, 1, dtype=torch.uint8, device=device))
        one, *code = (torch.tensor([value], dtype=torch.float32, device=device) for value in (1.0, scale, zero))
        decoded = wint2.dequantize(bytes_, ones, one, *code, row_order="plain")
        return cls(pair=pair, vectors=decoded.float().view(CODES, wint2.WORD_ROWS))

    @property
    def rms(self) -> float:
        """Root mean square of all entries."""
        return float(self.vectors.square().mean().sqrt())


def gaussian_error(pair: Pair, samples: Tensor, *, scales: tuple[float, float, int] = _SCALES) -> float:
    """Mean squared error of unit Gaussian words under one scale for all, the best of a few.

    Args:
        pair: the codebook's pair.
        samples: fp32 [words, 4], independent unit Gaussians.
        scales: first, last and number of the scales tried, relative to the one that gives the codebook unit RMS.
    """
    book = Codebook.of(pair, device=samples.device)
    features = torch.cat((samples, torch.ones_like(samples[:, :1])), dim=1)
    norms = book.vectors.square().sum(dim=1)
    energy = samples.square().sum(dim=1).mean()
    errors = []
    for relative in torch.linspace(*scales).tolist():
        scale = relative / book.rms
        table = torch.cat((-2 * scale * book.vectors.T, scale**2 * norms[None]))  # [5, 256]
        errors.append(float((features @ table).amin(dim=1).mean() + energy) / wint2.WORD_ROWS)
    return min(errors)
