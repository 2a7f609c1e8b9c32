"""Where layers get their weights from; `engine.checkpoint.loader.ShardedWeights` is the one for folders."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kernels.operands import Weight


class WeightSource(Protocol):
    """One rank's share of a checkpoint, pulled module by module so that little of it is in flight.

    H is the hidden size, E the number of experts. Tensors are in the compute dtype and on the compute device, packed
    weights as stored.
    """

    def embedding(self) -> Tensor:
        """[rows, H]: this rank's rows of the vocabulary, which is padded with zero rows to a multiple of the ranks."""

    def head(self) -> Weight:
        """Logits projection, N = the rows of `embedding`."""

    def norm(self, name: str) -> Tensor:
        """[H]; "layers.{i}.input_layernorm", "layers.{i}.post_attention_layernorm" or "norm"."""

    def qkv(self, layer: int) -> Weight:
        """N = this rank's query heads, then key heads, then value heads."""

    def qkv_bias(self, layer: int) -> Tensor | None:
        """[N] of `qkv`; None if the checkpoint has none."""

    def attention_output(self, layer: int) -> Weight:
        """K = this rank's query heads."""

    def gate_up(self, layer: int, *, shared: bool = False) -> Weight:
        """Dense MLP or shared experts; N = this rank's gate features, then its up features."""

    def down(self, layer: int, *, shared: bool = False) -> Weight:
        """Dense MLP or shared experts; K = this rank's features."""

    def router(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Gate fp32 [E, H], and correction bias fp32 [E] if the checkpoint has one."""

    def expert_gate_up(self, layer: int) -> Weight:
        """Stacked [E, ...]; N as in `gate_up`."""

    def expert_down(self, layer: int) -> Weight:
        """Stacked [E, ...]; K as in `down`."""

    def close(self) -> None:
        """All weights were taken; let go of the files."""
