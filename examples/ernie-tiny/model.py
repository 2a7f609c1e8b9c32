"""ERNIE-4.5's mixture-of-experts decoder in plain torch, made for training on a CPU.

Parameters carry the names of a `-PT` checkpoint; only the experts differ, stacked to [E, out, in]
so that one grouped product serves a layer. Weights and the residual stream are fp32, products are
made in `dtype`. `export.py` reads and writes folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the model, named as in its config.json."""

    vocab_size: int = 8192
    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    moe_num_experts: int = 16
    moe_k: int = 4
    moe_layer_start_index: int = 1
    moe_norm_min: float = 1e-12
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


ROUNDING = 64  # rows; oneDNN prepares a kernel for every new number of rows, so experts get few different ones


class Dispatch(torch.autograd.Function):
    """`rows[source]`, where row i went to place slots[i]; gathers both ways, since scattering is slow."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        """rows [tokens * k, hidden] to [places, hidden]."""
        ctx.save_for_backward(slots)
        return rows[source]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """What came back to the places that are not padding."""
        (slots,) = ctx.saved_tensors
        return grads[0][slots], None, None


class Collect(torch.autograd.Function):
    """`places[slots]`; each place is read at most once."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, slots: Tensor) -> Tensor:
        """[places, hidden] to [tokens * k, hidden]."""
        ctx.save_for_backward(slots)
        ctx.count = len(places)
        return places[slots]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Zero where the place is padding."""
        (slots,) = ctx.saved_tensors
        back = grads[0].new_zeros(ctx.count, grads[0].shape[1])
        back[slots] = grads[0]
        return back, None


def placement(chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each (token, choice) goes so that every expert's rows are together, their number rounded up.

    Returns the source of each place, the place of each row, where each expert ends, and the loads.
    """
    order = chosen.argsort(stable=True)
    loads = F.one_hot(chosen, count).sum(0)
    ends = (-(-loads // ROUNDING) * ROUNDING).cumsum(0)
    ends[-1] = len(chosen) + count * ROUNDING  # the last expert takes what is left, so that the total is fixed
    begins = ends.roll(1)
    begins[0] = 0
    shift = begins - (loads.cumsum(0) - loads)
    places = torch.arange(len(chosen), device=chosen.device) + shift[chosen[order]]
    slots = torch.empty_like(order)
    slots[order] = places
    source = order.new_zeros(len(chosen) + count * ROUNDING)
    source[places] = order
    return source, slots, ends.to(torch.int32), loads


class Norm(nn.Module):
    """RMSNorm, statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square, and scale."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Linear(nn.Module):
    """An [out, in] weight without bias, multiplied in the dtype of the input."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, self.weight.to(x.dtype))


def rotations(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2] of the interleaved rotary embedding."""
    steps = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * shape.rope_theta**-steps
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x [batch, tokens, heads, head_dim] by their angles."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]  # [tokens, 1, head_dim / 2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with shared key and value heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, std = shape.hidden_size, shape.hidden_size**-0.5
        self.q_proj = Linear(hidden, shape.num_attention_heads * shape.head_dim, std)
        self.k_proj = Linear(hidden, shape.num_key_value_heads * shape.head_dim, std)
        self.v_proj = Linear(hidden, shape.num_key_value_heads * shape.head_dim, std)
        self.o_proj = Linear(shape.num_attention_heads * shape.head_dim, hidden, std / shape.num_hidden_layers)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, tokens, hidden]."""
        heads = (*x.shape[:2], -1, self.shape.head_dim)
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        q = rotate(self.q_proj(x).view(heads), cos, sin).transpose(1, 2)  # [batch, heads, tokens, head_dim]
        k = rotate(self.k_proj(x).view(heads), cos, sin).transpose(1, 2).repeat_interleave(groups, 1)
        v = self.v_proj(x).view(heads).transpose(1, 2).repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class Dense(nn.Module):
    """The SwiGLU block of layer 0."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = Linear(hidden, inner, hidden**-0.5)
        self.up_proj = Linear(hidden, inner, hidden**-0.5)
        self.down_proj = Linear(inner, hidden, inner**-0.5 / shape.num_hidden_layers)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer, stacked."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        count, hidden, inner = shape.moe_num_experts, shape.hidden_size, shape.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) * inner**-0.5 / shape.num_hidden_layers)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [tokens * k, hidden] sorted by expert; expert e owns the rows before ends[e]."""
        gate_up = F.grouped_mm(rows, self.gate_up_proj.to(rows.dtype).transpose(1, 2), offs=ends)
        gate, up = gate_up.chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.to(rows.dtype).transpose(1, 2), offs=ends)


class Statics(nn.Module):
    """The bias that steers the choice of experts; `balance` moves it, gradients do not."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.e_score_correction_bias = nn.Parameter(torch.zeros(1, count), requires_grad=False)


class Mixture(nn.Module):
    """A softmax router over SwiGLU experts, balanced without an auxiliary loss (arXiv:2408.15664)."""

    loads: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = Linear(shape.hidden_size, shape.moe_num_experts, 0.02)
        self.moe_statics = Statics(shape.moe_num_experts)
        self.experts = Experts(shape)
        self.register_buffer("loads", torch.zeros(shape.moe_num_experts), persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [batch, tokens, hidden] in fp32, since the router is; the experts compute in `dtype`."""
        shape, count = self.shape, self.shape.moe_num_experts
        flat = x.flatten(0, 1)
        odds = self.gate(flat).softmax(-1)  # [tokens, experts]
        chosen = (odds.detach() + self.moe_statics.e_score_correction_bias).topk(shape.moe_k, -1).indices
        weights = odds.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(shape.moe_norm_min)

        source, slots, ends, loads = placement(chosen.flatten(), count)
        with torch.no_grad():
            self.loads += loads
        rows = flat.to(dtype).repeat_interleave(shape.moe_k, 0)
        rows = self.experts(Dispatch.apply(rows, source, slots), ends)
        rows = Collect.apply(rows, slots).unflatten(0, (-1, shape.moe_k))  # [tokens, k, hidden]
        return (rows * weights.to(dtype)[..., None]).sum(1).view(x.shape)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mixture(shape) if index >= shape.moe_layer_start_index else Dense(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """x [batch, tokens, hidden], the fp32 residual stream."""
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), cos, sin)
        inner = self.post_attention_layernorm(x)
        return x + (self.mlp(inner, dtype) if isinstance(self.mlp, Mixture) else self.mlp(inner.to(dtype)))


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states [batch, tokens, hidden] of ids [batch, tokens]."""
        x = self.embed_tokens(ids)
        cos, sin = rotations(self.shape, ids.shape[1], ids.device)
        for layer in self.layers:
            x = layer(x, cos, sin, dtype)
        return self.norm(x).to(dtype)


class Ernie(nn.Module):
    """The causal language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size, 0.01)

    def forward(self, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits [batch, tokens, vocabulary]."""
        return self.lm_head(self.model(ids, dtype))

    def mixtures(self) -> list[Mixture]:
        """The mixture blocks, in the order of the layers."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, Mixture)]

    @torch.no_grad()
    def balance(self, rate: float) -> Tensor:
        """Move each bias against its expert's load since the last call; returns the shares [layers, experts]."""
        shares = torch.stack([mixture.loads / mixture.loads.sum() for mixture in self.mixtures()])
        for mixture, share in zip(self.mixtures(), shares, strict=True):
            mixture.moe_statics.e_score_correction_bias += rate * (share.mean() - share).sign()
            mixture.loads.zero_()
        return shares
