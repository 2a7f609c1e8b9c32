from __future__ import annotations

import os
import select
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "ernie-tiny" / "bf16"
ENGINE = {"max_model_len": 512, "max_num_seqs": 16, "num_kv_blocks": 256, "num_threads": 1}


class Processes:
    """Processes that are expected to end. Holds them by file descriptor, so a reused pid is not mistaken for one."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.pids = pids
        self._fds = {name: os.pidfd_open(pid) for name, pid in pids.items()}

    def alive_after(self, seconds: float) -> list[str]:
        """Names of those that have not ended so many seconds from now; returns as soon as all have."""
        deadline = time.monotonic() + seconds
        return [
            name
            for name, fd in self._fds.items()
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
        ]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray cluster of this test run alone: own folder, random ports, more CPUs than there are, so that all fits.

    Gives the URL where Serve listens, for applications that have a ``route_prefix``.
    """
    import ray
    from ray import serve

    from benchmarks.serve_process import free_port

    with tempfile.TemporaryDirectory(prefix="dibit-", ignore_cleanup_errors=True) as folder:
        _start_ray(folder)
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def _start_ray(folder: str) -> None:
    import ray

    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=16,
                include_dashboard=False,
                object_store_memory=100 << 20,
                namespace="serve",
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                _temp_dir=folder,
                # Ray runs workers at niceness 15, which on a busy machine is next to not at all.
                _system_config={"worker_niceness": 0},
            )
            return
        except Exception as error:  # Ray's own type: it gives a node 30 s to start, too little for a busy machine
            if "timed out during startup" not in str(error) or attempts_left == 0:
                raise
            ray.shutdown()


@pytest.fixture(scope="session")
def application(ray_cluster: str) -> Callable[..., Any]:
    """Context manager: an application of CPU pools under a Probe; gives the Probe's handle."""
    from ray import serve

    @contextmanager
    def run(
        name: str,
        *,
        model: Path = TINY,
        keep_failed: bool = False,
        pools: list[dict[str, Any]] | None = None,
        args: dict[str, Any] | None = None,
        **pool: Any,
    ) -> Iterator[Any]:
        up = False
        try:
            whole = application_args(model, pools or [{"name": name, **pool}], **(args or {}))
            handle = serve.run(probed(whole), name=name, route_prefix=None)
            up = True
            yield handle
        finally:
            if up or not keep_failed:
                serve.delete(name)

    return run


def application_args(model: Path, pools: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The ``args`` of a small application that answers all it is asked, however slow this machine is."""
    return {
        "model": str(model),
        "engine": ENGINE,
        "pools": pools,
        "health": {"check_period_s": 1.0, "drain_timeout_s": 5.0},
        "routing": {"admission": False},
        **more,
    }


def probed(args: dict[str, Any]) -> Any:
    """An application with a Probe in the place of its Ingress."""
    from probe import Probe

    from deployments.config import AppConfig
    from deployments.pool import client_options, engines

    config = AppConfig.parse(args)
    # As the Ingress does: what it holds must see the new engine come up, however long that takes here.
    patient = Probe.options(graceful_shutdown_timeout_s=240)
    return patient.bind({pool.name: engines(config, pool) for pool in config.pools}, client_options(config))


@pytest.fixture(scope="session")
def processes_of() -> Callable[[str], Processes]:
    """The processes of a pool's engines: its replicas and shards, by actor name."""
    import ray
    from ray.util import list_named_actors

    def find(pool: str) -> Processes:
        names = [
            (actor["name"], actor["namespace"])
            for actor in list_named_actors(all_namespaces=True)
            if f"-{pool}-" in actor["name"] or f"EngineReplica-{pool}#" in actor["name"]
        ]
        calls = {name: ray.get_actor(name, namespace).__ray_call__.remote(_pid) for name, namespace in names}
        return Processes({name: ray.get(call, timeout=60) for name, call in calls.items()})

    return find


def _pid(actor: object) -> int:
    return os.getpid()
