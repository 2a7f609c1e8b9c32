"""A real ``serve run`` (or ``dibit serve``) in a process, a cluster and on a port of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

ROOT = Path(__file__).resolve().parent.parent
IMPORT_PATH = "deployments.app:build"
START_ATTEMPTS = 3
RAY_TOO_SLOW = "timed out during startup"
"""What ``ray.init`` says when its own processes take more than 30 s, a constant that busy machines exceed."""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def haproxy_environment(folder: Path) -> dict[str, str]:
    """What Serve reads to run HAProxy, beside other servers and for a short life.

    Its files and ports are fixed otherwise. It ends with connections open for two minutes, and replicas that drain
    wait for half a minute, which would be most of a benchmark.
    """
    own = folder / "haproxy"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(own / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(own / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(own),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(own / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(own / "metrics.sock"),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _hear_ctrl_c() -> None:
    """A shell ignores Ctrl-C in what it runs in the background, and so would whatever is started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class ServeProcess:
    """A server on a generated configuration, from :meth:`__enter__` until Ctrl-C in :meth:`__exit__`.

    Args:
        args: of the application, as in ``serve_config.yaml``.
        folder: where the configuration and the log are written.
        program: the start of the command line, which the configuration's path ends.
        environment: variables added to this process's own.
        seconds: longest wait for the applications to be healthy.
        import_path: where the application is built.
        beside: other applications of the same server, as ``applications`` of a Serve configuration has them.
        haproxy: put HAProxy in the place of Serve's own proxy.
    """

    def __init__(
        self,
        args: dict[str, Any],
        folder: Path,
        *,
        program: Sequence[str] | None = None,
        environment: dict[str, str] | None = None,
        seconds: float = 300.0,
        import_path: str = IMPORT_PATH,
        beside: Sequence[dict[str, Any]] = (),
        haproxy: bool = False,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "serve.log"
        self._seconds = seconds
        self._program = program or [str(Path(sys.executable).with_name("serve")), "run"]
        application = {"name": "dibit", "route_prefix": "/", "import_path": import_path, "args": args}
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [application, *beside],
        }
        self._health = ["/health", *(f"{other['route_prefix']}/health" for other in beside)]
        self._config = folder / "serve_config.yaml"
        self._config.write_text(yaml.safe_dump(config), encoding="utf-8")
        # RAY_ADDRESS=local: a cluster of its own, whatever else runs on this machine.
        self._mark = f"DIBIT_SERVE_PROCESS={uuid.uuid4().hex}"
        self._environment = {
            **os.environ,
            **dict([self._mark.split("=")]),
            "RAY_ADDRESS": "local",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **(haproxy_environment(folder) if haproxy else {}),
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._start(START_ATTEMPTS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, seconds: float = 150.0) -> int:
        """Press Ctrl-C and wait; returns the exit code. A process that doesn't end is killed, and that is an error."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                raise RuntimeError(f"the server did not end on Ctrl-C; its log ends with:\n{self.tail()}") from None
        return self.process.returncode

    def kill(self) -> None:
        """End every process of this server now."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def pids(self) -> dict[int, str]:
        """All living processes that descend from this server, whoever their parent is now, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                    found[int(folder.name)] = command
        return found

    def remaining(self, seconds: float = 20.0) -> list[str]:
        """What is left of a server that has ended: processes that don't end within some seconds, which are killed.

        Raylet, dashboard and their like end a moment after the one that started them.
        """
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)  # processes that are ending give no signal to one that is not their parent
        if left:
            self.kill()
        return left

    def processes(self) -> list[str]:
        """The command lines of :meth:`pids`."""
        return list(self.pids().values())

    def tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _start(self, attempts: int) -> None:
        command = [*self._program, str(self._config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,  # noqa: PLW1509  # one system call, which takes no lock
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            if attempts == 1 or RAY_TOO_SLOW not in self.tail():
                raise
            self._start(attempts - 1)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._seconds
        waiting = list(self._health)
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"the server ended early; its log ends with:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}{waiting[0]}", timeout=30) as response:
                    if response.status == 200:
                        waiting.pop(0)
            except OSError:
                time.sleep(0.2)  # there is nothing to wait on but the port
            if not waiting:
                return
        raise RuntimeError(f"not healthy after {self._seconds:.0f} s; the log ends with:\n{self.tail()}")
