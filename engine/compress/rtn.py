"""Round to nearest: WINT8 and WINT4 with one absmax scale an output feature, in Paddle's bytes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.checkpoint import paddle_layout
from engine.compress.packed import PackedWeight
from engine.quantization.registry import make_format

_LARGEST = {8: 127, 4: 7}


def quantize(weight: Tensor, hessian: Tensor | None = None, *, bits: Literal[4, 8] = 8) -> PackedWeight:
    """Quantize a linear as ``paddle.nn.quant.weight_quantize`` does (weight_only_int8, weight_only_int4; arch 80).

    Values are rounded against the scale as it is stored (bf16), which Paddle does not do; that is a step's
    difference in a few values and less error.

    Args:
        weight: [out, in], in a multiple of 64, out of 2 (8 bits) or 4 (4 bits).
        hessian: taken for the encoders' common signature; rounding to nearest has no use for it.
        bits: 8 or 4.

    Raises:
        UnsupportedError: the shape has no Paddle layout.
    """
    out_features, in_features = weight.shape
    weight_format = make_format(f"wint{bits}")
    weight_format.tensors(in_features, out_features)
    largest = _LARGEST[bits]
    full = weight.float()
    scale = (full.abs().amax(dim=1) / largest).bfloat16()  # [out]
    divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    values = (full / divisor[:, None]).round().clamp(-largest, largest).to(torch.int8)
    encode = paddle_layout.encode_int8 if bits == 8 else paddle_layout.encode_int4
    return PackedWeight(
        weight_format=weight_format,
        shape=(out_features, in_features),
        tensors={"quant_weight": encode(values.T), "weight_scale": scale},
    )
