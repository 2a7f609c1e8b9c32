"""Run by test_pools.py: two pools of two ranks on fake nodes, one with room for both ranks on a node; facts as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from conftest import ENGINE, TINY, application_args, probed
from probe import greedy
from ray import serve

from benchmarks.fake_cluster import FakeCluster, NodeKind
from engine import LLM, SamplingParams

TESTS = Path(__file__).resolve().parents[1] / "deployments"
KINDS = (NodeKind("H20", 2, labels=(("zone", "near"),)), NodeKind("A100", 1), NodeKind("A100", 1))
PROMPT, MAX_TOKENS = [5, 100, 30, 40], 24


def main(out: Path) -> None:
    with LLM(TINY, progress=False, **ENGINE) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        expected = list(llm.generate([PROMPT], params)[0].outputs[0].token_ids)
    with FakeCluster(KINDS, python_path=(str(TESTS),)) as cluster:
        pool: dict[str, Any] = {"tensor_parallel_size": 2, "num_cpus": 0.5, "engine": {"device": "cpu"}}
        pools = [
            {"name": "h20", "accelerator_type": "H20", "labels": {"zone": "near"}, **pool},
            {"name": "a100", "accelerator_type": "A100", **pool},
        ]
        probe = serve.run(probed(application_args(TINY, pools)), name="pools", route_prefix=None)
        probe.until_engines.remote(2).result(timeout_s=240)
        answers = {
            name: probe.generate_in.remote(name, greedy(f"in-{name}", PROMPT, MAX_TOKENS)).result(timeout_s=240)
            for name in ("h20", "a100")
        }
        facts = {
            "places": probe.places.remote().result(timeout_s=60),
            "nodes": {
                kind.accelerator_type: [node.node_id for other, node in cluster.nodes if other == kind]
                for kind in KINDS
            },
            "answers": answers,
            "expected": expected,
            "gpus_in_use": ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0),
        }
    out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
