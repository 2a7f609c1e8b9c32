from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from deployments.config import AppConfig, PoolConfig
from deployments.placement import bundles, label_selector, missing, strategy
from engine.errors import ConfigError

CONFIG = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_defaults_are_one_cpu_pool_named_after_the_model(model: Path) -> None:
    config = AppConfig.parse({"model": str(model)})
    assert config.served_model_name == "tiny-model"
    (pool,) = config.pools
    assert (pool.replicas.min, pool.replicas.max, pool.tensor_parallel_size) == (1, 1, 1)
    engine = config.engine_config(pool)
    assert (engine.model, engine.device, engine.tensor_parallel_size) == (str(model), "cpu", 1)


def test_engine_options_and_ranks_reach_the_engine(model: Path) -> None:
    config = AppConfig.parse(
        {
            "model": str(model),
            "served_model_name": "mine",
            "engine": {"max_model_len": 64, "device": "auto"},
            "pools": [{"name": "h20", "accelerator_type": "H20", "tensor_parallel_size": 4, "replicas": {"max": 3}}],
        }
    )
    engine = config.engine_config(config.pools[0])
    assert (engine.max_model_len, engine.device, engine.tensor_parallel_size) == (64, "auto", 4)
    assert (config.pools[0].replicas.min, config.pools[0].replicas.max) == (1, 3)
    assert config.served_model_name == "mine"


