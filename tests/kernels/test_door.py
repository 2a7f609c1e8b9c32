"""The door refuses what a kernel would read nonsense from, and says which argument it is."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from kernels import choice, ops
from kernels.cache import LayerCache
from kernels.operands import DenseWeight

CPU = torch.device("cpu")
T, H, D = 3, 32, 16


def dense(n: int, k: int, *lead: int) -> ops.Prepared:
    return ops.prepare(DenseWeight(torch.randn(*lead, n, k)), dtype=torch.float32, device=CPU)


def cache() -> LayerCache:
    return LayerCache(*torch.zeros(2, 4, 4, 2, D))


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def good() -> dict[str, dict[str, Any]]:
    """Arguments that every operation takes."""
    x, weight = torch.randn(T, H), torch.ones(H)
    table = ops.rotary_table(torch.arange(T), torch.ones(D // 2))
    tables, starts, contexts = np.zeros((1, 1), np.int32), np.array([0, T], np.int32), np.array([T], np.int32)
    attention = {"block_tables": tables, "query_start": starts, "context_lens": contexts}
    metadata = ops.attention_metadata(**attention, block_size=4, dtype=torch.float32, device=CPU)
    qkv = torch.randn(T, 8, D)
    where = {"dtype": torch.float32, "device": CPU}
    return {
        "prepare": {"weight": DenseWeight(torch.ones(2, 2)), **where},
        "prepare_embedding": {"weight": DenseWeight(torch.ones(2, 2)), **where},
        "linear": {"x": x, "weight": dense(8, H), "bias": torch.zeros(8)},
        "embedding": {"ids": torch.arange(T), "table": torch.randn(8, H), "first_row": 0},
        "route": {"x": x, "gate": torch.randn(4, H), "bias": torch.zeros(4), "top_k": 2, "norm_min": 1e-9},
        "fused_moe": {
            "x": x, "gate_up": dense(16, H, 4), "down": dense(H, 8, 4), "weights": torch.ones(T, 2),
            "ids": torch.tensor([[0, 1]] * T),
        },
        "silu_and_mul": {"x": x},
        "rms_norm": {"x": x, "weight": weight, "eps": 1e-5},
        "add_rms_norm": {"x": x, "residual": x, "weight": weight, "eps": 1e-5},
        "rotary_table": {"positions": torch.arange(T), "inv_freq": torch.ones(D // 2)},
        "rotary": {"x": qkv, "table": table, "interleaved": True},
        "store_kv": {"k": qkv[:, :2], "v": qkv[:, 2:4], "cache": cache(), "slot_mapping": torch.arange(T)},
        "rotary_store_kv": {
            "qkv": qkv, "table": table, "cache": cache(), "slot_mapping": torch.arange(T), "num_heads": 4,
            "interleaved": True,
        },
        "attention_metadata": {**attention, "block_size": 4, **where},
        "decode_metadata": {
            "block_tables": int32(T, 1), "query_start": int32(T + 1), "context_lens": int32(T), "block_size": 4,
            "dtype": torch.float32,
        },
        "paged_attention": {"q": qkv[:, :4], "cache": cache(), "metadata": metadata, "scale": 1.0},
    }  # fmt: skip


WRONG_DTYPES = [
    ("linear", "x"), ("linear", "bias"), ("embedding", "ids"), ("embedding", "table"), ("route", "x"),
    ("route", "gate"), ("route", "bias"), ("fused_moe", "x"), ("fused_moe", "weights"), ("fused_moe", "ids"),
    ("silu_and_mul", "x"), ("rms_norm", "x"), ("rms_norm", "weight"), ("add_rms_norm", "residual"),
    ("add_rms_norm", "weight"), ("rotary_table", "positions"), ("rotary_table", "inv_freq"), ("rotary", "x"),
    ("store_kv", "k"), ("store_kv", "v"), ("store_kv", "slot_mapping"), ("rotary_store_kv", "qkv"),
    ("rotary_store_kv", "slot_mapping"), ("attention_metadata", "block_tables"), ("attention_metadata", "query_start"),
    ("attention_metadata", "context_lens"), ("decode_metadata", "block_tables"), ("decode_metadata", "query_start"),
    ("decode_metadata", "context_lens"), ("paged_attention", "q"),
]  # fmt: skip


def test_every_operation_is_documented_and_callable():
    arguments = good()
    assert set(arguments) == set(choice.OPERATIONS)
    for name, given in arguments.items():
        operation = getattr(ops, name)
        assert inspect.getdoc(operation)
        operation(**given)


@pytest.mark.parametrize(("name", "argument"), WRONG_DTYPES)
def test_a_wrong_dtype_is_an_error_that_names_the_argument(name, argument):
    given = good()[name]
    wrong = given[argument]
    given[argument] = wrong.astype(np.int64) if isinstance(wrong, np.ndarray) else wrong.to(torch.float64)
    with pytest.raises(TypeError, match=rf"^{argument} is (float64|int64); expected "):
        getattr(ops, name)(**given)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, argument in WRONG_DTYPES
        if (name != "attention_metadata" and argument not in ("x", "qkv", "k", "q", "ids", "positions", "block_tables"))
        or (name, argument) == ("fused_moe", "ids")
    ],
)
def test_a_tensor_on_another_device_is_an_error_that_names_it(name, argument):
    given = good()[name]
    given[argument] = given[argument].to("meta")
    with pytest.raises(ValueError, match=rf"^{argument} is on meta; expected it on cpu"):
        getattr(ops, name)(**given)


@pytest.mark.parametrize("name", ["store_kv", "rotary_store_kv", "paged_attention"])
def test_a_cache_of_another_dtype_or_device_is_named(name):
    given = good()[name]
    given["cache"] = LayerCache(*torch.zeros(2, 4, 4, 2, D, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^cache\.keys is float64; expected float32 or int8"):
        getattr(ops, name)(**given)
    given["cache"] = LayerCache(*torch.zeros(2, 4, 4, 2, D, device="meta"))
    with pytest.raises(ValueError, match=r"^cache\.keys is on meta"):
        getattr(ops, name)(**given)


@pytest.mark.parametrize(
    ("name", "argument", "said"),
    [
        ("linear", "x", r"x has 31 features; weight takes 32"),
        ("rms_norm", "x", r"x has 31 features; weight takes 32"),
        ("add_rms_norm", "x", r"x has 31 features; weight takes 32"),
        ("route", "x", r"x has 31 features; gate takes 32"),
        ("fused_moe", "x", r"x has 31 features; gate_up takes 32"),
        ("linear", "bias", r"bias has 7 features; weight takes 8"),
    ],
)
def test_features_that_do_not_fit_are_named(name, argument, said):
    given = good()[name]
    given[argument] = given[argument][..., :-1]
    with pytest.raises(ValueError, match=said):
        getattr(ops, name)(**given)


def test_what_a_gpu_would_get_is_told_without_one(monkeypatch):
    chosen = choice.Backend("gpu", "compute capability 9.0, and triton is installed")
    monkeypatch.setattr(choice, "backend", lambda device: chosen)
    rows = {row.subject: row for row in choice.describe(torch.device("cuda", 77))}
    for name in choice.OPERATIONS:
        assert rows[name].implementation.startswith("kernels.gpu") or "flash" in rows[name].implementation
    assert rows["fused_moe"].reason == chosen.reason
    for operand in ("CcqWeight", "Int4Weight", "Int8Weight", "BitplaneWeight", "GroupedWeight"):
        assert (rows[operand].implementation, rows[operand].reason) == ("packed", "decoded while multiplying")
    assert all(dataclasses.astuple(row) for row in rows.values())
