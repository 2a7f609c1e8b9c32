"""How many tokens each routed expert gets: the balance of the experts under real traffic."""

from __future__ import annotations

import torch

from engine.layers.moe import SparseMoE
from engine.models import DecoderModel
from engine.models.decoder import Decoder


class ExpertLoad:
    """Counters in the MoE layers of a decoder: on the device, added to by each step, read only when somebody asks.

    Adding needs no synchronization and no memory that moves, so it is captured with a CUDA graph; a step that runs as a
    graph counts its padding rows too (:mod:`engine.execution.padding`), at most 7 from 16 requests on.

    Args:
        decoder: whose MoE layers count from now on; one without any is fine.
        device: compute device.
    """

    def __init__(self, decoder: DecoderModel, device: torch.device) -> None:
        layers = enumerate(decoder.layers) if isinstance(decoder, Decoder) else ()
        sparse = {index: layer.mlp for index, layer in layers if isinstance(layer.mlp, SparseMoE)}
        num_experts = max((moe.gate.shape[0] for moe in sparse.values()), default=0)
        self._layers = list(sparse)
        # One tensor, so that reading it waits for the device once: [layers, E]
        self._tokens = torch.zeros((len(sparse), num_experts), dtype=torch.int64, device=device)
        for row, moe in zip(self._tokens, sparse.values(), strict=True):
            moe.expert_tokens = row

    def reset(self) -> None:
        """Count from zero again."""
        self._tokens.zero_()

    def read(self) -> dict[int, list[int]]:
        """By layer (from 0), the tokens that each expert has had; from any thread."""
        return dict(zip(self._layers, self._tokens.tolist(), strict=True))
