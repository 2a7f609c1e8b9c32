"""Packed weights of no model, made where they will be used: what they compute is noise of a sensible size."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.quantization.bf16 import Bf16
from engine.quantization.config import Part, QuantizationConfig
from engine.quantization.format import WeightFormat
from kernels.operands import BitplaneWeight, CcqWeight, DenseWeight, GroupedWeight, Int4Weight, Int8Weight, Weight

GROUP = 64
"""Inputs that share coefficients of bit planes."""
GROUPED = 128
"""Inputs that share a scale of grouped integers."""
CCQ_DEVIATION = 18.5 * 9.0
"""Of a decoded value (even on -32 ... 31) times its group scale (even on 3 ... 15), about."""


def random_weight(
    name: str,
    k: int,
    n: int,
    *,
    experts: int | None = None,
    device: torch.device,
    dtype: torch.dtype,
    one_codebook: bool = True,
) -> Weight:
    """A random operand [K, N], or a stack of them, whose weights have a deviation of about 1 / sqrt(K).

    Args:
        name: of the format: "bf16", "wint8", "wint4", "wint2", "grouped4", or "bitplane" and a number of planes.
        k: input features.
        n: output features.
        experts: of a stack; None for one matrix.
        device: where to make it.
        dtype: of what is not packed.
        one_codebook: of "wint2": all columns have the codebook of the first, as `dibit quantize` writes them;
            otherwise each has its own, as Baidu's files may.
    """
    lead = () if experts is None else (experts,)
    deviation = k**-0.5

    def integers(*shape: int, high: int = 256, kind: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(0, high, (*lead, *shape), dtype=kind, device=device)

    def constant(value: float, *shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.full((*lead, *shape), value, dtype=kind, device=device)

    if name == "bf16":
        return DenseWeight((torch.randn((*lead, n, k), dtype=dtype, device=device)).mul_(deviation))
    if name == "wint8":
        return Int8Weight(integers(n, k).view(torch.int8), constant(deviation / 74, n))
    if name == "wint4":
        return Int4Weight(integers(n, k // 2), constant(deviation / 4.6, n))
    if name == "grouped4":
        words = torch.randint(-(2**31), 2**31, (*lead, k // 8, n), dtype=torch.int64, device=device).to(torch.int32)
        zeros = torch.full((*lead, k // GROUPED, n), 8, dtype=torch.uint8, device=device)
        return GroupedWeight(words, zeros, constant(deviation / 4.6, k // GROUPED, n, kind=torch.float16), bits=4)
    if name.startswith("bitplane"):
        planes = int(name.removeprefix("bitplane"))
        words = torch.randint(-(2**31), 2**31, (*lead, k // 32, planes, n), dtype=torch.int64, device=device)
        levels = [2.0**i for i in range(planes)]
        factor = deviation / (sum(level**2 for level in levels) / 4) ** 0.5
        rows = [*levels, -sum(levels) / 2]  # c1 ... ck, then c0, so that the mean is 0
        coefficients = torch.tensor(rows, dtype=torch.bfloat16, device=device).mul_(factor).unsqueeze(-1)
        shape = (*lead, k // GROUP, planes + 1, n)
        return BitplaneWeight(words.to(torch.int32), coefficients.expand(shape).contiguous())
    if name != "wint2":
        raise ValueError(f"no random weights in format {name!r}")
    code_scale, code_zp = (constant(value, n, kind=torch.float32) for value in (128.0, 17.0))
    return CcqWeight(
        codes=integers(k // 4, n),
        group_scales=integers(-(-k // 128), n) | 0x33,
        super_scales=constant(deviation / CCQ_DEVIATION, n, kind=torch.bfloat16),
        code_scale=code_scale if one_codebook else code_scale - torch.rand_like(code_scale) * 28,
        code_zp=code_zp if one_codebook else code_zp + torch.rand_like(code_zp) * 100,
        row_order="plain",
    )


class RandomWeights:
    """A `engine.layers.weights.WeightSource` for one rank.

    Args:
        model: for the shapes.
        formats: of every part.
        device: compute device.
        dtype: compute dtype.
        one_codebook: see `random_weight`.
    """

    def __init__(
        self,
        model: ModelConfig,
        formats: QuantizationConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        one_codebook: bool = True,
    ) -> None:
        self._model = model
        self._formats = formats
        self._device = device
        self._dtype = dtype
        self._one_codebook = one_codebook
        torch.manual_seed(0)
        self._table = torch.randn(model.vocab_size, model.hidden_size, dtype=dtype, device=device)

    def embedding(self) -> Tensor:
        return self._table

    def head(self) -> Weight:
        if self._model.tie_word_embeddings:
            return DenseWeight(self._table)
        return self._matrix(Bf16(), self._model.hidden_size, self._model.vocab_size)

    def norm(self, name: str) -> Tensor:
        return torch.ones(self._model.hidden_size, dtype=self._dtype, device=self._device)

    def qkv(self, layer: int) -> Weight:
        heads = self._model.num_attention_heads + 2 * self._model.num_key_value_heads
        return self._of("attention", layer, self._model.hidden_size, heads * self._model.head_dim)

    def qkv_bias(self, layer: int) -> Tensor | None:
        return None

    def attention_output(self, layer: int) -> Weight:
        width = self._model.num_attention_heads * self._model.head_dim
        return self._of("attention", layer, width, self._model.hidden_size)

    def gate_up(self, layer: int, *, shared: bool = False) -> Weight:
        return self._of(_part(shared), layer, self._model.hidden_size, 2 * self._width(shared))

    def down(self, layer: int, *, shared: bool = False) -> Weight:
        return self._of(_part(shared), layer, self._width(shared), self._model.hidden_size)

    def router(self, layer: int) -> tuple[Tensor, Tensor | None]:
        hidden, experts = self._model.hidden_size, self._experts()
        gate = torch.randn(experts, hidden, device=self._device).mul_(hidden**-0.5)
        return gate, torch.zeros(experts, device=self._device)

    def expert_gate_up(self, layer: int) -> Weight:
        hidden, width = self._model.hidden_size, self._expert_width()
        return self._of("experts", layer, hidden, 2 * width, experts=self._experts())

    def expert_down(self, layer: int) -> Weight:
        hidden, width = self._model.hidden_size, self._expert_width()
        return self._of("experts", layer, width, hidden, experts=self._experts())

    def close(self) -> None:
        pass

    def _of(self, part: Part, layer: int, k: int, n: int, *, experts: int | None = None) -> Weight:
        return self._matrix(self._formats.format(part, layer), k, n, experts=experts)

    def _matrix(self, weight_format: WeightFormat, k: int, n: int, *, experts: int | None = None) -> Weight:
        return random_weight(
            weight_format.name,
            k,
            n,
            experts=experts,
            device=self._device,
            dtype=self._dtype,
            one_codebook=self._one_codebook,
        )

    def _width(self, shared: bool) -> int:
        moe = self._model.moe
        return moe.shared_intermediate_size if shared and moe else self._model.intermediate_size

    def _experts(self) -> int:
        return self._model.moe.num_experts if self._model.moe else 0

    def _expert_width(self) -> int:
        return self._model.moe.intermediate_size if self._model.moe else 0


def _part(shared: bool) -> Part:
    return "shared_experts" if shared else "mlp"
