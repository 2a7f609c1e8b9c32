"""How long a step takes on hardware, for the simulator. The router under test never sees any of this.

A roofline: weights are read once a step (of the experts, those that some token of the step chooses), multiplying takes
``2 * active parameters`` operations a token, the slower of the two counts; then keys and values are read, and the
attention of prompts multiplies ``4 * layers * heads * head_dim`` operations for each pair of a new token and one in its
context. Rates are *derived*, not measured: datasheet values times a share that is reached.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """What a model in 2 bits costs.

    Sizes of the 300B from ``gpu-budget``: experts at 2.0625 bits 74.1 GB, the other 12 B parameters at 4.25 bits
    6.4 GB, keys and values in int8 108 KiB a token. The 21B by the same rule from its config.json.
    """

    name: str
    active_parameters: float
    expert_bytes: float
    dense_bytes: float
    kv_bytes: float
    """Of a token in the cache."""
    attention_flops: float
    """Of a pair of a new token and one in its context."""
    experts: int = 64
    experts_per_token: int = 8


ERNIE_300B = Model("300b", 47.9e9, 74.1e9, 6.4e9, 108 * 1024, 4.0 * 54 * 64 * 128)
ERNIE_21B = Model("21b", 3.35e9, 5.26e9, 0.77e9, 28 * 1024, 4.0 * 28 * 20 * 128, experts_per_token=6)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Datasheet rates, and the share of them that is reached."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    """bf16, dense."""
    memory_bytes: float
    bandwidth_share: float
    compute_share: float


H20 = Accelerator("H20", 4.0e12, 148e12, 141e9, 0.7, 0.75)
"""Few operations for its bandwidth, so that a larger share of them is reached."""
A100 = Accelerator("A100", 2.04e12, 312e12, 80e9, 0.7, 0.55)


@dataclass(frozen=True, slots=True)
class Timing:
    """Step time of one engine, in seconds."""

    overhead_s: float
    """Launches, sampling, and between tensor-parallel ranks the all-reduces of a small step."""
    dense_s: float
    """Reading the weights that every step reads."""
    experts_s: float
    """Reading all experts."""
    miss: float
    """Share of the experts that one token does not choose."""
    token_s: float
    context_s: float
    """Reading a token of the cache."""
    pair_s: float

    def step_s(self, tokens: int, context: float, pairs: float) -> float:
        """A step of ``tokens`` tokens that reads ``context`` tokens of the cache.

        ``pairs``: over the prompts' tokens, of those and the tokens that they attend to.
        """
        reading = self.dense_s + self.experts_s * (1.0 - self.miss**tokens)
        return self.overhead_s + max(reading, self.token_s * tokens) + self.context_s * context + self.pair_s * pairs


def timing(model: Model, accelerator: Accelerator, *, ranks: int = 1, speed: float = 1.0) -> Timing:
    """The step time of ``ranks`` tensor-parallel accelerators; ``speed`` below 1 for one that is slower than others."""
    bandwidth = accelerator.bytes_per_s * accelerator.bandwidth_share * ranks * speed
    compute = accelerator.flops_per_s * accelerator.compute_share * ranks * speed
    return Timing(
        overhead_s=(0.002 + (0.004 if ranks > 1 else 0.0)) / speed,
        dense_s=model.dense_bytes / bandwidth,
        experts_s=model.expert_bytes / bandwidth,
        miss=1.0 - model.experts_per_token / model.experts,
        token_s=2.0 * model.active_parameters / compute,
        context_s=model.kv_bytes / bandwidth,
        pair_s=model.attention_flops / compute,
    )


def kv_blocks(model: Model, accelerator: Accelerator, *, ranks: int = 1, block_size: int) -> int:
    """Blocks that 0.9 of the memory leaves beside the weights and 2 GB a rank of activations."""
    room = ranks * (accelerator.memory_bytes * 0.9 - 2e9) - model.expert_bytes - model.dense_bytes
    return int(room / (model.kv_bytes * block_size))
