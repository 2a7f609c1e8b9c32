"""Values written by ``dibit plan`` are what the chart takes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from rendering import render, serve_config, service, validate

from deployments.cli import main
from deployments.config import AppConfig

BIG = "ernie-4.5-300b-a47b"


@pytest.mark.parametrize("gpus", [["A100-80G"], ["8xH20-141G"], ["8xH20-141G", "16xA100-80G"], ["16xA100-40G"]])
def test_emitted_helm_values_make_the_same_pools(capsys: pytest.CaptureFixture[str], gpus: list[str]) -> None:
    command = ["plan", BIG, "--concurrency", "64", "--kv-dtype", "int8", "--emit", "helm-values"]
    with pytest.raises(SystemExit):
        main(command + [word for gpu in gpus for word in ("--gpu", gpu)])
    text = capsys.readouterr().out
    values: dict[str, Any] = yaml.safe_load(text)
    objects = render(values)
    validate(objects)
    (application,) = serve_config(objects)["applications"]
    config = AppConfig.model_validate(application["args"])
    assert config.model == "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"
    groups = service(objects)["rayClusterConfig"]["workerGroupSpecs"][1:]
    assert len(config.pools) == len(groups) == len(gpus)
    for pool, group in zip(config.pools, groups, strict=True):
        assert group["replicas"] * int(group["rayStartParams"]["num-gpus"]) == (
            pool.replicas.min * pool.tensor_parallel_size
        )
