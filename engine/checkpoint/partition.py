"""Which part of each matrix belongs to a tensor-parallel rank, and which sizes a model can be cut for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.errors import UnsupportedError
from engine.quantization.config import Part, QuantizationConfig
from engine.quantization.format import Span, WeightFormat


@dataclass(frozen=True, slots=True)
class Block:
    """Columns that are cut as one (q, or gate): ``width`` in the whole matrix, of which a rank takes ``part``."""

    width: int
    part: Span


@dataclass(frozen=True, slots=True)
class MatrixCut:
    """What a rank takes of a matrix [K, N] whose columns are ``blocks`` side by side."""

    k: int
    rows: Span
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Partition:
    """The cuts for one rank. Constructing it checks nothing; see :func:`check_size`."""

    config: ModelConfig
    rank: int
    world_size: int

    def vocabulary(self) -> Span:
        """Rows of the vocabulary; the last ones may lie beyond its end and stand for padding."""
        return self._share(-(-self.config.vocab_size // self.world_size) * self.world_size)

    def qkv(self) -> MatrixCut:
        """Query heads divide; KV heads divide, or are replicated where there are fewer of them than ranks."""
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if kv_heads >= self.world_size:
            kv = self._share(kv_heads)
        else:
            head = self.rank * kv_heads // self.world_size
            kv = Span(head, head + 1)
        blocks = [(heads, self._share(heads)), (kv_heads, kv), (kv_heads, kv)]
        return MatrixCut(
            k=config.hidden_size,
            rows=Span(0, config.hidden_size),
            blocks=tuple(Block(n * size, Span(part.start * size, part.stop * size)) for n, part in blocks),
        )

    def gate_up(self, width: int) -> MatrixCut:
        """Both halves of an MLP of ``width``, cut apart."""
        block = Block(width, self._share(width))
        return MatrixCut(k=self.config.hidden_size, rows=Span(0, self.config.hidden_size), blocks=(block, block))

    def rows(self, k: int) -> MatrixCut:
        """A matrix [k, hidden] cut along K: o_proj and down_proj."""
        n = self.config.hidden_size
        return MatrixCut(k=k, rows=self._share(k), blocks=(Block(n, Span(0, n)),))

    def _share(self, count: int) -> Span:
        return Span(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one part of a cut checkpoint gives to a matrix: ``rows`` and ``columns`` of what stands in that part."""

    part: int
    rows: Span
    columns: tuple[Span, ...]


def pieces(wanted: MatrixCut, held: Sequence[MatrixCut]) -> list[list[Piece]]:
    """Where to find a rank's share of a matrix of which each part of a checkpoint holds a share.

    Args:
        wanted: the share to put together.
        held: the shares there are; together they cover the matrix. Where several hold the same columns (replicated KV
            heads), the first is taken.

    Returns:
        Pieces to join: the inner lists along N, the outer list along K.
    """
    grid = []
    for rows in sorted({part.rows for part in held}):
        start, stop = max(rows.start, wanted.rows.start), min(rows.stop, wanted.rows.stop)
        if start < stop:
            peers = {i: part for i, part in enumerate(held) if part.rows == rows}
            grid.append(_side_by_side(wanted, peers, Span(start - rows.start, stop - rows.start)))
    return grid


def _side_by_side(wanted: MatrixCut, held: dict[int, MatrixCut], rows: Span) -> list[Piece]:
    found: list[tuple[int, Span]] = []
    for b, block in enumerate(wanted.blocks):
        position = block.part.start
        while position < block.part.stop:
            i, span = next(
                (i, cut.blocks[b].part)
                for i, cut in held.items()
                if cut.blocks[b].part.start <= position < cut.blocks[b].part.stop
            )
            stop = min(span.stop, block.part.stop)
            left = sum(len(before.part) for before in held[i].blocks[:b]) - span.start
            found.append((i, Span(left + position, left + stop)))
            position = stop
    return [
        Piece(i, rows, tuple(span for _, span in group)) for i, group in itertools.groupby(found, key=lambda f: f[0])
    ]


def check_size(config: ModelConfig, quantization: QuantizationConfig, world_size: int) -> None:
    """Check that the model can be cut for ``world_size`` ranks.

    Raises:
        UnsupportedError: it can't; the message says why and which sizes work.
    """
    reason = obstacle(config, quantization, world_size)
    if reason is not None:
        sizes = [
            size for size in range(1, config.num_attention_heads + 1) if obstacle(config, quantization, size) is None
        ]
        raise UnsupportedError(
            f"tensor_parallel_size {world_size} does not fit this model: {reason}; "
            f"sizes that work: {', '.join(map(str, sizes))}"
        )


def obstacle(config: ModelConfig, quantization: QuantizationConfig, world_size: int) -> str | None:
    """Why the model can't be cut for ``world_size`` ranks; None if it can."""
    return next(_obstacles(config, quantization, world_size), None)


def _obstacles(config: ModelConfig, quantization: QuantizationConfig, size: int) -> Iterator[str]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        yield f"num_attention_heads {heads} is not a multiple of it"
    if kv_heads % size and size % kv_heads:
        yield f"num_key_value_heads {kv_heads} is neither a multiple nor a divisor of it"
    layers = range(config.num_hidden_layers)
    dense_layers = [layer for layer in layers if not config.is_moe_layer(layer)]
    moe_layers = [layer for layer in layers if config.is_moe_layer(layer)]
    cuts = [("num_attention_heads * head_dim", heads * config.head_dim, _formats(quantization, "attention", layers))]
    if dense_layers:
        cuts.append(("intermediate_size", config.intermediate_size, _formats(quantization, "mlp", dense_layers)))
    if config.moe and moe_layers:
        moe = config.moe
        cuts.append(("moe_intermediate_size", moe.intermediate_size, _formats(quantization, "experts", moe_layers)))
        if moe.num_shared_experts:
            formats = _formats(quantization, "shared_experts", moe_layers)
            cuts.append(("the shared experts' width", moe.shared_intermediate_size, formats))
    for what, rows, formats in cuts:
        for weight_format in formats:
            tile = weight_format.row_tile
            if rows % (size * tile):
                unit = f"{tile} rows of {weight_format.name}" if tile > 1 else "one row"
                yield f"{what} {rows} does not divide into {size} parts that are multiples of {unit}"


def _formats(quantization: QuantizationConfig, part: Part, layers: Iterable[int]) -> list[WeightFormat]:
    return sorted({quantization.format(part, layer) for layer in layers}, key=lambda f: f.name)