def test_a_relative_model_is_found_in_the_working_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert AppConfig.parse({"model": "tiny-model"}).model == str(model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modell": "x"}, "modell: no such option; did you mean model?"),
        ({"pools": []}, "pools"),
        ({"pools": [{"replicas": 0}]}, "pools.0.replicas.max"),
        (
            {"pools": [{"replicas": {"min": 0, "max": 2, "initial": 3}}]},
            "initial (3) is not within min (0) and max (2)",
        ),
        ({"pools": [{"resources": {"GPU": 1}}]}, "GPU: 1 is not a custom resource"),
        ({"pools": [{"engine": {"model": "x"}}]}, "args.pools[].model"),
        ({"pools": [{"autoscaling": {"policy": "no place"}}]}, "pools.0.autoscaling.policy"),
        ({"failover": {"max_losses": -1}}, "failover.max_losses"),
        ({"pools": [{"replicas": {"min": 3, "max": 2}}]}, "min (3) exceeds max (2)"),
        ({"pools": [{"replicas": "many"}]}, "pools.0.replicas"),
        ({"pools": [{"gpu": "H20"}]}, "pools.0.gpu: no such option"),
        ({"pools": [{"replica": 2}]}, "pools.0.replica: no such option; did you mean replicas?"),
        ({"pools": [{"name": "H20 pool"}]}, "pools.0.name"),
        ({"pools": [{"num_cpus": 0}]}, "pools.0.num_cpus"),
        ({"pools": [{"tensor_parallel_size": 3}]}, "3 does not divide the model's 4 attention heads"),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, "pool names must differ"),
        ({"engine": {"max_num_seq": 4}}, "max_num_seq: no such option; did you mean max_num_seqs?"),
        ({"engine": {"max_model_len": 0}}, "max_model_len"),
        ({"engine": {"tensor_parallel_size": 2}}, "args.pools[].tensor_parallel_size"),
        ({"engine": {"model": "x"}}, "args.model"),
        ({"ingress": {"replica": 2}}, "ingress.replica: no such option; did you mean replicas?"),
        ({"health": {"stalled_after_s": -1}}, "health.stalled_after_s"),
        ({"model": ""}, "model"),
    ],
)
def test_mistakes_are_named(model: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        AppConfig.parse({"model": str(model), **change})
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"access": ["sk-secret"]},
        {"access": {"keys_env": ["sk-secret"]}},
        {"access": {"keys_file": {"path": "sk-secret"}}},
        {"observability": {"tracing": {"headers": "authorization=sk-secret"}}},
        {"observability": {"tracing": {"headers": {"authorization": ["sk-secret"]}}}},
    ],
)
def test_mistakes_quote_nothing_that_may_be_a_secret(model: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        AppConfig.parse({"model": str(model), **change})
    assert "secret" not in str(raised.value)


def test_a_missing_model_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        AppConfig.parse({"model": "no/such/model"})
    assert str(tmp_path / "no/such/model") in str(raised.value)
    with pytest.raises(ConfigError, match="model: Field required"):
        AppConfig.parse({})


def test_pools_have_options_of_their_own(model: Path) -> None:
    config = AppConfig.parse(
        {
            "model": str(model),
            "engine": {"max_model_len": 64, "max_num_seqs": 8},
            "pools": [
                {"name": "a", "engine": {"max_model_len": 32}},
                {"name": "b", "accelerator_type": "A100", "replicas": {"min": 0, "max": 2}, "labels": {"zone": "x"}},
            ],
        }
    )
    first, second = (config.engine_config(pool) for pool in config.pools)
    assert (first.max_model_len, first.max_num_seqs, first.device) == (32, 8, "cpu")
    assert (second.max_model_len, second.max_num_seqs, second.device) == (64, 8, "auto")
    assert [config.max_model_len(pool) for pool in config.pools] == [32, 64]
    assert label_selector(config.pools[0]) is None
    assert label_selector(config.pools[1]) == [{"zone": "x"}] * 2


def test_pools_may_hold_other_checkpoints_of_the_same_model_alone(tmp_path: Path) -> None:
    tiny = ROOT / "examples" / "ernie-tiny"
    pools = [{"name": "a"}, {"name": "b", "model": str(tiny / "2bits")}]
    config = AppConfig.parse({"model": str(tiny / "bf16"), "pools": pools})
    assert config.engine_config(config.pools[1]).model == str(tiny / "2bits")
    other = tmp_path / "other"
    shutil.copytree(tiny / "bf16", other, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
    pools[1]["model"] = str(other)
    with pytest.raises(ConfigError, match=r"pools\.b\.model.*rms_norm_eps is 0.5 here and [-e\d.]+ there"):
        AppConfig.parse({"model": str(tiny / "bf16"), "pools": pools})


def test_the_embedded_default_is_valid_and_stays_on_this_machine() -> None:
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = content["applications"]
    AppConfig.model_validate(application["args"])
    assert application["import_path"] == "deployments.app:build"
    assert content["http_options"]["host"] == "127.0.0.1"


def test_a_laptop_with_two_cores_holds_the_default() -> None:
    for ranks in (1, 2, 4):
        assert missing(PoolConfig(tensor_parallel_size=ranks), {"CPU": 2.0}) == ""


def test_accelerators_are_asked_for_one_a_rank_on_one_node() -> None:
    pool = PoolConfig(name="a100", accelerator_type="A100", tensor_parallel_size=4)
    assert bundles(pool)[1:] == [{"CPU": 1.0, "GPU": 1, "accelerator_type:A100": 0.001}] * 4
    assert strategy(pool) == "STRICT_PACK"


@pytest.mark.parametrize(
    ("ranks", "nodes", "chosen"),
    [
        (4, [8, 8], "STRICT_PACK"),
        (4, [2, 4], "STRICT_PACK"),
        (4, [2, 2], "PACK"),
        (8, [], "STRICT_PACK"),  # they may be on their way
        (16, [], "PACK"),  # no usual machine has so many
    ],
)
def test_ranks_share_a_node_where_one_has_room_for_them(ranks: int, nodes: list[int], chosen: str) -> None:
    resources = [{"CPU": 64.0, "GPU": float(count), "accelerator_type:A100": 1.0} for count in nodes]
    resources.append({"CPU": 64.0, "GPU": 32.0, "accelerator_type:H20": 1.0})
    pool = PoolConfig(name="a100", accelerator_type="A100", tensor_parallel_size=ranks)
    assert strategy(pool, resources) == chosen
    assert strategy(pool.model_copy(update={"across_nodes": True}), resources) == "PACK"
    assert strategy(pool.model_copy(update={"across_nodes": False}), resources) == "STRICT_PACK"


def test_custom_resources_are_asked_for_with_each_rank() -> None:
    pool = PoolConfig(name="a", resources={"fast": 2.0}, tensor_parallel_size=2)
    assert [bundle.get("fast") for bundle in bundles(pool)] == [None, 2.0, 2.0]


def test_what_is_missing_is_said_with_numbers() -> None:
    pool = PoolConfig.model_validate(
        {"name": "h20", "accelerator_type": "H20", "tensor_parallel_size": 2, "replicas": 2}
    )
    cluster = {"CPU": 64.0, "GPU": 2.0, "accelerator_type:A100": 1.0}
    said = missing(pool, cluster)
    assert "4 GPU (the cluster has 2)" in said
    assert "GPUs of type H20 (no node has one)" in said
    assert "CPU (" not in said
    assert missing(pool, {"CPU": 5.0, "GPU": 4.0, "accelerator_type:H20": 1.0}) == ""
