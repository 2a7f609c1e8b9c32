"""The application whose processes are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.fake_cluster import FRONT, NodeKind

MODEL = Path(__file__).resolve().parents[2] / "examples" / "ernie-tiny" / "bf16"
APP = "chaos"
ENGINES, INGRESSES = 4, 3
KINDS = (NodeKind("H20", 2), NodeKind("A100", 2))
PROCESSES = {
    "shard": "ray::Shard",
    "replica": f"ray::ServeReplica:{APP}:EngineReplica",
    "ingress": f"ray::ServeReplica:{APP}:Ingress",
}
EXPECTED = {"shard": ENGINES, "replica": ENGINES, "ingress": INGRESSES}


def application_args(access_log: Path) -> dict[str, Any]:
    """The ``args`` of the application under test: what it is asked must be answered, however slow the machine."""
    pools = [
        {
            "name": kind.accelerator_type.lower(),
            "accelerator_type": kind.accelerator_type,
            "replicas": 2,
            "num_cpus": 0.5,
        }
        for kind in KINDS
    ]
    return {
        "model": str(MODEL),
        "served_model_name": APP,
        "engine": {"device": "cpu", "max_model_len": 512, "max_num_seqs": 16, "num_kv_blocks": 256, "num_threads": 1},
        "pools": pools,
        # On the head, which is not taken away.
        "ingress": {"replicas": INGRESSES, "resources": {FRONT: 0.01}},
        "health": {"check_period_s": 1.0, "drain_timeout_s": 10.0},
        "routing": {"admission": False},
        "access": {"log": str(access_log)},
    }


def running_engines() -> int:
    """Engines that Serve counts as running."""
    running = _running()
    return sum(running.values()) - running.get("Ingress", 0)


def running_ingresses() -> int:
    """Ingresses that Serve counts as running."""
    return _running().get("Ingress", 0)


def _running() -> dict[str, int]:
    from ray import serve

    deployments = serve.status().applications[APP].deployments
    return {
        name: sum(count for which, count in state.replica_states.items() if str(which) == "RUNNING")
        for name, state in deployments.items()
    }
