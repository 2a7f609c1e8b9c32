"""What the matrices of a layer are fed with, stage by stage, in the model as quantized so far and in the original.

A layer is quantized in four stages: qkv_proj, o_proj, the first projections of the feed-forward part, the second ones.
Before each stage the calibration tokens run through the layer again, so that every matrix is fitted to inputs that
carry the errors of all matrices before it, those of its own layer too.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from engine.compress.gram import Gram
from engine.compress.layer import LayerWeights
from engine.compress.modules import Matrix
from engine.layers.attention import Attention, AttentionInputs
from engine.layers.linear import GatedMLP, Linear
from engine.layers.moe import SparseMoE
from engine.models.decoder import DecoderLayer
from kernels import ops
from kernels.operands import DenseWeight

Stage = Literal["qkv", "output", "first", "second"]
STAGES: tuple[Stage, ...] = ("qkv", "output", "first", "second")


def stage_of(matrix: Matrix) -> Stage:
    """The stage in which a matrix is quantized."""
    match matrix.name.rpartition(".")[2]:
        case "qkv_proj":
            return "qkv"
        case "o_proj":
            return "output"
        case "up_gate_proj":
            return "first"
    return "second"


def stages(matrices: Iterable[Matrix]) -> list[tuple[Stage, list[Matrix]]]:
    """The matrices of a layer by stage, in the order of the stages."""
    of: dict[Stage, list[Matrix]] = {stage: [] for stage in STAGES}
    for matrix in matrices:
        of[stage_of(matrix)].append(matrix)
    return list(of.items())


@dataclass(frozen=True, slots=True)
class ObserveOptions:
    """What to gather.

    Attributes:
        per_expert_inputs: the first projections of the routed experts have sums each, over the tokens routed to them;
            otherwise they share those of all tokens.
        weight_by_routing: an expert's tokens count by the square of their routing weight, as their errors do in the
            layer's output.
        match_original: aim at the outputs of the original model, not at the own weights (:mod:`engine.compress.gram`).
        absorb_drift: with that, let what writes to the residual stream make up for what the stream lacks.
    """

    per_expert_inputs: bool = True
    weight_by_routing: bool = True
    match_original: bool = True
    absorb_drift: bool = True


class Observer:
    """Gathers the sums of one stage of one layer.

    Args:
        stage: which one.
        current: the layer as quantized so far, built from ``current_weights``.
        current_weights: see there.
        original: the layer of the original model, with its weights; None if its inputs are not wanted.
        options: what to gather.
    """

    def __init__(
        self,
        stage: Stage,
        current: DecoderLayer,
        current_weights: LayerWeights,
        original: tuple[DecoderLayer, LayerWeights] | None,
        options: ObserveOptions,
    ) -> None:
        self._stage = stage
        self._options = options
        self._current = _Side(current, current_weights)
        self._original = None if original is None else _Side(*original)
        self._grams: dict[str, Gram] = defaultdict(Gram)

    def gram(self, matrix: Matrix) -> Gram:
        """What was gathered for a matrix of the stage."""
        return self._grams[self.key(matrix)]

    def key(self, matrix: Matrix) -> str:
        """The same for matrices that share their sums."""
        if self._stage == "first" and matrix.expert is not None and self._options.per_expert_inputs:
            return f"mlp.experts.{matrix.expert}"
        return matrix.inputs

    def add(self, x: Tensor, original: Tensor | None, cache: ops.LayerCache, inputs: AttentionInputs) -> None:
        """Add tokens, given the residual stream [T, H] before the layer in both models."""
        ours = self._current
        theirs = self._original
        if self._stage == "qkv":
            after = None if theirs is None or original is None else theirs.attention_input(original)
            self._grams["self_attn.qkv_proj"].add(ours.attention_input(x), after)
            return
        if self._stage == "output":
            before = ours.output_input(x, cache, inputs)
            after = None if theirs is None or original is None else theirs.output_input(original, cache, inputs)
            self._grams["self_attn.o_proj"].add(before, after, lacking=self._lacking(x, original))
            return
        x = ours.attend(x, cache, inputs)
        n, m = ours.layer.post_attention_norm(x), None
        if theirs is not None and original is not None:
            original = theirs.attend(original, cache, inputs)
            m = theirs.layer.post_attention_norm(original)
        lacking = self._lacking(x, original)
        if isinstance(ours.layer.mlp, SparseMoE):
            self._add_experts(ours.layer.mlp, n, m, lacking)
        elif self._stage == "first":
            self._grams["mlp"].add(n, m)
        else:
            inner = _inner(ours.dense(), None if theirs is None else theirs.dense(), n, m)
            self._grams["mlp.down_proj"].add(*inner, lacking=lacking)

    def _lacking(self, x: Tensor, original: Tensor | None) -> Tensor | None:
        """What the residual stream [T, H] lacks, if the next matrix shall make up for it."""
        return None if original is None or not self._options.absorb_drift else original - x

    def _add_experts(self, moe: SparseMoE, n: Tensor, m: Tensor | None, lacking: Tensor | None) -> None:
        theirs = self._original
        if moe.shared is not None and self._stage == "second":
            shared = None if theirs is None else theirs.shared()
            self._grams["mlp.shared_experts.down_proj"].add(*_inner(moe.shared, shared, n, m))
        if self._stage == "first":
            self._grams["mlp"].add(n, m)
            if not self._options.per_expert_inputs:
                return
        weights, ids = ops.route(n, moe.gate, moe.bias, top_k=moe.top_k, norm_min=moe.norm_min)  # [T, k] each
        for number, expert in enumerate(self._current.experts):
            rows, places = (ids == number).nonzero(as_tuple=True)
            if not len(rows):
                continue
            counted = weights[rows, places].square() if self._options.weight_by_routing else None
            mine, same = n[rows], None if m is None else m[rows]  # [t, H]
            if self._stage == "first":
                self._grams[f"mlp.experts.{number}"].add(mine, same, counted)
            else:
                inner = _inner(expert, None if theirs is None else theirs.experts[number], mine, same)
                # A token's routing weights add up to 1, so if all its experts add d, the layer adds d.
                missing = None if lacking is None else lacking[rows]
                self._grams[f"mlp.experts.{number}.down_proj"].add(*inner, counted, missing)


class _Side:
    """A layer of one of the two models, up to the inputs of each stage."""

    def __init__(self, layer: DecoderLayer, weights: LayerWeights) -> None:
        self.layer = layer
        self.experts: list[GatedMLP] = []
        if isinstance(layer.mlp, SparseMoE):
            gate_up, down = weights.experts()
            self.experts = [GatedMLP(_linear(one), _linear(two)) for one, two in zip(gate_up, down, strict=True)]

    def attention_input(self, x: Tensor) -> Tensor:
        return self.layer.input_norm(x)

    def output_input(self, x: Tensor, cache: ops.LayerCache, inputs: AttentionInputs) -> Tensor:
        attention: Attention = copy.copy(self.layer.attention)
        seen: list[Tensor] = []
        attention.output = _Seen(attention.output, seen)
        attention(self.layer.input_norm(x), cache, inputs)
        return seen[0]

    def attend(self, x: Tensor, cache: ops.LayerCache, inputs: AttentionInputs) -> Tensor:
        return x + self.layer.attention(self.layer.input_norm(x), cache, inputs)

    def dense(self) -> GatedMLP:
        if isinstance(self.layer.mlp, SparseMoE):
            raise TypeError("a layer with routed experts has no dense MLP")
        return self.layer.mlp

    def shared(self) -> GatedMLP | None:
        return self.layer.mlp.shared if isinstance(self.layer.mlp, SparseMoE) else None


class _Seen(Linear):
    """A linear that keeps its inputs."""

    def __init__(self, linear: Linear, seen: list[Tensor]) -> None:
        self.weight = linear.weight
        self.bias = linear.bias
        self._seen = seen

    def __call__(self, x: Tensor) -> Tensor:
        self._seen.append(x)
        return super().__call__(x)


def _inner(ours: GatedMLP, theirs: GatedMLP | None, n: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the second projection is fed with, in both models."""
    after = None if theirs is None or m is None else ops.silu_and_mul(theirs.gate_up(m))
    return ops.silu_and_mul(ours.gate_up(n)), after


def _linear(weight: Tensor) -> Linear:
    return Linear(DenseWeight(weight), dtype=weight.dtype, device=weight.device)
