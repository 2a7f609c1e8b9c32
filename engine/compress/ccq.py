"""A CCQ encoder: WINT2 bytes for the public decoder (``engine.quantization.wint2``).

Baidu's encoder was never published. This one fixes a single codebook of 256 four-vectors for the whole tensor and goes
through the groups of 64 rows with error feedback, a word of four rows at a time (``words``, ``beam``); then it searches
each group again given all others (``descent``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from engine.compress import beam, scales
from engine.compress.codebook import CODE, PAIRS, Codebook, Pair
from engine.compress.descent import State, descend
from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight
from engine.compress.words import GROUP_WORDS, Tables
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from engine.quantization import wint2
from engine.quantization.format import RowOrder

_CPU_ROWS = 1024
_GPU_ROWS = 8192
_HEADROOM = 13
"""The largest group scale of a row to begin with: 15 leaves the search no larger one."""
_NEAR = (-1, 0, 1)  # what to try adding to a group scale that was searched for
_FAR = (-4, -2, -1, 0, 1, 2, 4)  # and to one that was guessed


@dataclass(frozen=True, slots=True, kw_only=True)
class CcqOptions:
    """The steps of the encoder, each of which can be left out.

    Attributes:
        search_again: choose bytes and group scales once more under the rounded scales.
        feedback: carry each word's error to the words after it.
        metric: choose words by what their errors cost; without, by plain distance.
        running_scales: choose group scales during the pass, on the weights as earlier errors leave them; without,
            before it. Needs feedback.
        heavy_first: begin with the groups, and in them the words, whose inputs are the largest.
        beams: ways the pass keeps; 1 is greedy.
        sweeps: how often coordinate descent goes over all words and scales.
    """

    search_again: bool = True
    feedback: bool = True
    metric: bool = True
    running_scales: bool = True
    heavy_first: bool = True
    beams: int = 4
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.beams <= 64 or self.sweeps < 0:
            raise ConfigError(f"beams={self.beams}, sweeps={self.sweeps}; expected 1 to 64 beams, 0 sweeps or more")
        if self.beams > 1 and not (self.metric and self.feedback):
            raise ConfigError("a beam search compares ways by what their errors cost; it needs metric and feedback")


EFFORTS: dict[str, CcqOptions] = {
    "fast": CcqOptions(beams=1, sweeps=0),
    "default": CcqOptions(),
    "best": CcqOptions(beams=8, sweeps=4),
}
Effort = Literal["fast", "default", "best"]


def quantize(
    weight: Tensor,
    hessian: Tensor | Metric | None = None,
    *,
    row_order: RowOrder = "plain",
    code: Pair | None = None,
    codebook: Literal["tensor", "column"] = "tensor",
    options: CcqOptions | Effort = "default",
) -> PackedWeight:
    """Quantize a linear to 2.0625 bits a weight (and 10 bytes an output feature).

    Args:
        weight: [out, in], in a multiple of 64.
        hessian: [in, in], X X^T of calibration inputs. None: no input is related to another, nothing is fed back.
        row_order: order of rows inside a group of 64, see ``engine.quantization.wint2``.
        code: (code_scale, code_zp); None: the best known.
        codebook: one pair for all columns, from which a kernel can make one table; or for each column the best of
            ``codebook.PAIRS``, at their number times the cost.
        options: the steps, or an effort: "fast", "default", "best".

    Raises:
        UnsupportedError: ``in`` is not a multiple of 64.
        ConfigError: the Hessian is not one (see :class:`Metric`), or ``code`` makes no codebook.
        CheckpointError: the weight holds values that are not finite.
    """
    out_features, in_features = weight.shape
    weight_format = wint2.Wint2(row_order=row_order)
    if in_features % wint2.GROUP_ROWS:
        raise UnsupportedError(
            f"CCQ (wint2) needs K in multiples of 64; found K={in_features}. WINT8 and WINT4 need the same; "
            "bitplane with group_size=32 takes multiples of 32, bf16 any"
        )
    if not weight.isfinite().all():
        raise CheckpointError("the weight holds values that are not finite; it can't be quantized")
    if codebook == "column" and code is not None:
        raise ConfigError(f"code pair {code} for columns that choose their own; give one of code and codebook")
    chosen = EFFORTS[options] if isinstance(options, str) else options
    if hessian is None:  # nothing to carry, and no two words that depend on each other
        chosen = replace(chosen, feedback=False, metric=False, beams=1, sweeps=0)
    pairs = PAIRS if codebook == "column" else (code or CODE,)
    encoder = _Encoder(weight, hessian, row_order=row_order, pairs=pairs, options=chosen)
    rows = _CPU_ROWS if weight.device.type == "cpu" else _GPU_ROWS
    parts = [encoder.run(part) for part in torch.split(weight, rows)]
    codes, levels, supers, which = (torch.cat(part) for part in zip(*parts, strict=True))
    table = torch.tensor(pairs, dtype=torch.float32, device=weight.device)[which]  # [N, 2]
    return PackedWeight(
        weight_format=weight_format,
        shape=(out_features, in_features),
        tensors={
            "quant_weight": codes.T.contiguous(),  # [K/4, N]
            "weight_scale": wint2.pack_scales(levels.T).contiguous(),  # [K/128, N]
            "super_scales": supers,
            "code_scale": table[:, 0].contiguous(),
            "code_zp": table[:, 1].contiguous(),
        },
    )


class _Encoder:
    """What all rows of a matrix share."""

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor | Metric | None,
        *,
        row_order: RowOrder,
        pairs: Sequence[Pair],
        options: CcqOptions,
    ) -> None:
        k, device = weight.shape[1], weight.device
        metric = Metric.of(hessian, k, device=device)
        stored = wint2.stored_rows(torch.arange(k, device=device).view(-1, wint2.GROUP_ROWS), row_order).flatten()
        words = torch.arange(k // wint2.WORD_ROWS, device=device)
        self._words = _heavy_first(metric.matrix.diagonal()[stored]) if options.heavy_first else words
        self._order = stored.view(-1, wint2.WORD_ROWS)[self._words].flatten()
        self._matrix = metric.matrix[self._order][:, self._order]
        self._options = options
        self._factor = metric.inverse_factor(self._order) if options.feedback else None
        by_word = _block_factors(self._matrix, wint2.WORD_ROWS)
        by_group = _block_factors(self._matrix, wint2.GROUP_ROWS)
        carried = by_word if self._factor is None else _diagonal_blocks(self._factor, wint2.GROUP_ROWS)
        books = [Codebook.of(pair, device=device) for pair in pairs]
        self._alone = [Tables.of(book, by_word, metric=options.metric) for book in books]
        self._carried = [Tables.of(book, carried, metric=options.metric) for book in books]
        self._groups = [Tables.of(book, by_group) for book in books]

    def run(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rows [R, K]: codes uint8 [R, K/4], levels uint8 [R, groups], supers bf16 [R], which pair int64 [R]."""
        full = weight.float()
        exponent = torch.frexp(full.abs().amax(dim=1)).exponent  # any size of weights, no overflow
        rows = torch.ldexp(full, -exponent[:, None])[:, self._order]
        best, which = self._encode(rows, 0), torch.zeros_like(exponent, dtype=torch.int64)
        if len(self._carried) > 1:
            least = self._cost(rows, best, 0)
            for pair in range(1, len(self._carried)):
                state = self._encode(rows, pair)
                cost = self._cost(rows, state, pair)
                better = cost < least
                least, which[better] = torch.minimum(cost, least), pair
                best.take(state, better)
        codes = torch.empty_like(best.codes, dtype=torch.uint8).flatten(1)
        codes[:, self._words] = best.codes.flatten(1).to(torch.uint8)
        levels = torch.empty_like(best.levels, dtype=torch.uint8)
        levels[:, self._words[::GROUP_WORDS] // GROUP_WORDS] = best.levels.to(torch.uint8)
        return codes, levels, torch.ldexp(best.supers, exponent).bfloat16(), which

    def _encode(self, rows: Tensor, pair: int) -> State:
        options, tables, factor = self._options, self._carried[pair], self._factor
        if factor is not None and options.running_scales:
            guess = scales.guess(rows, tables.book, factor.diagonal() ** -2) * scales.FEEDBACK_MARGIN
            supers = scales.super_of(guess, _HEADROOM)
            steps: Sequence[int] = _FAR
        else:
            guess = scales.searched(rows, self._alone[pair])
            supers = scales.super_of(guess, scales.LARGEST)
            steps = _NEAR
        levels = scales.levels_of(guess, supers)
        if options.search_again:
            codes, levels = beam.run(rows, tables, factor, levels, supers, steps=steps, beams=options.beams)
        else:
            codes, _ = beam.run(rows, tables, factor, guess, torch.ones_like(supers), beams=options.beams)
        state = State(codes, levels, supers)
        if options.sweeps:
            groups = self._groups[pair]
            descend(rows, self._matrix, groups, state, sweeps=options.sweeps, beams=options.beams)
        return state

    def _cost(self, rows: Tensor, state: State, pair: int) -> Tensor:
        """``(q - w) H (q - w)^T`` of each row, [R]."""
        error = rows - state.unscaled(self._carried[pair].book) * state.supers[:, None]
        return ((error @ self._matrix) * error).sum(dim=1)


def _heavy_first(diagonal: Tensor) -> Tensor:
    """The words, int64 [K/4], groups kept whole: the heaviest group first, and in it the heaviest word.

    As heavy counts the largest diagonal value of H, [K]. Who is chosen early has more inputs left to make up for it.
    """
    heaviness = diagonal.view(-1, GROUP_WORDS, wint2.WORD_ROWS).amax(dim=2)  # [groups, 16]
    inside = heaviness.argsort(dim=1, descending=True, stable=True)
    groups = heaviness.amax(dim=1).argsort(descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=inside.device)[:, None] * GROUP_WORDS)[groups].flatten()


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[K, K] -> the blocks on its diagonal, [K/size, size, size]."""
    count = len(matrix) // size
    blocks: Tensor = matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return blocks


def _block_factors(matrix: Tensor, size: int) -> Tensor:
    """U of H's diagonal blocks of ``size`` inputs, each as if there were no others: fp32 [K/64, 64, 64]."""
    blocks = _diagonal_blocks(matrix, size).double()
    upper = torch.linalg.cholesky(blocks.flip(1, 2)).flip(1, 2)  # H_bb = R R^T
    factors: Tensor = torch.linalg.inv(upper).float()
    each = wint2.GROUP_ROWS // size
    whole: Tensor = factors.new_zeros(len(blocks) // each, each, size, each, size)
    whole.diagonal(dim1=1, dim2=3)[:] = factors.view(-1, each, size, size).movedim(1, -1)
    return whole.reshape(-1, wint2.GROUP_ROWS, wint2.GROUP_ROWS)
