"""``dibit serve``: a Ray Serve application from a configuration file, for as long as the command runs."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.schema import ApplicationStatus
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from deployments.announce import invitation
from deployments.app import build
from deployments.config import PROJECT_ROOT, AppConfig
from engine.errors import ConfigError, DibitError

CONFIG_NAME = "serve_config.yaml"
IMPORT_PATH = "deployments.app:build"
LOCAL = "local"
"""The address that makes Ray start a cluster of this command's own."""
_POLL_SECONDS = 0.25


class ServeError(DibitError):
    """The application could not be brought up."""


@dataclass(frozen=True, slots=True)
class ServeOverrides:
    """What the command line says instead of the configuration file; ``None`` leaves the file's word."""

    model: str | None = None
    served_model_name: str | None = None
    host: str | None = None
    port: int | None = None
    tensor_parallel_size: int | None = None
    replicas: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None


@dataclass(slots=True)
class ServePlan:
    """What is to be started."""

    name: str = "dibit"
    route_prefix: str = "/"
    host: str = "127.0.0.1"
    port: int = 8000
    proxy_location: str = "HeadOnly"
    args: dict[str, Any] = field(default_factory=dict)


def read_plan(config: Path | None, overrides: ServeOverrides) -> ServePlan:
    """The configuration file with the command line's options over it.

    Raises:
        ConfigError: there is no such file, or it doesn't describe one Dibit application.
    """
    path = _config_path(config)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: expected 'applications' with one entry, as in Dibit's own {CONFIG_NAME}")
    application = applications[0]
    if application.get("import_path") != IMPORT_PATH:
        raise ConfigError(
            f"{path}: import_path is {application.get('import_path')!r}; 'dibit serve' runs {IMPORT_PATH!r}, "
            "and 'serve run' anything else"
        )
    http = content.get("http_options") or {}
    defaults = ServePlan()
    return ServePlan(
        name=str(application.get("name", defaults.name)),
        route_prefix=str(application.get("route_prefix", defaults.route_prefix)),
        host=overrides.host or str(http.get("host", defaults.host)),
        port=int(http.get("port", defaults.port)) if overrides.port is None else overrides.port,
        proxy_location=str(content.get("proxy_location", defaults.proxy_location)),
        args=_override(dict(application.get("args") or {}), overrides),
    )


def _config_path(config: Path | None) -> Path:
    if config is not None:
        if not config.is_file():
            raise ConfigError(f"there is no configuration file {str(config)!r}")
        return config
    for folder in (Path.cwd(), PROJECT_ROOT):
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise ConfigError(f"there is no {CONFIG_NAME} in {Path.cwd()}; name one: dibit serve CONFIG")


def _override(args: dict[str, Any], overrides: ServeOverrides) -> dict[str, Any]:
    if overrides.model is not None:
        args["model"] = overrides.model
        args.pop("served_model_name", None)  # the name of the file's model
    if overrides.served_model_name is not None:
        args["served_model_name"] = overrides.served_model_name
    engine = dict(args.get("engine") or {})
    for name in ("max_model_len", "max_num_seqs"):
        if (value := getattr(overrides, name)) is not None:
            engine[name] = value
    args["engine"] = engine
    of_pools = {
        name: value for name in ("tensor_parallel_size", "replicas") if (value := getattr(overrides, name)) is not None
    }
    if of_pools:
        args["pools"] = [{**pool, **of_pools} for pool in args.get("pools") or [{}]]
    return args


