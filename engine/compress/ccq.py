"""A CCQ encoder: WINT2 bytes for the public decoder (``engine.quantization.wint2``).

Baidu's encoder was never published. This one fixes a single codebook of 256 four-vectors for the whole tensor,
searches a scale for each group of 64 rows, rounds the scales to the format's two levels, and chooses every byte by
exhaustive search *under the rounded scales*. It carries no error from one word to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compress.packed import PackedWeight
from engine.errors import UnsupportedError
from engine.quantization import wint2
from engine.quantization.format import RowOrder

CODE = (120.8612, 548.348)
"""(code_scale, code_zp): which 256 of the 2^15 trellis words exist. The pair acts like a random seed; this is the
best of many tried on Gaussian weights: relative squared error .106, where the median pair has .125."""

_MAX_SCALE = 15
_CHUNK_WORDS = 4096  # distances of so many words to 256 codes (4 MiB) stay in a core's cache
_GRID = (0.55, 1.6, 16)  # scales tried, relative to the one that gives the codebook the group's RMS
_REFITS = 1


def quantize(
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    code: tuple[float, float] = CODE,
    row_order: RowOrder = "plain",
) -> PackedWeight:
    """Quantize a linear to 2.0625 bits a weight (and 10 bytes an output feature).

    Args:
        weight: [out, in], in a multiple of 64.
        hessian: [in, in], X X^T of calibration inputs; its diagonal weights the errors of the input features.
        code: (code_scale, code_zp), one pair for the whole tensor.
        row_order: order of rows inside a group of 64, see ``engine.quantization.wint2``.

    Raises:
        UnsupportedError: ``in`` is not a multiple of 64.
    """
    out_features, in_features = weight.shape
    weight_format = wint2.Wint2(row_order=row_order)
    weight_format.tensors(in_features, out_features)
    if hessian is not None and hessian.shape != (in_features, in_features):
        raise UnsupportedError(f"hessian {list(hessian.shape)}; expected [{in_features}, {in_features}]")
    codebook = Codebook.of(code, device=weight.device)
    words = _stored_words(weight, row_order)
    importance = torch.ones(in_features, device=weight.device) if hessian is None else hessian.diagonal().float()
    importance = _stored_words((importance / importance.mean().clamp(min=1e-30))[None], row_order)
    columns = max(1, _CHUNK_WORDS * wint2.WORD_ROWS // in_features)
    parts = [_quantize_columns(chunk, importance, codebook) for chunk in torch.split(words, columns)]
    codes, scales, supers = (torch.cat(part) for part in zip(*parts, strict=True))
    constants = [torch.full((out_features,), value, device=weight.device) for value in code]
    return PackedWeight(
        weight_format=weight_format,
        shape=(out_features, in_features),
        tensors={
            "quant_weight": codes.flatten(1).T.contiguous(),  # [K/4, N]
            "weight_scale": wint2.pack_scales(scales.T).contiguous(),  # [K/128, N]
            "super_scales": supers,
            "code_scale": constants[0],
            "code_zp": constants[1],
        },
    )


@dataclass(frozen=True, slots=True)
class Codebook:
    """The 256 four-vectors that the bytes stand for.

    ``vectors`` fp32 [256, 4]; ``table`` fp32 [8, 256]: the vectors and their squares, for distances as one product.
    """

    vectors: Tensor
    table: Tensor

    @classmethod
    def of(cls, code: tuple[float, float], *, device: torch.device) -> Codebook:
        """The codebook of a (code_scale, code_zp) pair."""
        bytes_ = torch.arange(256, dtype=torch.uint8, device=device)[:, None]  # one column of every byte: K = 1024
        scales = wint2.pack_scales(torch.ones(16, 1, dtype=torch.uint8, device=device))
        one, scale, zero = (torch.tensor([value], device=device) for value in (1.0, *code))
        decoded = wint2.dequantize(bytes_, scales, one, scale, zero, row_order="plain")
        vectors = decoded.float().view(256, wint2.WORD_ROWS)
        return cls(vectors=vectors, table=torch.cat((vectors.T, vectors.T.square())))

    def distances(self, words: Tensor, importance: Tensor, scale: Tensor) -> Tensor:
        """Weighted squared distances of words to scaled codes, less the words' own squares.

        Args:
            words: [columns, groups, 16, 4].
            importance: weight of each input feature, [1, groups, 16, 4].
            scale: [columns, groups].

        Returns:
            [columns * groups * 16, 256]: sum over the four of h (x - s c)^2 - h x^2.
        """
        s = scale[..., None, None]
        features = torch.cat((-2 * s * importance * words, s.square() * importance.expand_as(words)), dim=-1)
        return features.view(-1, 2 * wint2.WORD_ROWS) @ self.table


def _stored_words(weight: Tensor, row_order: RowOrder) -> Tensor:
    """[N, K] in logical order -> fp32 [N, groups, 16, 4] in stored order."""
    stored = wint2.stored_rows(weight.float().reshape(len(weight), -1, wint2.GROUP_ROWS), row_order)
    return stored.reshape(len(weight), -1, wint2.GROUP_ROWS // wint2.WORD_ROWS, wint2.WORD_ROWS)


def _quantize_columns(words: Tensor, importance: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [columns, groups, 16], group scales uint8 [columns, groups], super scales bf16 [columns]."""
    # Real scales: the best of a grid around the group's RMS, then a least-squares fit to the codes it leads to.
    rms = words.square().mean(dim=(2, 3)).sqrt() / codebook.vectors.square().mean().sqrt()  # [columns, groups]
    first, last, count = _GRID
    grid = torch.linspace(first, last, count, device=words.device)[:, None, None] * rms
    real = _pick(grid, _errors(words, importance, codebook, grid))
    real = _fit(words, codebook.vectors[_nearest(words, importance, codebook, real)], importance, dims=(2, 3))

    supers = (real.clamp(min=0).amax(dim=1) / _MAX_SCALE).bfloat16()  # [columns]
    scales = (real / _positive(supers.float())[:, None]).round()
    steps = torch.tensor([-1.0, 0.0, 1.0], device=words.device)[:, None, None]
    for refit in range(_REFITS + 1):
        unit = supers.float()[:, None]
        near = (scales + steps).clamp(0, _MAX_SCALE)
        scales = _pick(near, _errors(words, importance, codebook, near * unit))
        codes = _nearest(words, importance, codebook, scales * unit)
        if refit < _REFITS:
            chosen = codebook.vectors[codes] * scales[..., None, None]
            supers = _fit(words, chosen, importance, dims=(1, 2, 3)).clamp(min=0).bfloat16()
    return codes.to(torch.uint8), scales.to(torch.uint8), supers


def _errors(words: Tensor, importance: Tensor, codebook: Codebook, scales: Tensor) -> Tensor:
    """The least error of each group under each of its candidate scales [candidates, columns, groups], same shape."""
    per_word = torch.stack([codebook.distances(words, importance, scale).amin(dim=1) for scale in scales])
    return per_word.view(len(scales), *words.shape[:3]).sum(dim=-1)


def _pick(candidates: Tensor, errors: Tensor) -> Tensor:
    """[candidates, columns, groups], twice -> the candidate of least error [columns, groups]."""
    return candidates.gather(0, errors.argmin(dim=0, keepdim=True))[0]


def _nearest(words: Tensor, importance: Tensor, codebook: Codebook, scale: Tensor) -> Tensor:
    """The best code of each word, int64 [columns, groups, 16]."""
    return codebook.distances(words, importance, scale).argmin(dim=1).view(words.shape[:3])


def _fit(words: Tensor, chosen: Tensor, importance: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    """The scale s that minimises the sum over ``dims`` of h (x - s q)^2: <h x, q> / <h q, q>."""
    weighted = importance * chosen
    return (words * weighted).sum(dim=dims) / _positive((chosen * weighted).sum(dim=dims))


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(torch.float32).tiny)
