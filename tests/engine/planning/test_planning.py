"""Known answers, and plans that agree with what an engine takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError, UnsupportedError
from engine.execution.kv_cache import allocate
from engine.layers.attention import heads_per_rank
from engine.planning.advice import arrange, offers
from engine.planning.cards import CARDS, find_card, find_stock
from engine.planning.families import FAMILIES, find_model
from engine.planning.layouts import LAYOUTS, find_layout
from engine.planning.plan import Demand, fit, fits, least
from engine.planning.weights import weigh
from engine.quantization.config import QuantizationConfig
from engine.quantization.served import as_served

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny"
ERNIE = FAMILIES["ernie-4.5-300b-a47b"]
QWEN = FAMILIES["qwen2.5-72b"]


def test_baidus_checkpoint_has_the_published_size() -> None:
    assert weigh(ERNIE, find_layout("wint2", ERNIE)).total == pytest.approx(93.82e9, rel=1e-4)


def test_a_token_of_the_cache() -> None:
    one = fit(ERNIE, find_layout("wint2", ERNIE), Demand(1024), card=CARDS["H200-141G"], size=1)
    assert one.token_bytes == 221_184
    assert weigh(ERNIE, find_layout("bf16", ERNIE)).parameters == pytest.approx(299.48e9, rel=1e-3)
    assert weigh(ERNIE, find_layout("bf16", ERNIE)).active == pytest.approx(47.1e9, rel=1e-2)  # embedding rows aside


@pytest.mark.parametrize(("layout", "size"), [("wint8", 8), ("wint4", 4), ("wint2", 2)])
@pytest.mark.parametrize("card", ["A100-80G", "H100-80G"])
def test_cards_of_80_gb_for_the_300b(layout: str, size: int, card: str) -> None:
    chosen = least(fits(ERNIE, find_layout(layout, ERNIE), Demand(32768), card=CARDS[card]))
    assert chosen is not None
    assert chosen.tensor_parallel_size == size


@pytest.mark.parametrize("card", ["H20-141G", "H200-141G"])
def test_two_bits_fit_one_card_of_141_gb(card: str) -> None:
    assert fit(ERNIE, find_layout("wint2", ERNIE), Demand(131072), card=CARDS[card], size=1).fits


@pytest.mark.parametrize("card", ["A100-80G", "H100-80G"])
def test_tight_fits_one_card_of_80_gb(card: str) -> None:
    engine = EngineConfig(model="", gpu_memory_utilization=0.99, max_num_seqs=8, max_num_batched_tokens=1024)
    demand = Demand(16384, 1, "int8")
    assert fit(ERNIE, find_layout("tight", ERNIE), demand, card=CARDS[card], size=1, engine=engine).fits


def test_qwen_fits_one_card_of_24_gb() -> None:
    engine = EngineConfig(model="", gpu_memory_utilization=0.97, max_num_seqs=8, max_num_batched_tokens=1024)
    layout = find_layout("bpdq", QWEN, planes=2, group_size=256)
    for card in ("4090-24G", "3090-24G"):
        assert fit(QWEN, layout, Demand(4096, 1, "int8"), card=CARDS[card], size=1, engine=engine).fits


def checkpoint_config(name: str) -> ModelConfig:
    return ModelConfig.from_folder(EXAMPLES / name)


def bytes_of(value: Any) -> int:
    """Of all tensors in a weight."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if dataclasses.is_dataclass(value):
        return sum(bytes_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, list | tuple):
        return sum(bytes_of(item) for item in value)
    return 0


