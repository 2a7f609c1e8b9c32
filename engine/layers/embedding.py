"""The two ends of a model, cut by rows of the vocabulary: token embedding and logits head."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.execution.parallel import TensorParallelGroup
from engine.layers.linear import Linear
from kernels import ops


class VocabParallelEmbedding:
    """Token ids -> hidden states; each rank looks up its rows, and the sum over ranks is the embedding.

    Args:
        table: [rows, H], or from `ops.prepare_embedding`: rows ``rank * rows ...`` of the padded vocabulary.
        rows: of the table.
        group: the ranks.
    """

    def __init__(self, table: Tensor | ops.Prepared, rows: int, group: TensorParallelGroup) -> None:
        self.table = table
        self.group = group
        self.first_row = group.rank * rows

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Int [T] -> [T, H]."""
        return self.group.all_reduce(ops.embedding(token_ids, self.table, self.first_row))


class LogitsHead:
    """Hidden states -> logits, on rank 0.

    Args:
        projection: H -> this rank's rows of the padded vocabulary.
        vocab_size: rows without the padding.
        group: the ranks.
    """

    def __init__(self, projection: Linear, vocab_size: int, group: TensorParallelGroup) -> None:
        self.projection = projection
        self.vocab_size = vocab_size
        self.group = group

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """[S, H] -> fp32 [S, vocab_size] on rank 0, None elsewhere."""
        parts = self.group.gather(self.projection(hidden))  # [S, rows] of each rank
        if parts is None:
            return None
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return logits[:, : self.vocab_size].float()
