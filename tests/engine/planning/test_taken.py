"""What a plan says an engine takes of a GPU is what its weights, its cache and its largest step take there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from on_meta import BLOCK_SIZE, BLOCKS, gpu_decoder, held_bytes, make_cache, step, to_meta

from engine.config import EngineConfig, ModelConfig
from engine.execution.sampler import sampling_bytes
from engine.planning.cards import CARDS
from engine.planning.families import FAMILIES
from engine.planning.layouts import find_layout
from engine.planning.plan import Demand, fit

SMALLER: dict[str, dict[str, Any]] = {
    "ernie-4.5-0.3b": {"num_hidden_layers": 3, "vocab_size": 8192},
    "ernie-4.5-21b-a3b": {
        "num_hidden_layers": 6,
        "vocab_size": 8192,
        "hidden_size": 1280,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "moe": {"num_experts": 8, "num_shared_experts": 1, "intermediate_size": 512, "layer_end_index": 5},
    },
}


def smaller(name: str) -> ModelConfig:
    """A family's member with fewer of everything that costs time to make."""
    fields = FAMILIES[name].model_dump(exclude_none=True)
    changes = SMALLER[name]
    nested = {"moe": fields["moe"] | changes["moe"]} if "moe" in changes else {}
    return ModelConfig.model_validate(fields | changes | nested)


@pytest.mark.parametrize(
    ("name", "layout", "kv_dtype"),
    [
        ("ernie-4.5-0.3b", "bf16", "bf16"),
        ("ernie-4.5-0.3b", "wint8", "int8"),
        ("ernie-4.5-21b-a3b", "bf16", "bf16"),
        ("ernie-4.5-21b-a3b", "wint4", "bf16"),
        ("ernie-4.5-21b-a3b", "wint2", "int8"),
    ],
)
@pytest.mark.parametrize(("tokens", "seqs"), [(2048, 64), (512, 16)])
def test_a_plan_is_what_an_engine_takes(
    name: str, layout: str, kv_dtype: str, *, tokens: int, seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = smaller(name)
    engine = EngineConfig(model="", max_num_batched_tokens=tokens, max_num_seqs=seqs)
    chosen = find_layout(layout, model)
    planned = fit(model, chosen, Demand(1024, 1, kv_dtype), card=CARDS["3090-24G"], size=1, engine=engine)

    decoder = gpu_decoder(model, chosen, monkeypatch)
    weights = held_bytes(decoder)
    decoder = to_meta(decoder)
    cache = make_cache(model, torch.int8 if kv_dtype == "int8" else torch.bfloat16)
    with LiveBytes() as live:
        step(decoder, cache, [tokens // seqs] * seqs, monkeypatch)
    activations = max(live.peak, sampling_bytes(engine, model.vocab_size))

    assert planned.weights.total == pytest.approx(weights, rel=0.01)
    assert planned.token_bytes * BLOCKS * BLOCK_SIZE == held_bytes(cache)
    assert planned.activations == pytest.approx(activations, rel=0.03)
    total = planned.weights.total + planned.token_bytes * BLOCKS * BLOCK_SIZE + planned.activations
    assert total == pytest.approx(weights + held_bytes(cache) + activations, rel=0.03)
