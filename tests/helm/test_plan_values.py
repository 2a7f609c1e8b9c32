"""Values written by ``dibit plan`` are what the chart takes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from rendering import render, serve_config, service, validate

from deployments.cli import main
from deployments.config import AppConfig

BIG = "ernie-4.5-300b-a47b"


def test_emitted_helm_values_make_the_same_pools(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", BIG, "--concurrency", "64", "--kv-dtype", "int8", "--gpu", "A100-80G", "--emit", "helm-values"]
    with pytest.raises(SystemExit):
        main(command)
    text = capsys.readouterr().out
    values: dict[str, Any] = yaml.safe_load(text)
    objects = render(values)
    validate(objects)
    (application,) = serve_config(objects)["applications"]
    config = AppConfig.model_validate(application["args"])
    assert config.model == "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"
    (pool,) = config.pools
    group = service(objects)["rayClusterConfig"]["workerGroupSpecs"][1]
    gpus = int(group["rayStartParams"]["num-gpus"])
    assert group["replicas"] * gpus == pool.replicas.min * pool.tensor_parallel_size
