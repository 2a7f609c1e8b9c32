"""From a plan to the files that start it: a serve_config.yaml, or values for the Helm chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import yaml

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.planning.advice import Offer
from engine.quantization.vocabulary import QuantizeEmbeddings

Target = Literal["serve-config", "helm-values"]
DEFAULTS = EngineConfig(model="")


def emit(
    target: Target,
    offers: Sequence[Offer],
    *,
    model: str,
    engine: EngineConfig,
    command: str,
    embeddings: QuantizeEmbeddings | None = None,
) -> str:
    """The file's text.

    Args:
        target: which file.
        offers: the engines to start: a pool for each, in this order.
        model: folder or repository of the weights.
        engine: the engine options that the plan was made with.
        command: how to make the file again, for its first line.
        embeddings: how the plan rounds embedding and head.

    Raises:
        ConfigError: a card has no name by which Ray finds it, or two have the same.
    """
    demand = offers[0].fit.demand
    options: dict[str, Any] = {"max_model_len": demand.context}
    for name in ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "quantization"):
        if getattr(engine, name) != getattr(DEFAULTS, name):
            options[name] = getattr(engine, name)
    if demand.kv_dtype == "int8":
        options["kv_cache_dtype"] = "int8"
    if embeddings is not None:
        options["quantize_embeddings"] = embeddings
    pools = [_pool(offer) for offer in offers]
    if len({pool["name"] for pool in pools}) < len(pools):
        cards = " and ".join(offer.fit.card.name for offer in offers)
        raise ConfigError(f"Ray can't tell {cards} apart by their type; emit a file for one, and add `labels` by hand")
    head = "".join(f"# {line}\n" for line in (f"Written by: {command}", *(f"{offer}." for offer in offers)))
    made = _serve_config(model, options, pools) if target == "serve-config" else _helm_values(model, options, pools)
    return head + yaml.safe_dump(made, sort_keys=False)


def _pool(offer: Offer) -> dict[str, Any]:
    card = offer.fit.card
    if card.accelerator_type is None:
        raise ConfigError(
            f"{card.name!r} has no name that Ray knows; name a GPU of the table, or write the file by hand"
        )
    return {
        "name": card.accelerator_type.lower(),
        "accelerator_type": card.accelerator_type,
        "tensor_parallel_size": offer.fit.tensor_parallel_size,
        "replicas": {"min": offer.engines, "max": offer.engines},
    }


def _serve_config(model: str, options: dict[str, Any], pools: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "dibit",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {"model": model, "engine": options, "pools": pools},
            }
        ],
    }


def _helm_values(model: str, options: dict[str, Any], pools: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": {"path": model},
        "engine": options,
        "pools": [{**pool, "worker": _worker(pool["tensor_parallel_size"])} for pool in pools],
    }


def _worker(gpus: int) -> dict[str, Any]:
    """The pod of one engine."""
    return {
        "gpus": gpus,
        "resources": {
            "requests": {"cpu": str(max(8, 4 * gpus)), "memory": f"{max(64, 32 * gpus)}Gi"},
            "limits": {"memory": f"{max(192, 64 * gpus)}Gi"},
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