def loaded_bytes(folder: Path, model: ModelConfig, size: int, options: dict[str, Any]) -> int:
    """Of what rank 0 of an engine on a GPU is given: packed as stored, the rest in bf16."""
    formats = as_served(
        QuantizationConfig.from_json(model.quantization), on_load=options.get("quantization"), planes=None
    )
    weights = ShardedWeights(
        folder, model, rank=0, world_size=size, dtype=torch.bfloat16, device=torch.device("cpu"), quantization=formats
    )
    total = bytes_of(weights.embedding()) + bytes_of(weights.norm("norm"))
    if not model.tie_word_embeddings:
        total += bytes_of(weights.head())
    for layer in range(model.num_hidden_layers):
        total += bytes_of(weights.norm(f"layers.{layer}.input_layernorm"))
        total += bytes_of(weights.norm(f"layers.{layer}.post_attention_layernorm"))
        total += bytes_of(weights.qkv(layer)) + bytes_of(weights.attention_output(layer))
        if model.is_moe_layer(layer):
            total += bytes_of(list(weights.router(layer)))
            total += bytes_of(weights.expert_gate_up(layer)) + bytes_of(weights.expert_down(layer))
            if model.moe is not None and model.moe.num_shared_experts:
                total += bytes_of(weights.gate_up(layer, shared=True)) + bytes_of(weights.down(layer, shared=True))
        else:
            total += bytes_of(weights.gate_up(layer)) + bytes_of(weights.down(layer))
    weights.close()
    return total