def run_serve(config: Path | None, overrides: ServeOverrides, *, address: str, verbose: bool) -> None:
    """Start the application, say where it listens, and serve until Ctrl-C or SIGTERM; then leave nothing behind.

    Raises:
        DibitError: the configuration is wrong, the port is taken, or the application doesn't come up.
    """
    console = Console(stderr=True, highlight=False)
    plan = read_plan(config, overrides)
    model = AppConfig.parse(plan.args).served_model_name  # all mistakes show before anything is started
    plan.port = _free_port(plan.host, plan.port)
    stop = threading.Event()
    previous = _hear(stop)
    started = time.monotonic()
    try:
        with console.status("Starting Ray") as status:
            _start_ray(plan, address=address, verbose=verbose)
            _hear(stop)  # Ray has put a handler of its own in the place, which aborts on SIGTERM
            if not stop.is_set():
                target = serve.RunTarget(build(plan.args), name=plan.name, route_prefix=plan.route_prefix)
                serve.run_many(
                    [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
                )
            _wait_until_running(plan.name, model, status=status, stop=stop)
        if not stop.is_set():
            text = invitation(model, host=plan.host, port=plan.port, prefix=plan.route_prefix)
            console.print(text, markup=False, soft_wrap=True)
            console.print(f"Started in {time.monotonic() - started:.0f} s; Ctrl-C stops it.", style="dim")
            stop.wait()
    finally:
        with console.status("Stopping"):
            _stop_ray(own_cluster=address == LOCAL, name=plan.name)
        for number, handler in previous.items():
            signal.signal(number, handler)
    console.print("Stopped.")


def _hear(stop: threading.Event) -> dict[signal.Signals, Any]:
    """Let Ctrl-C and SIGTERM set ``stop``; the handlers they had before."""
    return {number: signal.signal(number, _stopper(stop)) for number in (signal.SIGINT, signal.SIGTERM)}


def _stopper(stop: threading.Event) -> Any:
    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # a second Ctrl-C doesn't wait for an orderly end
        stop.set()

    return handle


def _free_port(host: str, port: int) -> int:
    """``port`` if it can be listened on, or any free one for 0.

    Raises:
        ConfigError: it is taken, or the host isn't one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror}; choose another with --host or --port (0: any)"
        ) from None


def _start_ray(plan: ServePlan, *, address: str, verbose: bool) -> None:
    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray.serve").setLevel(level)
    try:
        ray.init(
            address=address,
            namespace="serve",
            log_to_driver=verbose,
            logging_level=level,
            include_dashboard=False if address == LOCAL else None,
            # Ray's own is 15: an engine on the CPU would wait for whatever else this machine does.
            _system_config={"worker_niceness": 0} if address == LOCAL else None,
        )
    except Exception as error:  # Ray raises bare Exception where a process of its own doesn't come up in time
        raise ServeError(f"Ray did not start (address {address!r}): {_last_line(str(error))}") from None
    serve.start(proxy_location=plan.proxy_location, http_options={"host": plan.host, "port": plan.port})


def _wait_until_running(name: str, model: str, *, status: Status, stop: threading.Event) -> None:
    """Wait for the application, telling what it is at.

    Raises:
        ServeError: it failed; the message is the failure's last line.
    """
    started = time.monotonic()
    while not stop.wait(_POLL_SECONDS):
        application = serve.status().applications.get(name)
        if application is None:
            continue
        if application.status is ApplicationStatus.RUNNING:
            return
        deployments = application.deployments.values()
        if application.status is ApplicationStatus.DEPLOY_FAILED:
            # Others may have notes too: that they still wait for the one that failed.
            failed = [each.message for each in deployments if each.status.value == "DEPLOY_FAILED"]
            raise ServeError(f"{model} did not come up: {_reason(' '.join(failed) or application.message)}")
        waiting = "; ".join(_last_line(each.message) for each in deployments if each.message)
        seconds = time.monotonic() - started
        status.update(f"Loading {escape(model)}, {seconds:.0f} s {escape(waiting)}")


def _reason(text: str) -> str:
    """What went wrong, without the name of an error of ours before it."""
    return re.sub(r"^engine\.errors\.\w+: ", "", _last_line(text))


def _last_line(text: str) -> str:
    """The last line of a message, which in a traceback says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _stop_ray(*, own_cluster: bool, name: str) -> None:
    """Take down what this command started; on somebody else's cluster that is the application alone."""
    if not ray.is_initialized():
        return
    with suppress(Exception):  # a cluster that is already gone has nothing left to stop
        if own_cluster:
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's own lack of types
        else:
            serve.delete(name)
    ray.shutdown()
