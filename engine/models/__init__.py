"""Models by architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import UnsupportedError
from engine.execution.parallel import TensorParallelGroup
from engine.layers.weights import WeightSource
from engine.models.builder import DecoderBuilder
from engine.models.ernie4_5 import Ernie4_5
from engine.models.qwen2 import Qwen2
from engine.quantization.vocabulary import QuantizeEmbeddings
from kernels import ops

MODELS: dict[str, type[DecoderBuilder]] = {"ernie4_5": Ernie4_5, "ernie4_5_moe": Ernie4_5, "qwen2": Qwen2}
"""``ModelConfig.architecture`` -> what builds it."""


class DecoderModel(Protocol):
    """One rank's share of a decoder."""

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[ops.LayerCache],
        *,
        slot_mapping: Tensor,
        metadata: ops.AttentionMetadata,
        logits_rows: Tensor,
    ) -> Tensor | None:
        """Run a flat batch of T tokens; every rank calls it with the same values.

        Args:
            token_ids: int [T].
            positions: int [T], each token's index in its sequence.
            kv_caches: of each layer, with the kv heads of this rank.
            slot_mapping: int64 [T], where the tokens' keys and values go.
            metadata: from `ops.attention_metadata`.
            logits_rows: int [S], the rows whose logits are wanted.

        Returns:
            fp32 [S, vocab_size] on rank 0, None elsewhere.
        """


def model_builder(
    config: ModelConfig,
    weights: WeightSource,
    group: TensorParallelGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize_embeddings: QuantizeEmbeddings | None = None,
) -> DecoderBuilder:
    """The builder of the architecture that `config` names, for a whole model or for some of its layers.

    Raises:
        UnsupportedError: there is no such architecture.
    """
    builder = MODELS.get(config.architecture)
    if builder is None:
        raise UnsupportedError(f"architecture {config.architecture!r}; supported: {', '.join(sorted(MODELS))}")
    return builder(config, weights, group, dtype=dtype, device=device, quantize_embeddings=quantize_embeddings)


def build_model(
    config: ModelConfig,
    weights: WeightSource,
    group: TensorParallelGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize_embeddings: QuantizeEmbeddings | None = None,
) -> DecoderModel:
    """One rank's share of the model that `config` describes; arguments and errors as for `model_builder`."""
    return model_builder(
        config, weights, group, dtype=dtype, device=device, quantize_embeddings=quantize_embeddings
    ).build()