@pytest.mark.parametrize(
    ("folder", "layout", "options"),
    [
        ("bf16", "stored", {}),
        ("2bits", "stored", {}),
        ("bf16", "wint8", {"quantization": "wint8"}),
        ("bf16", "wint4", {"quantization": "wint4"}),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_weights_are_what_an_engine_takes(folder: str, layout: str, options: dict[str, Any], size: int) -> None:
    model = checkpoint_config(folder)
    planned = weigh(model, find_layout(layout, model), size).total
    assert planned == pytest.approx(loaded_bytes(EXAMPLES / folder, model, size, options), rel=0.03)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_cache_is_what_an_engine_takes(kv_dtype: str, size: int) -> None:
    model = checkpoint_config("bf16")
    planned = fit(model, find_layout("bf16", model), Demand(64, 1, kv_dtype), card=CARDS["3090-24G"], size=size)
    _, kv_heads = heads_per_rank(model, size)
    dtype = torch.int8 if kv_dtype == "int8" else torch.bfloat16
    cache = allocate(model, kv_heads, num_blocks=4, block_size=16, dtype=dtype, device=torch.device("cpu"))
    taken = sum(bytes_of(value) for layer in cache.layers for value in vars_of(layer))
    assert planned.token_bytes * 64 == taken


def vars_of(layer: Any) -> list[Any]:
    return [getattr(layer, field.name) for field in dataclasses.fields(layer)]


def test_what_a_decode_step_reads() -> None:
    weights = weigh(ERNIE, find_layout("wint2", ERNIE))
    dense = weights.total - weights.experts - weights.lookup
    assert weights.read(1, ERNIE) == pytest.approx(dense + weights.experts / 8)
    assert weights.read(10**6, ERNIE) == pytest.approx(dense + weights.experts)


@pytest.mark.parametrize("context", [1024, 32768, 131072])
def test_limits_count_what_attention_computes(context: int) -> None:
    """From the published shapes: 54 layers, 3 of them dense, 64 heads and 8 kv heads of 128, 8 experts a token."""
    linears = 54 * 8192 * 128 * (64 + 8 + 8 + 64) + 3 * 3 * 8192 * 28672 + 51 * 8 * 3 * 8192 * 3584
    demand = Demand(context, 512, "int8")
    found = fit(ERNIE, find_layout("wint2", ERNIE), demand, card=CARDS["H20-141G"], size=8)
    # Scores and values: 2 products of 2 operations; a prompt's token sees half of the prompt.
    prefill = 2 * linears + 54 * 4 * 64 * 128 * context / 2
    assert found.prefill_limit == pytest.approx(8 * 148e12 / prefill, rel=0.01)
    decode = 2 * (linears + 103424 * 8192) + 54 * 4 * 64 * 128 * context
    read = found.weights.total - found.weights.lookup + 512 * context * 54 * 2 * (128 + 2)  # one kv head a rank
    seconds = max(read / 4e12, 512 * decode / (8 * 148e12))
    assert found.decode_limit == pytest.approx(512 / seconds, rel=0.01)


def test_parts_of_the_300b() -> None:
    wint2, tight = (weigh(ERNIE, find_layout(name, ERNIE)) for name in ("wint2", "tight"))
    assert wint2.parts["experts, wint2"] == pytest.approx((66.24 + 2.07 + 0.46) * 1e9, abs=0.01e9)
    assert wint2.parts["experts, wint4"] == pytest.approx(11.27e9, abs=0.02e9)
    moe = ERNIE.moe
    assert moe is not None
    # One codebook a matrix: codes, group scales, and a super scale of each column.
    columns = 51 * moe.num_experts * (2 * moe.intermediate_size + ERNIE.hidden_size)
    assert tight.experts - 2 * columns == pytest.approx(74.1e9, abs=0.05e9)
    assert tight.total == pytest.approx(80.35e9, abs=0.02e9)


@given(
    layout=st.sampled_from([name for name in LAYOUTS if name != "stored"]),
    card=st.sampled_from(sorted(CARDS)),
    context=st.sampled_from([1024, 8192, 131072]),
    concurrency=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_offers_hold_the_demand(layout: str, card: str, context: int, concurrency: int) -> None:
    demand = Demand(context, concurrency, "int8")
    for offer in offers(ERNIE, find_layout(layout, ERNIE), demand, cards=[CARDS[card]]):
        assert offer.fit.fits
        assert offer.engines * offer.fit.largest_concurrency >= concurrency
        assert offer.fit.decode_limit > 0


@given(
    stock=st.dictionaries(st.sampled_from(sorted(CARDS)), st.integers(1, 20), min_size=1, max_size=3),
    context=st.sampled_from([1024, 8192, 131072]),
    concurrency=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_cards_that_are_there_hold_what_they_can(stock: dict[str, int], context: int, concurrency: int) -> None:
    layout, engine = find_layout("wint2", ERNIE), EngineConfig(model="", max_num_seqs=256)
    demand = Demand(context, concurrency, "int8")
    owned = {CARDS[name]: count for name, count in stock.items()}
    found = arrange(ERNIE, layout, demand, stock=owned, engine=engine)
    for offer in found:
        assert offer.fit.fits
        assert offer.cards <= owned[offer.fit.card]
    most = sum(
        max(
            (
                count // one.tensor_parallel_size * one.largest_concurrency
                for one in fits(ERNIE, layout, Demand(context, 1, "int8"), card=card, engine=engine)
            ),
            default=0,
        )
        for card, count in owned.items()
    )
    assert sum(offer.sequences for offer in found) >= min(concurrency, most)


def test_of_cards_that_are_there_engines_are_small() -> None:
    demand = Demand(32768, 40)
    (offer,) = arrange(ERNIE, find_layout("wint2", ERNIE), demand, stock={CARDS["H20-141G"]: 8})
    assert (offer.engines, offer.fit.tensor_parallel_size) == (8, 1)


def test_more_ranks_hold_more() -> None:
    sizes = fits(ERNIE, find_layout("wint2", ERNIE), Demand(1024), card=CARDS["H20-96G"])
    tokens = [one.kv_tokens for one in sizes]
    assert tokens == sorted(tokens)


def test_a_card_can_be_described() -> None:
    card = find_card("80GB, 2.0TB/s, 312TFLOPs")
    assert (card.memory_bytes, card.bandwidth, card.flops) == (80 * 10**9, 2e12, 312e12)
    assert find_card("h100").name == "H100-80G"
    assert find_card("RTX 4090").name == "4090-24G"
    assert find_stock("8 x H20-141G") == (CARDS["H20-141G"], 8)
    assert find_stock("8xh100") == (CARDS["H100-80G"], 8)
    assert find_stock("H100") == (CARDS["H100-80G"], None)
    assert find_stock("2x80GB, 2.0TB/s, 312TFLOPs") == (find_card("80GB, 2.0TB/s, 312TFLOPs"), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [("A100", ["A100-40G or A100-80G"]), ("5090", ["5090", "H100-80G"]), ("0GB, 1TB/s, 1TFLOPs", ["above 0"])],
)
def test_unclear_cards_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        find_card(text)
    assert all(word in str(refused.value) for word in words)


def test_wrong_names_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"Built-in models: ernie-4\.5-300b-a47b"):
        find_model(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="format"):
        find_layout("wint3", ERNIE)
    with pytest.raises(ConfigError, match="experts"):
        find_layout("wint2", QWEN)
    with pytest.raises(UnsupportedError):
        fit(ERNIE, find_layout("wint2", ERNIE), Demand(1024), card=CARDS["H20-96G"], size=3)
