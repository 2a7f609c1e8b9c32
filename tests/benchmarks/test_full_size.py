"""Random weights have the bytes that the formats say, and both GPU benchmarks run at a toy size on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import full_size, kernels
from benchmarks.random_weights import RandomWeights, random_weight
from benchmarks.scales import LAYOUTS, MODELS
from engine.planning.layouts import find_layout
from engine.planning.weights import CODEBOOK_BYTES, weigh
from kernels.reference import dequantize

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["bf16", "wint8", "wint4", "wint2", "bitplane2", "bitplane4", "grouped4"])
@pytest.mark.parametrize("experts", [None, 2])
def test_random_weights_have_a_deviation_of_one_over_root_k(name, experts):
    weight = random_weight(name, 256, 96, experts=experts, device=CPU, dtype=torch.float32)
    dense = dequantize(weight, torch.float32)
    assert dense.shape == (*(() if experts is None else (experts,)), 96, 256)
    assert 0.6 < float(dense.std()) * 16 < 1.6


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_weights_take_the_bytes_of_the_plan(name):
    model = MODELS["tiny"]
    chosen, size = find_layout(name, model), 0
    weights = RandomWeights(model, chosen.formats, device=CPU, dtype=torch.bfloat16)

    def count(operand: object) -> int:
        tensors = (getattr(operand, field) for field in operand.__slots__)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    for layer in range(model.num_hidden_layers):
        if model.is_moe_layer(layer):
            size += count(weights.expert_gate_up(layer)) + count(weights.expert_down(layer))
    columns = 3 * model.moe.num_experts * (2 * model.moe.intermediate_size + model.hidden_size)
    codebooks = CODEBOOK_BYTES * columns if chosen.one_codebook else 0  # in the file, and not in the plan
    assert size == weigh(model, chosen).experts + codebooks


@pytest.mark.parametrize("benchmark", [full_size, kernels])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_line(benchmark):
    with pytest.raises(SystemExit) as ended:
        benchmark.main([])
    assert str(ended.value.code).startswith("no GPU")
    assert "\n" not in str(ended.value.code)


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_steps_run_on_a_cpu(capsys, name):
    torch.set_num_threads(1)
    full_size.main(["--device", "cpu", "--scale", "tiny", "--layout", name, "--steps", "2", "--json"])
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["batch"], step["context"]) for step in steps] == [(1, 16), (2, 16), (1, 64), (2, 64)]
    assert all(step["tokens_per_second"] > 0 for step in steps)


def test_every_operation_and_format_runs_on_a_cpu(capsys):
    torch.set_num_threads(1)
    kernels.main(["--device", "cpu", "--scale", "tiny", "--rounds", "1", "--batches", "1", "3", "--json"])
    rows = json.loads(capsys.readouterr().out)["kernels"]
    assert {row["operation"] for row in rows} == {
        "linear", "fused_moe", "paged_attention", "add_rms_norm", "silu_and_mul", "rotary_store_kv", "route",
    }  # fmt: skip
    formats = {row["format"] for row in rows if row["operation"] == "linear"}
    assert {
        "torch dense",
        "wint2",
        "wint2 by column",
        "wint4",
        "wint8",
        "bitplane2",
        "bitplane4",
        "grouped4",
        "bf16",
    } <= formats
    ratios = [row["times_as_fast_as_torch"] for row in rows if row["operation"] in ("linear", "fused_moe")]
    assert all(ratio > 0 for ratio in ratios)
