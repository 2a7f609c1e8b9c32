"""A Ray cluster of several nodes on one machine: each claims accelerators that it hasn't, so engines run on its CPU."""

from __future__ import annotations

import os
import tempfile
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.serve_process import free_port

ROOT = Path(__file__).resolve().parent.parent
START_ATTEMPTS = 3
FRONT = "front"
"""A resource of the head alone."""


@dataclass(frozen=True, slots=True)
class NodeKind:
    """What a node claims to have."""

    accelerator_type: str
    accelerators: int
    labels: tuple[tuple[str, str], ...] = ()


class FakeCluster:
    """Nodes from :meth:`__enter__` to :meth:`__exit__`, which leaves nothing behind.

    Everything it starts has a mark in its environment, by which :meth:`processes` finds it whoever its parent is.

    Args:
        kinds: the nodes besides the head, which has CPUs alone.
        http: whether Serve listens, at :attr:`url`.
        python_path: folders for workers to import from, besides the repository's.
    """

    def __init__(self, kinds: tuple[NodeKind, ...], *, http: bool = False, python_path: tuple[str, ...] = ()) -> None:
        self._kinds = kinds
        self._http = http
        self.url = ""
        self._python_path = os.pathsep.join([str(ROOT), *python_path])
        self._name, self._value = f"DIBIT_FAKE_CLUSTER_{uuid.uuid4().hex[:8]}", "1"
        self._mark = f"{self._name}={self._value}".encode()
        self._stack = ExitStack()
        self._cluster: Any = None
        self.nodes: list[tuple[NodeKind, Any]] = []

    def __enter__(self) -> Self:
        os.environ[self._name] = self._value
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dibit-", ignore_cleanup_errors=True))
        try:
            self._start(folder)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import ray
        from ray import serve

        if ray.is_initialized():
            with suppress(Exception):  # what is broken beyond that goes with its nodes
                serve.shutdown()
            ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()
        os.environ.pop(self._name, None)
        self._stack.close()

    def add(self, kind: NodeKind) -> Any:
        """Start a node; returns when it has joined."""
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                node = self._cluster.add_node(
                    num_cpus=4,
                    num_gpus=kind.accelerators,
                    resources={f"accelerator_type:{kind.accelerator_type}": 1},
                    labels=dict(kind.labels),
                    object_store_memory=80 << 20,
                )
                break
            except Exception:  # Ray's own type, for a node that took longer than its 30 s on a busy machine
                if attempts_left == 0:
                    raise
        self.nodes.append((kind, node))
        return node

    def remove(self, node: Any) -> NodeKind:
        """Take a node away as a power failure does; what it was."""
        (kind,) = [kind for kind, known in self.nodes if known is node]
        self.nodes.remove((kind, node))
        self._cluster.remove_node(node, allow_graceful=False)
        return kind

    def processes(self, *titles: str) -> dict[int, str]:
        """Living processes of the cluster whose title begins with one of ``titles`` (any, if none is given), by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                if int(folder.name) == os.getpid() or self._mark not in (folder / "environ").read_bytes():
                    continue
                title = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                if title and (not titles or title.startswith(titles)):
                    found[int(folder.name)] = title
        return found

    def _start(self, folder: str) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                self._cluster = Cluster(
                    initialize_head=True,
                    head_node_args={
                        "num_cpus": 8,
                        "resources": {FRONT: 1.0},
                        "object_store_memory": 100 << 20,
                        "include_dashboard": False,
                        "temp_dir": folder,
                        # Ray runs workers at niceness 15, which on a busy machine is next to not at all.
                        "_system_config": {"worker_niceness": 0},
                    },
                )
                break
            except Exception:  # as in add()
                if attempts_left == 0:
                    raise
        ray.init(
            address=self._cluster.address,
            namespace="serve",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": self._python_path}},
        )
        for kind in self._kinds:
            self.add(kind)
        if not self._http:
            serve.start(proxy_location="Disabled")
            return
        port = free_port()  # only now: while nodes start, somebody else might take it
        self.url = f"http://127.0.0.1:{port}"
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
