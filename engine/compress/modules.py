"""The matrices of a decoder layer: their names, shapes and parts, and which inputs they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.errors import UnsupportedError
from engine.quantization.config import Part, QuantizationConfig

GROUPS: dict[Part, str] = {
    "attention": "attention",
    "mlp": "dense MLP",
    "shared_experts": "shared experts",
    "experts": "routed experts",
}
"""What people call the parts."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear of a layer.

    Attributes:
        module: our name of it, "layers.3.mlp.experts.5.down_proj".
        part: the group of matrices that has its format.
        k: input features.
        n: output features.
        inputs: what it is fed with, without the layer. Matrices of one layer with equal ``inputs`` see the same tokens.
        expert: which routed expert it belongs to, or None.
    """

    module: str
    part: Part
    k: int
    n: int
    inputs: str
    expert: int | None = None

    @property
    def num_weights(self) -> int:
        """k n."""
        return self.k * self.n

    @property
    def name(self) -> str:
        """The module's name inside its layer."""
        return self.module.split(".", 2)[2]


def layer_matrices(config: ModelConfig, layer: int) -> list[Matrix]:
    """Every matrix of a layer that can be quantized, in the order of computation."""
    return list(_matrices(config, layer))


def _matrices(config: ModelConfig, layer: int) -> Iterator[Matrix]:
    prefix, hidden, moe = f"layers.{layer}", config.hidden_size, config.moe
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def mlp(module: str, part: Part, width: int, expert: int | None = None) -> Iterator[Matrix]:
        yield Matrix(f"{prefix}.{module}.up_gate_proj", part, hidden, 2 * width, "mlp", expert)
        yield Matrix(f"{prefix}.{module}.down_proj", part, width, hidden, f"{module}.down_proj", expert)

    yield Matrix(f"{prefix}.self_attn.qkv_proj", "attention", hidden, heads + 2 * kv_heads, "self_attn.qkv_proj")
    yield Matrix(f"{prefix}.self_attn.o_proj", "attention", heads, hidden, "self_attn.o_proj")
    if moe is None or not config.is_moe_layer(layer):
        yield from mlp("mlp", "mlp", config.intermediate_size)
        return
    for expert in range(moe.num_experts):
        yield from mlp(f"mlp.experts.{expert}", "experts", moe.intermediate_size, expert)
    if moe.num_shared_experts:
        yield from mlp("mlp.shared_experts", "shared_experts", moe.shared_intermediate_size)


def check_plan(config: ModelConfig, plan: QuantizationConfig) -> None:
    """Check that every matrix of the model fits the format that ``plan`` gives it.

    Raises:
        ConfigError: a part of some layer has no format.
        UnsupportedError: a matrix does not fit its format; the message names it.
    """
    for layer in range(config.num_hidden_layers):
        for matrix in layer_matrices(config, layer):
            try:
                plan.format(matrix.part, layer).tensors(matrix.k, matrix.n)
            except UnsupportedError as error:
                raise UnsupportedError(
                    f"{matrix.module} ({GROUPS[matrix.part]}): {error}; give this part another format"
                ) from None
